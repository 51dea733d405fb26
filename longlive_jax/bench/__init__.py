"""Speed and memory by stage."""
