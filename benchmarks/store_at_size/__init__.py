"""How the store does with millions of rollouts; see `__main__`."""
