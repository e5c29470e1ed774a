"""The critic: its model, its format on disk, and the engine that scores candidates next to the reference.

model       backbone (Hugging Face `AutoModel`) and head
checkpoint  a critic's folder on disk: read, checked, written
cache       block-paged pool of keys and values, prefixes shared
attention   the attention function that reads and writes that pool
engine      scores candidates of many rows in one forward pass
native      a head on the reference's own hidden states, and its folder on disk (native_checkpoint)
reference   which reference a critic was made for
scorer      what every kind of critic promises the guided step
"""
