"""The paper's Figure 4: the whole method on a tree whose optimal policy is known.

model    the tree as a language model
recipe   rollouts, critic and measurement, beside the closed form
"""
