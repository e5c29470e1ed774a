"""The trainer's side: tasks, rollouts, and critics learned from them."""
