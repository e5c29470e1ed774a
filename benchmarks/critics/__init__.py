"""Critics of the default model, trained on the same logged rollouts and measured through the same server.

learning_curve    accuracy over the number of rollouts
kinds             a separate critic beside one on the reference's hidden states
common            what both do, by the commands that users type
"""
