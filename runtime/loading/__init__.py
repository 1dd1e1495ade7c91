"""From a plan and a folder to a sharded model: build it on meta, check it, replace modules, read this rank's weights.

Not here: training it.
"""
