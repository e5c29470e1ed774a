"""The rollout store."""
