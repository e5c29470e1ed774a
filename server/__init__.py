"""The HTTP server: our routes on vLLM's own app, and everything between them and the workers' critics."""
