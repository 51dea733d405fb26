"""Datasets that training and evaluation read."""
