"""Where a model's files are, and what they hold once they are read: the one way in for every command.

A model is given as a folder of this machine, an id of the hub or the URL of a folder. `model_folder` finds it,
`open_checkpoint` reads its headers.
"""
