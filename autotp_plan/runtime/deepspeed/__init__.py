"""DeepSpeed: its mesh and process groups, the engine's config, and the private names that we rely on
(`internals`; `zero_internals` for ZeRO).

Not here: layers (`runtime.tensor_parallel`) and checkpoints (`runtime.checkpoint`).
"""
