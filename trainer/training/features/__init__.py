"""What the reference says of rollouts: its hidden states and log-probabilities, computed once and kept.

A critic on the reference's own hidden states learns from pairs of a prefix and the token that follows. The hidden
state before a token and the token's log-probability hang on the reference and the prefix alone, so they outlive
epochs, seeds, rounds and rewards.

prefixes    rollouts merged where they agree: distinct prefixes, each with a digest
extract     the reference run over prefixes that are not known yet
store       shards on disk, memory-mapped, in a folder that never grows beyond a bound
known       what is asked for, from the shards, run first where it is in none
"""
