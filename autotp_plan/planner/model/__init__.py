"""What a model is made of: parameter names, shapes and dtypes, from file headers, a config.json or a live module.

Not here: how a parameter is sharded (`planner.rules`).
"""
