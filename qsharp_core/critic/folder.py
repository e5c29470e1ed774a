"""What a critic's folder holds, by name, and how much it may hold; what the files mean is in `checkpoint`."""

CARD, HEAD, BACKBONE = "critic.json", "head.safetensors", "backbone"
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
WEIGHTS = ".safetensors"
DEFAULT_MAX_BYTES = 64 * 2**30


def belongs_to_backbone(name: str) -> bool:
    """Whether a file of this name in `backbone/` is read, or may be: its config, its tokenizer, its weights."""
    return name in (CONFIG, INDEX, TOKENIZER, TOKENIZER_CONFIG) or (name.endswith(WEIGHTS) and name[0] != ".")
