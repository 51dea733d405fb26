"""Quantized matrices: policies (the format of each matrix), NVFP4 training, packed inference."""
