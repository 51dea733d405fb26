"""A short video from the built-in model, and the judge's opinion of it."""
