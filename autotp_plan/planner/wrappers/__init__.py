"""Models around a language model, as vision-language checkpoints are: which language model is where, under which names.

`wrappers.json` is the data. The language model is planned by its own preset, and everything else is replicated.
"""
