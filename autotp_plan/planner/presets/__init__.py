"""One JSON file per architecture, in the form of `schemas/spec.schema.json`. Adding a model is adding a file."""
