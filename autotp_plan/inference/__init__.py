"""Inference: how a model that nobody described is sharded, found out from the model itself by running it small.

Layouts come from what depends on what (`influence`, `units`), sizes as expressions of config keys from several small
models (`expressions`); the result is a spec file. Nothing here knows plans or ranks, and nothing here is proof.
"""
