"""A process that reports like `longlive_jax.bench.prove_kernel`, and ends as its name says.

python fake_kernel.py KERNEL BEHAVIOUR FOLDER
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def say(**findings) -> None:
    print("PROVE " + json.dumps(findings), flush=True)


def main(kernel: str, behaviour: str, folder: str) -> int:
    Path(folder, kernel).write_text("began")
    say(phase="canaries")
    if behaviour == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(folder, "child").write_text(str(child.pid))
        time.sleep(600)
    if behaviour == "crash":
        print("CUDA_ERROR_ILLEGAL_ADDRESS", file=sys.stderr, flush=True)
        os.abort()
    say(canaries=["one tile"], phase="numbers")
    if behaviour == "wrong":
        say(failure="production: 3.0e-01 from the oracle, at most 5.0e-03")
        return 1
    say(error=1e-3, tiles={})
    if behaviour == "unequal":
        say(failure="run 7 of 20 on the same input gave other bits")
        return 1
    if behaviour == "vanish":
        Path(folder, "gone").write_text("")
        print("CUDA_ERROR_DEVICE_UNAVAILABLE", file=sys.stderr, flush=True)
        return 7
    say(equal_runs=20, phase="times")
    seconds = 3e-3 if behaviour == "slow" else 1e-3
    say(seconds=seconds, limit_seconds=5e-4, share=5e-4 / seconds)
    peers = {"cudnn": 2e-3, "xla": "needs a CUDA device", "tokamax": 1e-4}
    say(peers=peers, automatic=["cudnn", "xla"])
    say(proven=True, digest=sys.argv[4])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:4]))
