"""Checks of what callers give: scripts, seeds, outputs, text features, latents."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.models.wan import DiTConfig
from longlive_jax.sampling.dispatch import Output
from longlive_jax.sampling.script import Shot, ShotScript, excerpt
from longlive_jax.spec import UserError, nearest
from longlive_jax.typing import Array, Float

type Scripts = str | ShotScript | Sequence[str] | Sequence[ShotScript]

SCRIPT_SUFFIXES = (".yaml", ".yml", ".json", ".txt")
"""Endings of script files."""

DEFAULT_SECONDS = 4.0
"""Duration of a shot that is given as a string."""


def as_scripts(
    scripts: Scripts,
    *,
    seconds: float | None = None,
    chunks: int | None = None,
    seed: int | None = None,
) -> list[ShotScript]:
    """A batch of scripts.

    Args:
      scripts: a script, a list of scripts (a batch), a prompt (one shot), or a list of prompts (one
        video with a shot per prompt and cuts between them).
      seconds: duration of each shot given as a prompt; 4 s if neither is given.
      chunks: the same in chunks.
      seed: seed in place of the scripts' own; video i of a batch gets `seed + i`.

    Raises TypeError for other values and mixed lists, UserError for invalid ones.
    """
    # 1. Prompts.
    given = [scripts] if isinstance(scripts, str | ShotScript) else scripts
    if isinstance(given, bytes | Mapping) or not isinstance(given, Sequence):
        raise TypeError(
            "scripts must be a prompt, a list of prompts, a ShotScript or a list of them, got "
            f"{type(scripts).__name__}"
        )
    if not given:
        raise UserError("scripts is empty; give at least one prompt or ShotScript")
    kinds = {_kind(value) for value in given}
    if len(kinds) > 1:
        raise TypeError("scripts mixes prompts and ShotScripts; give either (a video or a batch)")
    batch: list[Any] = list(given)
    if kinds == {str}:
        for prompt in batch:
            _reject_path(prompt)
        seconds = DEFAULT_SECONDS if seconds is None and chunks is None else seconds
        batch = [ShotScript(tuple(Shot(prompt, seconds, chunks) for prompt in batch))]
    elif seconds is not None or chunks is not None:
        raise UserError("seconds and chunks belong to prompts; a ShotScript has its own durations")
    # 2. Seeds.
    return batch if seed is None else with_seed(batch, seed)


def with_seed(scripts: Sequence[ShotScript], seed: int) -> list[ShotScript]:
    """The scripts with the seeds `seed`, `seed + 1`, and so on, modulo 2**32.

    Raises TypeError or UserError for a seed that is not a whole number in range.
    """
    first = checked_seed(seed)
    return [
        dataclasses.replace(script, seed=(first + i) % 2**32) for i, script in enumerate(scripts)
    ]


def _kind(value: Any) -> type:
    for kind in (str, ShotScript):
        if isinstance(value, kind):
            return kind
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        raise TypeError(
            "scripts holds a list; a list of prompts is one video, several videos are a list of "
            "ShotScript.of(...)"
        )
    raise TypeError(
        f"scripts must hold prompts (strings) or ShotScripts, got {type(value).__name__}"
    )


def _reject_path(prompt: str) -> None:
    """UserError if a prompt is the path of a script: a single word that ends like one."""
    if len(prompt.split()) == 1 and prompt.lower().endswith(SCRIPT_SUFFIXES):
        raise UserError(
            f"{excerpt(prompt)!r} is a path, not a prompt; read it with ShotScript.read or "
            "read_scripts"
        )


def checked_seed(seed: Any) -> int:
    """The seed as an int. Raises TypeError or UserError unless it is a whole number in range."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be a whole number in [0, 2**32), got {seed!r:.80}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), got {seed}")
    return int(seed)


def check_output(output: Any) -> None:
    """UserError unless `output` is a kind of output."""
    if output not in get_args(Output):
        kinds = ", ".join(map(repr, get_args(Output)))
        raise UserError(f"output must be one of {kinds}, got {output!r:.80}")


def check_callback(callback: Any) -> None:
    """TypeError unless `callback` is a function or None."""
    if callback is not None and not isinstance(callback, Callable):  # type: ignore[arg-type]
        raise TypeError(f"callback must be a function of a Progress, got {callback!r:.80}")


def check_flag(name: str, value: Any) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def checked_features(features: Any, cfg: DiTConfig) -> dict[str, Float[Array, "t e"]]:
    """Text features by prompt, padded with zeros to the length of the text encoder.

    Raises TypeError for anything but a mapping from prompts to arrays, UserError for arrays of
    another width, too many tokens, and values that are not finite.
    """
    if not isinstance(features, Mapping):
        raise TypeError(f"features must map prompts to arrays, got {type(features).__name__}")
    checked = {}
    for prompt, value in features.items():
        if not isinstance(prompt, str) or not hasattr(value, "shape"):
            raise TypeError(
                f"features must map prompts to arrays, got {prompt!r:.60}: {value!r:.60}"
            )
        array = jnp.asarray(value)
        length = array.shape[0] if array.ndim else 0
        if array.ndim != 2 or array.shape[1] != cfg.text_dim or not 0 < length <= cfg.text_len:
            raise UserError(
                f"features of {excerpt(prompt)!r} have shape {array.shape}; expected "
                f"[{cfg.text_len} tokens at most, {cfg.text_dim}]"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating) or not bool(jnp.isfinite(array).all()):
            raise UserError(
                f"features of {excerpt(prompt)!r} must be finite floats, got {array.dtype}"
            )
        checked[prompt] = jnp.pad(array, ((0, cfg.text_len - length), (0, 0)))
    return checked


def checked_latents(latents: Any, channels: int) -> np.ndarray:
    """Latents `[b, f, h, w, c]` as float32 on the host, with the axis of videos added if missing.

    Raises TypeError for what is not an array, UserError for another rank, channels or values.
    """
    if not hasattr(latents, "shape") or not hasattr(latents, "dtype"):
        raise TypeError(f"latents must be an array [b, f, h, w, c], got {type(latents).__name__}")
    array = np.asarray(latents)
    array = array[None] if array.ndim == 4 else array
    if array.ndim != 5 or array.shape[-1] != channels or 0 in array.shape:
        raise UserError(
            f"latents have shape {tuple(latents.shape)}; expected [b, f, h, w, {channels}]"
        )
    if array.dtype.kind not in "fV":  # bfloat16 is a kind of its own to NumPy
        raise UserError(f"latents have dtype {array.dtype}; give float32")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError("latents are not finite; the sampler that made them has diverged")
    return array


def find_device(device: Any) -> jax.Device | None:
    """A device, given itself or by its index; None for JAX's default device.

    Raises TypeError for other values, UserError for an index without a device.
    """
    if device is None or isinstance(device, jax.Device):
        return device
    if isinstance(device, bool) or not isinstance(device, int):
        raise TypeError(f"device must be a jax.Device or its index, got {device!r:.80}")
    devices = jax.devices()
    if not 0 <= device < len(devices):
        raise UserError(f"device must be in [0, {len(devices) - 1}], got {device}")
    return devices[device]


def reject_arguments(given: Iterable[str], known: Iterable[str], named: Iterable[str]) -> None:
    """TypeError for the first of `given` that is not in `known`; suggests one of `named`."""
    for name in given:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}{nearest(name, named)}")
