"""`Gather`: what is communicated in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import SHARDS, MeshSpec, make_mesh
from longlive_jax.quant.low_rank import LoRAKernel, LowRank


def test_factors_of_branches_keep_their_dtype_and_the_kernel_does_not():
    mesh = make_mesh(MeshSpec(fsdp=2), jax.devices()[:2])
    a, b, kernel = (jnp.arange(24.0).reshape(4, 6) / 7 + i for i in range(3))
    specs = {"q": LoRAKernel(P(None, SHARDS), LowRank(P(SHARDS), P(None, SHARDS)))}
    params = {"q": LoRAKernel(kernel, LowRank(a, b))}
    gather = Gather(specs, jnp.bfloat16)
    replicated = jax.shard_map(
        lambda shards: gather.tree(shards, specs, dtype=gather.dtype),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,
    )(params)["q"]
    np.testing.assert_array_equal(replicated.kernel, kernel.astype(jnp.bfloat16))
    np.testing.assert_array_equal(replicated.branch.a, a)
    np.testing.assert_array_equal(replicated.branch.b, b)
    assert (replicated.kernel.dtype, replicated.branch.a.dtype) == (jnp.bfloat16, jnp.float32)
