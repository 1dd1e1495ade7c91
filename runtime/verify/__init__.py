"""The proof of a plan: a small model of the same architecture, dense and sharded, compared number for number."""
