"""Inference: how a model that nobody described is sharded, found out from the model itself by running it small.

Layouts come from what depends on what (`regions`), sizes as expressions of config keys from several small models
(`small`); the result is a spec file (`spec`). Nothing here knows plans or ranks, and nothing here is proof.
"""
