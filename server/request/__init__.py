"""A request that samples, from its admission to its response."""
