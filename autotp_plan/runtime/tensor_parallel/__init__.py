"""What one rank computes: tensor-parallel layers, their collectives, sharded parameters.

Not here: reading weights (`runtime.loading`), losses (`runtime.losses`) and the DeepSpeed engine (`runtime.deepspeed`).
"""
