"""Which matrices are computed in which format: policies, training in NVFP4, packed inference."""
