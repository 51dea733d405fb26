"""Losses: teacher forcing, its sharded form, and error recycling around either."""
