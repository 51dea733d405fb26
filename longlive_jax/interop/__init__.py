"""Foreign checkpoints: PyTorch, safetensors, diffusers and LongLive files, read and written."""
