"""`python -m longlive_jax <verb>` is equivalent to `longlive <verb>`."""

import sys

from longlive_jax.cli.app import run

if __name__ == "__main__":
    sys.exit(run())
