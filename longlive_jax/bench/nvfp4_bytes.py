"""Bytes that one linear moves, by implementation and phase, counted in programs for an absent GPU.

`count` runs this module in a process of its own, because Mosaic compiles for one chip per process
and JAX must not be imported before.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longlive_jax.planning import deviceless
from longlive_jax.planning.chips import get_chip
from longlive_jax.planning.hlo_bytes import program_bytes
from longlive_jax.spec import UserError

PREFIX = "BYTES "
PATHS = ("bf16", "fp8", "xla", "mosaic")
ROOT = Path(__file__).parents[2]


def count(
    chip: str, rows: int = 7040, inputs: int = 3072, outputs: int = 3072, paths: tuple = PATHS
) -> dict[str, Any]:
    """Bytes of `x @ W + b` for each path and phase, and the path that "auto" takes.

    "training" is forward and backward as one program, "backward" its second half alone, "forward"
    the difference; "weights" is the work on W once an update. Raises UserError if nothing can be
    compiled on this machine.
    """
    from longlive_jax.bench.kernels import process_lines

    if (why := deviceless.refusal()) is not None:
        raise UserError(f"bench nvfp4 --bytes: {why}")
    sizes = [str(size) for size in (rows, inputs, outputs)]
    command = [sys.executable, "-m", "longlive_jax.bench.nvfp4_bytes", chip, *sizes, *paths]
    for line in process_lines(command, ROOT):
        if line.startswith(PREFIX):
            return json.loads(line.removeprefix(PREFIX))
    raise UserError(f"bench nvfp4 --bytes: no report for {chip}; run {' '.join(command)}")


def main(argv: list[str]) -> int:
    """Arguments are `CHIP ROWS INPUTS OUTPUTS PATH ...`."""
    deviceless.prepare()
    chip, *rest = argv
    size = tuple(int(part) for part in rest[:3])
    report: dict[str, Any] = {"chip": chip, "size": list(size), "bytes": {}}
    with _default_device(chip):
        report["auto"] = _auto()
        for path in rest[3:]:
            phases = {name: _counted(chip, *program) for name, program in _programs(path, *size)}
            if "backward" in phases:
                phases["forward"] = phases["training"] - phases["backward"]
            report["bytes"][path] = phases
    print(PREFIX + json.dumps(report), flush=True)
    return 0


def _default_device(chip: str) -> Any:
    """Makes a chip that need not be present the device that implementations are chosen for."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=get_chip(chip).description(), topology="1x1x1"
    )
    return jax.default_device(topology.devices[0])


def _counted(chip: str, run: Callable, arguments: tuple) -> int:
    return program_bytes(deviceless.compile_for(chip, run, *arguments).as_text())


def _auto() -> dict[str, str]:
    """What "auto" takes with this installation's records, and with one that proves the kernels."""
    from pallas_kernels.nvfp4 import api

    recorded: Any = api.proven
    names: dict[str, str] = {"now": api.linear_implementation("auto", trains=True)}
    api.proven = lambda *_, **__: True
    names["proven"] = api.linear_implementation("auto", trains=True)
    api.proven = recorded
    return names


def _programs(path: str, m: int, i: int, o: int) -> Iterator[tuple[str, tuple[Callable, tuple]]]:
    """The program of every phase of a path: (phase, (function, abstract arguments))."""
    import jax
    import jax.numpy as jnp

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    # 1. Inference, with the weights packed before.
    master, bias = array(i, o, dtype=jnp.float32), array(o, dtype=jnp.float32)
    pack = functools.partial(_inference_weights, path)
    yield "inference", (_inference, (array(m, i), jax.eval_shape(pack, master), bias))
    if path == "fp8":
        return
    # 2. Training as one program, and its second half, which gets the residuals of the first.
    prepare = functools.partial(_training_weights, path)
    packed, key = jax.eval_shape(prepare, master), jax.eval_shape(jax.random.key, 0)

    def forward(x: Any, master: Any, packed: Any, bias: Any, key: Any) -> Any:
        def product(x: Any, master: Any, bias: Any) -> Any:
            return _training_product(path, x, master, packed, bias, key)

        return jax.vjp(product, x, master, bias)

    def training(grad: Any, *arguments: Any) -> Any:
        y, pull = forward(*arguments)
        return y, pull(grad)

    arguments, grad = (array(m, i), master, packed, bias, key), array(m, o)
    yield "training", (training, (grad, *arguments))
    _, pull = jax.eval_shape(forward, *arguments)
    yield "backward", (lambda pull, grad: pull(grad), (pull, grad))
    if packed is not None:
        yield "weights", (prepare, (master,))


def _inference_weights(path: str, kernel: Any) -> Any:
    from longlive_jax.quant.packed import pack_kernel
    from longlive_jax.quant.policy import Format

    if path == "bf16":
        return kernel.astype("bfloat16")
    form = Format(kind="fp8" if path == "fp8" else "nvfp4")
    return pack_kernel(kernel, form, implementation=_implementation(path))


def _inference(x: Any, kernel: Any, bias: Any) -> Any:
    if hasattr(kernel, "product"):
        return kernel.product(x, bias)
    return x @ kernel + bias.astype(x.dtype)


def _training_weights(path: str, master: Any) -> Any:
    """The packed matrix of `quant.training`, or None."""
    import jax

    from longlive_jax.quant.policy import QuantPolicy, named
    from longlive_jax.quant.training import QuantizedTraining

    if path == "bf16":
        return None
    ((_, form),) = named("nvfp4_train").rules
    policy = QuantPolicy("one", (("kernel", form),))
    quant = QuantizedTraining(policy, implementation=_implementation(path))
    kernels = quant.prepare({"kernel": master})({"kernel": master}, jax.random.key(0))
    return kernels["kernel"].packed


def _training_product(path: str, x: Any, master: Any, packed: Any, bias: Any, key: Any) -> Any:
    from longlive_jax.quant.policy import named
    from longlive_jax.quant.recipe import ProductConfig, product

    if path == "bf16":
        return x @ master.astype(x.dtype) + bias.astype(x.dtype)
    ((_, form),) = named("nvfp4_train").rules
    config = ProductConfig(form, implementation=_implementation(path))
    return product(config, x, master, packed, bias, key)


def _implementation(path: str) -> Any:
    return "auto" if path == "fp8" else path


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
