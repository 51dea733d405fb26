"""Compiles an FP8 linear for an H200 without a GPU; prints the products' implementations as JSON.

XLA chooses between cuBLASLt and its own kernel by timing both on the chip. Without a chip it uses
its own, so the library is requested in a second compilation.
"""

import json
import re

from longlive_jax.planning import deviceless

deviceless.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from longlive_jax.quant.fp8 import Fp8Kernel  # noqa: E402

OPERANDS = r"= (\w+)\[[\d,]*\]\S* dot\(%(\S+), %(\S+)\)"

if __name__ == "__main__":
    shape = jax.ShapeDtypeStruct
    kernel = Fp8Kernel(shape((3072, 3072), jnp.float8_e4m3fn), shape((3072,), jnp.float32))
    arguments = kernel, shape((7040, 3072), jnp.bfloat16), shape((3072,), jnp.bfloat16)
    products = {}
    for name, own in (("own", True), ("library", False)):
        options = {"xla_gpu_enable_triton_gemm": own}
        compiled = deviceless.compile_for("h200", Fp8Kernel.product, *arguments, options=options)
        text = compiled.as_text()
        calls = re.findall(r'custom_call_target="([^"]+)"', text)
        types = dict(re.findall(r"%(\S+) = (\w+)\[", text))
        dots = [[types[x] for x in operands] for _, *operands in re.findall(OPERANDS, text)]
        products[name] = {"calls": calls, "dots": dots}
    print(json.dumps(products))
