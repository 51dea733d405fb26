"""Multi-device execution: the mesh, parameter sharding, and sequence parallelism around attention.

Models know nothing about devices. A training step runs inside one `jax.shard_map` over every mesh
axis; in it, `ulysses` wraps attention and `fsdp.Gather` all-gathers parameters layer by layer.
"""
