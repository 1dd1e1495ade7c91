"""Regions: which rows of which weights belong together, found by running a small model and by trying shares of it.

Works on modules and tensors; what a size is called in a config is not known here.
"""
