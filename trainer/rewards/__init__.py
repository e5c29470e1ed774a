"""Verifiers: what judges completions, how they are run, and `qsharp reward`."""
