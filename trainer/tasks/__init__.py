"""Tasks: problems, prompts and a reward for a completion's text. Pure, without models."""
