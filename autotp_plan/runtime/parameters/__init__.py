"""Parameters that are shards: how they are held, found again, and kept out of what is saved as the model.

Not here: the layers that compute with them (`runtime.tensor_parallel`).
"""
