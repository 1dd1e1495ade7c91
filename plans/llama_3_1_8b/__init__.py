"""Llama-3.1-8B: its config.json and its compiled plans."""
