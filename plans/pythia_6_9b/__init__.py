"""Pythia-6.9B: its config.json and its compiled plan."""
