"""Compiles attention to packed keys for Blackwell and prints the compilers' report as JSON.

    python tests/pallas_kernels/compile_packed.py 128 offset|plain

It runs as a separate process: Mosaic compiles for one chip per process, and settings are read when
JAX is imported.
"""

import json
import sys

from tests.pallas_kernels import deviceless

DUMP = deviceless.prepare()

from pallas_kernels.attention.mosaic import packed_op  # noqa: E402

if __name__ == "__main__":
    _, _, patterns = packed_op.CATALOG["attention_packed"]
    run, arguments = packed_op.example_call(int(sys.argv[1]), offset=sys.argv[2] == "offset")
    deviceless.compile_for("gb200", run, *arguments)
    print(json.dumps(deviceless.inspect(DUMP, *patterns)))
