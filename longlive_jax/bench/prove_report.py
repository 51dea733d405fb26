"""The report of `longlive kernels prove`, and what "auto" and the tile sizes take from it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.bench.kernels import RESULTS
from longlive_jax.spec import UserError
from pallas_kernels import tuned

KEPT = ("digest", "tiles", "proven", "faster")
"""What a proof consists of, besides the device and the chip."""


@dataclasses.dataclass
class Report:
    """Rows of a run, written to the results folder, and to where dispatch reads proofs.

    Attributes:
      device: model name of the GPU.
      chip: architecture.
      tune: whether tile sizes were searched for.
      machine: versions and date.
      out: the full report; by default `results/kernels_<device>.json`.
      rows: one row a kernel, in order.
    """

    device: str
    chip: str
    tune: bool = False
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out: Path | None = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Rows of kernels that this run does not touch stay in the default file."""
        findings = self.out is None and self.path.is_file()
        self._earlier: list[dict[str, Any]] = json.loads(self.path.read_text()) if findings else []

    @property
    def path(self) -> Path:
        """Where the full report is."""
        return self.out or RESULTS / f"kernels_{tuned.file_name(self.device)}"

    def check_writable(self) -> None:
        """Raises UserError if a file of the report cannot be written."""
        for path in (self.path, self._proofs, self._tiles):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                raise UserError(f"kernels prove: {path}: {reason.strerror}") from reason
            if not os.access(path.parent, os.W_OK) or path.is_dir():
                raise UserError(f"kernels prove: {path} cannot be written; run it from a checkout")

    @property
    def _proofs(self) -> Path:
        return tuned.PROVEN / tuned.file_name(self.device)

    @property
    def _tiles(self) -> Path:
        return tuned.TUNED / tuned.file_name(self.device)

    def write(self) -> None:
        """Replaces all files, each at once."""
        about = {**self.machine, "device": self.device, "chip": self.chip}
        rows = [
            row
            | {"chip": self.chip, "machine": about}
            | {"executed_on": self.device if row["state"] == "proven" else None}
            for row in self.rows
        ]
        mine = {row["kernel"] for row in rows}
        replace_json(self.path, [x for x in self._earlier if x["kernel"] not in mine] + rows)
        if tested := {x["kernel"]: x for x in self.rows if x["state"] not in UNTESTED}:
            entries = _read(self._proofs)
            for name, row in tested.items():
                proof = {key: row[key] for key in KEPT if key in row}
                entries[name] = proof | {"device": self.device, "chip": self.chip}
            replace_json(self._proofs, entries)
            if self.tune:
                self._write_tiles(tested)
        tuned.forget()

    def _write_tiles(self, tested: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps the tile sizes of proven kernels; an empty entry means the defaults."""
        entries = _read(self._tiles)
        entries |= {name: row["tiles"] for name, row in tested.items() if row["state"] == "proven"}
        replace_json(self._tiles, entries)


UNTESTED = ("not run", "interrupted")
"""States of kernels of which nothing new is known; an earlier proof stays."""


def verdict(findings: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a kernel from what its process reported.

    `state` is "proven", "failed" (laws, wrong numbers, unequal bits, an exception), "hung" or
    "crashed"; `faster` says whether it beat every peer that "auto" could take instead.
    """
    row = dict(findings)
    end, where = row.pop("end", "crashed"), row.pop("phase", "start")
    last, code = row.pop("last", "no message"), row.pop("code", None)
    after, automatic = row.pop("after", None), row.pop("automatic", [])
    row["proven"] = bool(row.get("proven")) and end == "ended"
    row["faster"] = row["proven"] and _faster(row, automatic)
    if row["proven"]:
        return row | {"state": "proven"}
    if end == "hung":
        failure = f"it hung in its {where} and was killed after {after} s"
    elif end == "laws":
        failure = f"static laws: {row['failure']}"
    else:
        failure = row.get("failure") or f"exit code {code} in its {where}: {last}"
    state = end if end == "hung" else "failed" if row.get("failure") else "crashed"
    return row | {"state": state, "failure": failure}


def _faster(row: Mapping[str, Any], automatic: list[str]) -> bool:
    """Whether it is faster than all that "auto" could take; False if none of them was timed."""
    times = [x for name in automatic if isinstance(x := row["peers"].get(name), float)]
    return bool(times) and all(row["seconds"] < x for x in times)


def replace_json(path: Path, content: Any) -> None:
    """Writes a file so that readers see the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
