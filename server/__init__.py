"""The HTTP side: routes on vLLM's own app, settings, launch and the embedded default."""
