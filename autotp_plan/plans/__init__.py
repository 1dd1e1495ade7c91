"""Compiled plans of well-known public models, with the config.json each came from: examples and golden files."""
