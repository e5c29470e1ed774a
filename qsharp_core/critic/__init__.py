"""The critic: its models, its folder on disk, and how it scores candidates.

model               a separate critic: a backbone (Hugging Face `AutoModel`) and a head
native              a native critic: a head on the reference's own hidden states
checkpoint          the folder of a separate critic, and the card that both kinds have
backbone            the backbone in that folder
tensors, files      files that somebody else has written: tensors, and JSON
native_checkpoint   the folder of a native critic
folder, digest      what a folder holds, by name; what it holds, as one number
fetching            versions from object stores, into a cache on this machine's disk
reference           identifies the reference that a native critic was made for
randomness          keeps loading from changing the process's random state
scoring/            scores the candidates of a step, with either kind
"""
