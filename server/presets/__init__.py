"""Models and their critics that come with the project: what `qsharp serve` serves with no MODEL, or by name."""
