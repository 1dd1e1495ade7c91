"""The spec file: from regions of two small models to rules with expressions of config keys.

Nothing here runs a model.
"""
