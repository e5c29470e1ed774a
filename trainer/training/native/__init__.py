"""A critic that is a head on the reference's hidden states, trained on features that were computed once.

nodes     rollouts' labels on distinct prefixes
fit       the optimisation of the head
predict   its predictions, in the form of all critics'
parent    those of a version before
kind      the run's view of all this
"""
