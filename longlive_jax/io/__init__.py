"""Files: checkpoints in our format, videos and pictures."""
