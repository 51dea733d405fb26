"""Many devices: the mesh, who holds which parameters, and sequence parallelism around attention.

Models know nothing of this. A step runs inside one `jax.shard_map` over every axis of the mesh; in
it, `ulysses` wraps attention and `fsdp.Gather` unpacks parameters layer by layer.
"""
