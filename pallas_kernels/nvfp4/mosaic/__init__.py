"""NVFP4 as Pallas Mosaic GPU kernels, for Blackwell."""
