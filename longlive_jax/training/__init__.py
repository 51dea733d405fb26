"""Training: one update, one loop, and a task per model that is trained."""
