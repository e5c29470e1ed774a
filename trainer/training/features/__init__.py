"""What the reference says of rollouts: its hidden states and log-probabilities, computed once and kept.

A native critic learns from pairs of a prefix and the token that follows. The hidden state before a token and the
token's log-probability depend on the reference and the prefix alone, so they serve all epochs, seeds, rounds and
rewards.

known    the features of a tree's nodes, from the store; the reference is run for those that are missing
extract  the reference run over prefixes
passes   which passes it is run in
store    shards on disk, memory-mapped, in a folder that never grows beyond a bound
"""
