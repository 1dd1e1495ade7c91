"""Fetching bytes from far away: connections, ranges in flight, when a server is asked again. No model is known here."""
