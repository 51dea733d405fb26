"""Import and export of PyTorch, safetensors, diffusers and LongLive checkpoints."""
