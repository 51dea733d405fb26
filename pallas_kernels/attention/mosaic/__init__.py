"""Block-sparse attention as Pallas Mosaic GPU kernels."""
