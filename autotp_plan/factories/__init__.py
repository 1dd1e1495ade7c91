"""Models that are not from transformers: made by a function of the user's, small ones too, with inputs and a loss.

A function is named as `package.module:function`, and its arguments are to such a model what a config is to one of
transformers. Nothing here knows plans, layouts or ranks.
"""
