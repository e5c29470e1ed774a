"""What `make serve` serves with no arguments: a small language model and a critic that helps it."""
