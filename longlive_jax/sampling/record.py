"""The record of a sampled video: everything needed to sample it again, and to mark it as generated.

    out/video.mp4     its tags `comment` (the record as JSON), `description` (`GENERATED_MARK`),
                      `title` and `encoder`
    out/video.json    the same record, which `longlive sample --script=out/video.json` takes

A record is a JSON object:

    generated     true
    script        shots, seed, size and so on, as in a script file
    settings      every field of `SampleSpec`
    checkpoint    path, and a fingerprint of the weights
    adapters      path, scale, fingerprint, and fingerprint of its base, of each that is plugged in
    versions      of this package, JAX, numpy, PyAV and Python
    device        platform, kind and number of the devices
    command       the arguments of the program
    continues     path and cuts of the video that was continued, or null
    source        path of the script file
    batch         videos sampled together, and the index of this one
    notes         remarks made while sampling
    video         frames, frame rate, size, enlargement, and the frames of each prompt
    interrupted   whether the video ends before its script
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import longlive_jax
from longlive_jax.adapters.branches import Plugged
from longlive_jax.io.builtin import BUILTIN, builtin_checkpoint
from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.sampling.script import Shot, ShotScript
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.spec import UserError

__all__ = ["GENERATED_MARK", "differences", "file_tags", "read_record", "recorded_settings"]
__all__ += ["run_record", "video_record"]

GENERATED_MARK = "AI-generated video (IPTC digital source type: trainedAlgorithmicMedia)"
"""Description of every video file; the term is from IPTC's vocabulary for media by AI."""

NOT_REPEATED = ("vae_device", "kv_reader", "dtype", "vae_dtype")
"""Settings of the machine rather than of the video, which a record does not restore."""

SECTIONS = ("settings", "versions", "device", "checkpoint")
"""Parts of a record that a run is compared with."""

type Record = dict[str, Any]


def run_record(
    spec: SampleSpec,
    checkpoint: Path,
    *,
    command: Sequence[str] = (),
    source: str | None = None,
    continues: Mapping[str, Any] | None = None,
    adapters: Plugged = (),
) -> Record:
    """The part of a record that all videos of a run have in common; see the module's docstring."""
    is_builtin = checkpoint.resolve() == builtin_checkpoint().resolve()
    device = jax.devices()[0]
    return {
        "generated": True,
        "settings": json.loads(json.dumps(dataclasses.asdict(spec))),  # lists for tuples
        "checkpoint": {
            "path": BUILTIN if is_builtin else str(checkpoint.resolve()),
            "fingerprint": weights_fingerprint(checkpoint),
        },
        "adapters": [
            {
                "path": _absolute(adapter.name),
                "scale": scale,
                "fingerprint": adapter.fingerprint,
                "base": adapter.base,
            }
            for adapter, scale in adapters
        ],
        "versions": {
            "longlive_jax": longlive_jax.__version__,
            **{name: version(name) for name in ("jax", "jaxlib", "numpy", "av")},
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "command": list(command),
        "source": source,
        "continues": None if continues is None else dict(continues),
    }


def _absolute(name: str) -> str:
    """The absolute path of an adapter that has been read from one; else its name."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def video_record(
    run: Mapping[str, Any],
    script: ShotScript,
    size: tuple[int, int],
    *,
    notes: Sequence[str] = (),
    batch: int = 1,
    index: int = 0,
) -> Record:
    """The record of one video before it is sampled; `size` is height and width in pixels."""
    values: dict[str, Any] = {
        "shots": [_shot_values(shot) for shot in script.shots],
        "seed": script.seed,
        "size": list(size),
    }
    if script.image is not None:
        values["image"] = str(Path(script.image).resolve())
    if script.negative_prompt is not None:  # an empty one replaces the model's
        values["negative_prompt"] = script.negative_prompt
    if script.name:
        values["name"] = script.name
    return {
        **run,
        "script": values,
        "batch": {"videos": batch, "index": index},
        "notes": list(notes),
    }


def _shot_values(shot: Shot) -> dict[str, Any]:
    """A shot as in a script file."""
    return {name: value for name, value in vars(shot).items() if value is not None}


def file_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a video file: title, encoder, mark, and the record as JSON.

    Videos are passed on, so folders of this machine and the command are left out.
    """
    script = record.get("script", {})
    shots = script.get("shots", [])
    title = script.get("name") or (shots[0]["prompt"] if shots else "video")
    return {
        "title": str(title),
        "encoder": f"longlive-jax {longlive_jax.__version__}",
        "description": GENERATED_MARK,
        "comment": json.dumps(_without_folders(record)),
    }


def _without_folders(record: Mapping[str, Any]) -> Record:
    """A record without the command, and with the names of files instead of their paths."""
    public = {k: v for k, v in record.items() if k != "command"}
    public |= {k: dict(public[k]) for k in ("checkpoint", "script", "continues") if public.get(k)}
    public["adapters"] = [dict(adapter) for adapter in public.get("adapters", ())]
    for holder, name in (
        *((adapter, "path") for adapter in public["adapters"]),
        (public, "source"),
        (public.get("continues") or {}, "path"),
        (public.get("checkpoint", {}), "path"),
        (public.get("script", {}), "image"),
    ):
        if holder.get(name):
            holder[name] = Path(holder[name]).name
    return public


def read_record(path: str | Path) -> Record | None:
    """The record in a file, or None if the file is not one.

    Raises UserError for a record with a section that is not a JSON object.
    """
    path = Path(path)
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return None  # `read_scripts` says what is wrong with it
    is_record = isinstance(values, dict) and values.get("generated") is True and "script" in values
    if not is_record:
        return None
    for name in SECTIONS:
        if not isinstance(values.get(name, {}), dict):
            raise UserError(f"{path}: {name} must be a JSON object, got {values[name]!r:.80}")
    return values


def recorded_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings that a record restores."""
    known = {field.name for field in dataclasses.fields(SampleSpec)} - set(NOT_REPEATED)
    return {k: v for k, v in record.get("settings", {}).items() if k in known}


def _adapters(record: Mapping[str, Any]) -> str:
    """Names, strengths and fingerprints of the adapters of a record."""
    adapters = (x for x in record.get("adapters", ()) if isinstance(x, dict))
    return ", ".join(
        f"{Path(str(x.get('path'))).name}:{x.get('scale')} ({x.get('fingerprint')})"
        for x in adapters
    )


def differences(record: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, ...]:
    """Remarks on what a run does otherwise than the recorded one, if that may change the video."""
    pairs = []
    for group in SECTIONS:
        before, now = record.get(group, {}), run[group]
        pairs += [
            (f"{group[:-1] if group.endswith('s') else group} {name}", before[name], now[name])
            for name in now
            if name in before and before[name] != now[name] and name not in ("path", "count")
        ]
    before, now = (_adapters(x) for x in (record, run))
    if before != now:
        pairs.append(("adapters", before or "none", now or "none"))
    if record.get("continues") != run.get("continues"):
        pairs.append(("continued video", record.get("continues"), run.get("continues")))
    return tuple(f"{name} is {now}, was {before} in the record" for name, before, now in pairs)
