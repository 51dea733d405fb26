"""Stages of training that run on a user's own data, from settings to a `Task`."""
