"""What a training step of one rank costs, without its hardware: the planned model runs on tensors without data.

Not here: what ZeRO and the optimizer add.
"""
