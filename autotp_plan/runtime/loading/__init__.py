"""From a plan, a folder and a model on meta to a sharded model: check it, replace modules, read this rank's weights.

Not here: training it.
"""
