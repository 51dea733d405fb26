"""The step of the sampler for one chunk, compiled for a GPU that is not present.

    python -m longlive_jax.planning.sampling --chip=h200 [--layers=30] [--batch=1] [--stacked]

It prints as JSON what the program copies and what memory it needs, with the 5B model at 1280x704.
The program is the sampler's own. Only the target of cuDNN's attention is renamed, since compiling
it needs cuDNN; its operands, results and their layouts stay, and with them any copy that they need.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.planning import deviceless

SIZE = (8, 22, 40)
"""Frames, rows and columns of a chunk in tokens, at 1280x704."""
STEPS = 4
"""Model calls that denoise a chunk; one more writes it to the cache."""
FUSED_ATTENTION = "__cudnn$fmha"
"""What the targets of cuDNN's attention begin with."""


@dataclasses.dataclass(frozen=True)
class SamplingStep:
    """What to compile.

    Attributes:
      chip: name of the GPU in `CHIPS`.
      layers: layers of the model; the 5B model has 30.
      batch: videos.
      stacked: whether parameters and cache are stacks of layers, as on CPUs.
      policy: fields of the cache's `CachePolicy`.
      format: fields of its `KVFormat`.
    """

    chip: str
    layers: int = 30
    batch: int = 1
    stacked: bool = False
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    format: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def compile_step(step: SamplingStep) -> Any:
    """The compiled step; in a process that called `deviceless.prepare` before it imported JAX."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from longlive_jax.planning.chips import get_chip
    from longlive_jax.planning.compile import OPTIONS

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=get_chip(step.chip).description(), topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sampler, arguments = _program(step)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with jax.default_device(mesh.devices.flat[0]):
        lowered = sampler.step.lower(*arguments)
    _rename_attention(lowered)
    return lowered.compile(compiler_options=OPTIONS | {"xla_gpu_mock_custom_calls": True})


def measure(program: Any) -> dict[str, Any]:
    """Bytes of a compiled step.

    Returns a dict of
      copied_bytes_per_call: read and written by copies, per model call.
      largest_copy_bytes: elements of the largest copy.
      temporary_bytes, argument_bytes, aliased_bytes: memory.
      largest_copies: name, result, runs and bytes of the ten that cost most.
    """
    from longlive_jax.planning.copies import copied_bytes, copies

    memory = program.memory_analysis()
    kernels = sorted(copies(program.as_text()), key=lambda x: -x.runs * x.bytes)
    return {
        "copied_bytes_per_call": copied_bytes(kernels) // (STEPS + 1),
        "largest_copy_bytes": max(copy.bytes for copy in kernels) // 2,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "largest_copies": [dataclasses.asdict(copy) for copy in kernels[:10]],
    }


def _program(step: SamplingStep) -> tuple[Any, Any]:
    """The sampler, and the abstract arguments of its step."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from longlive_jax.diffusion import solvers
    from longlive_jax.models.params import abstract
    from longlive_jax.models.variants import variant
    from longlive_jax.models.wan import DiT, TextKV
    from longlive_jax.models.wan.cache import CachePolicy, empty_cache
    from longlive_jax.models.wan.packed_cache import KVFormat
    from longlive_jax.sampling.drivers import ChunkInputs, Sampler, VideoConditioning
    from longlive_jax.sampling.load import layers_apart

    # 1. Model.
    model = dataclasses.replace(
        variant("wan2_2_ti2v_5b")["dit"],
        layers=step.layers,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    graphdef, params = abstract(lambda: DiT(model, rngs=nnx.Rngs(0)))
    if not step.stacked:
        params = jax.eval_shape(layers_apart, params)
    # 2. State and inputs.
    policy = CachePolicy(**step.policy, format=KVFormat(**step.format))
    text = (model.layers, step.batch, 1, model.text_len, model.heads, model.head_dim)
    latent = (step.batch, 2 * SIZE[1], 2 * SIZE[2], model.in_channels)

    def state():
        cache = empty_cache(model, step.batch, SIZE, policy, per_layer=not step.stacked)
        conditioning = VideoConditioning(
            solver=jax.tree.map(jnp.asarray, solvers.unipc(STEPS)),
            keys=jax.random.split(jax.random.key(0), step.batch),
            conditioning_frame=jnp.zeros(latent),
            has_conditioning_frame=jnp.zeros(step.batch, bool),
        )
        prompt = TextKV(jnp.zeros(text, model.dtype), jnp.zeros(text, model.dtype))
        cut, offset = jnp.zeros(step.batch, bool), jnp.zeros(step.batch, jnp.int32)
        return cache, conditioning, ChunkInputs(prompt, cut, offset)

    return Sampler(graphdef), (params, *jax.eval_shape(state))


def _rename_attention(lowered: Any) -> None:
    """Renames the targets of cuDNN's attention in a lowered program, for compiling without it."""
    from jax.extend.mlir import ir

    def rename(op: Any) -> Any:
        if op.name == "stablehlo.custom_call":
            target = ir.StringAttr(op.attributes["call_target_name"]).value
            if target.startswith(FUSED_ATTENTION):
                op.attributes["call_target_name"] = ir.StringAttr.get(f"renamed_{target[2:]}")
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir("stablehlo")
    with module.context:
        module.operation.walk(rename)


def main(argv: Sequence[str]) -> int:
    """Compiles the step that the options describe and prints the report."""
    parser = argparse.ArgumentParser(prog="python -m longlive_jax.planning.sampling")
    parser.add_argument("--chip", required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--policy", type=json.loads, default={})
    parser.add_argument("--format", type=json.loads, default={})
    deviceless.prepare()
    step = SamplingStep(**vars(parser.parse_args(argv)))
    began = time.perf_counter()
    program = compile_step(step)
    seconds = round(time.perf_counter() - began, 1)
    report = dataclasses.asdict(step) | measure(program) | {"compile_seconds": seconds}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
