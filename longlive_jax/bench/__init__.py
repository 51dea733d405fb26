"""Benchmarks: speed, memory and accuracy of every stage, measured or counted."""
