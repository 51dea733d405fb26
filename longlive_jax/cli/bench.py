"""`longlive bench NAME [options]`: speed and memory by stage.

`longlive bench NAME --help` lists the options of a benchmark.
"""

import argparse
from collections.abc import Sequence

from longlive_jax.cli.app import Parser
from longlive_jax.cli.benchmarks import BENCHMARKS
from longlive_jax.spec import UserError, nearest


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that the command line names; UserError if it names none."""
    words = list(argv)
    name = next((word for word in words if word in BENCHMARKS), None)
    if name is not None:
        words.remove(name)
        return BENCHMARKS[name].main(words)
    args, _ = _parser().parse_known_args(words)
    raise UserError(f"bench: unknown benchmark {args.what!r}{nearest(args.what, BENCHMARKS)}")


def _parser() -> Parser:
    """The parser of `longlive bench --help`, which lists all benchmarks."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {x.name:<{width}}  {x.summary}" for x in BENCHMARKS.values()]
    parser = Parser(
        "bench",
        "\n".join([__doc__ or "", "benchmarks:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", help=", ".join(BENCHMARKS))
    return parser
