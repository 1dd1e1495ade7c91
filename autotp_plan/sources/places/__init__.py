"""Where a model can be, a file for each kind of place: what a string means, and the files that are found there.

What the files hold is not asked here.
"""
