"""Measurements: each a command of its own, whose numbers stand in the documentation beside it."""
