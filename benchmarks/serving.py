"""The server as a user starts it, for measurements and tests."""

from trainer.serving import serve

__all__ = ["serve"]
