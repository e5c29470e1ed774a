"""Models with their critics that come with the project: what `qsharp serve` serves without MODEL, or by its name."""
