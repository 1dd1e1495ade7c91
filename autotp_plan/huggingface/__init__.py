"""What the planner and the runtime both need of transformers: a model without weights, and private names.

`internals` is the only place that says a private name of transformers, accelerate or PEFT. torch and transformers are
imported inside functions, never at module level: planning from a checkpoint does without them.
"""
