"""Critics that are a head on the reference's hidden states, trained on features that were computed once.

critic     the critic as a run trains it
reference  the reference that is read, and where its features are kept
nodes      rollouts' labels on distinct prefixes
fit        the optimisation of the head
predict    the head's predictions on held-out rollouts
parent     the predictions of the version before
"""
