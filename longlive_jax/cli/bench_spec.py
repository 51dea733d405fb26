"""What the benchmarks share: options from a spec, and where the report goes."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import build

FLAGS = {"chunk_frames": "--chunk"}
"""Options of the command line whose names are not their settings'."""

type Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark whose options are the fields of a spec.

    Attributes:
      name: after `longlive bench`.
      about: what `--help` says.
      spec: dataclass of its settings.
      options: what each of them is, by its name.
      run: spec -> report, ready for JSON.
      show: prints a report for people.
      defaults: settings in the place of the spec's own.
    """

    name: str
    about: str
    spec: type
    options: Mapping[str, str]
    run: Callable[[Any], Report]
    show: Callable[[Report], None]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def main(self, argv: Sequence[str]) -> int:
        """Runs it on a command line's settings; 0."""
        parser = Parser(f"bench {self.name}", self.about)
        for field in dataclasses.fields(self.spec):
            flag = FLAGS.get(field.name, f"--{field.name}")
            help_ = self.options[field.name]
            parser.add_argument(flag, dest=field.name, type=field.type, help=help_)
        add_report_options(parser)
        args = parser.parse_args(argv)
        given = {k: v for k, v in vars(args).items() if k in self.options and v is not None}
        spec: Any = build(self.spec, {**self.defaults, **given}, path="bench")
        check_report_options(args)
        deliver(self.run(spec), args, self.show)
        return 0


def add_report_options(parser: Parser) -> None:
    """`--json` and `--out`."""
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--out", type=Path, help="also write the JSON here")


def check_report_options(args: Any) -> None:
    """UserError if `--out` cannot be written, before anything is measured."""
    if args.out is not None:
        from longlive_jax.io.video import check_writable

        check_writable(args.out.parent)


def deliver(report: Report, args: Any, show: Callable[[Report], None]) -> None:
    """Prints a report, as JSON if that was asked for, and writes it to `--out`."""
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        show(report)


def rate(per_second: float, unit: str = "FLOP/s") -> str:
    """In the largest unit that leaves a number above one."""
    for letter, size in (("T", 1e12), ("G", 1e9)):
        if per_second >= size:
            return f"{per_second / size:.3g} {letter}{unit}"
    return f"{per_second / 1e6:.3g} M{unit}"
