"""What a module computes, found out by running it on a few numbers: whether it is a linear layer, how a norm averages.

Needs torch alone, and knows nothing of plans: what infers plans and what runs them ask the same questions here.
"""
