"""Sequence parallelism: between the blocks, each rank holds its tokens of the residual stream.

As in Megatron-LM (Korthikanti et al., 2022, "Reducing Activation Recomputation in Large Transformer Models"). A module
that needs every token (attention, an MLP) is given them by an all-gather; the sum over the ranks behind it becomes a
reduce-scatter. Both together move the bytes of the all-reduce that they replace.

Not here: which modules these are, which the plan says, and the sum of gradients of parameters that see a part of the
tokens (`partial_gradient` in the plan, `runtime.loading`).
"""
