"""Sampling settings: a checkpoint's own, those of earlier versions, and wrong ones."""

import json

import pytest

from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.sampling.settings import RENAMED_SETTINGS, spec_for
from longlive_jax.spec import UserError


def sampling_of(folder):
    return json.loads((folder / "longlive.json").read_text())["sampling"]


def test_settings_under_their_old_names_are_read(tiny_checkpoint, tmp_path):
    manifest = json.loads((tiny_checkpoint / "longlive.json").read_text())
    manifest["sampling"] = {"size": [64, 32], "chunk": 3, "rope_offset": 5}
    (tmp_path / "longlive.json").write_text(json.dumps(manifest))
    spec = spec_for(tmp_path)
    assert (spec.chunk_frames, spec.shot_rope_offset) == (3, 5)
    assert spec_for(tmp_path, {"chunk_frames": 2}).chunk_frames == 2
    with pytest.raises(UserError, match="unknown key 'chunk'"):
        spec_for(tmp_path, {"chunk": 2})


def test_the_built_in_checkpoint_has_old_names_and_loads():
    folder = builtin_checkpoint()
    settings, spec = sampling_of(folder), spec_for(folder)
    assert RENAMED_SETTINGS.keys() & settings.keys()
    for name, value in settings.items():
        loaded = getattr(spec, RENAMED_SETTINGS.get(name, name))
        assert (list(loaded) if isinstance(loaded, tuple) else loaded) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"window": 2}, "window must be >= 3 "),
        ({"dtype": "float8"}, "not one of"),
        ({"vae_device": 99}, "devices 0 to"),
        ({"levels": (0.9, 0.5, 0.1)}, "levels must be 2 numbers, one per step, got 3; levels=None"),
        ({"levels": (0.5, 0.9)}, "levels must descend"),
        ({"levels": (0.9, 0.0)}, r"levels must be in \(0, 1\]"),
        ({"levels": 0.5}, "expected a list"),
    ],
)
def test_wrong_settings(tiny_checkpoint, settings, message):
    with pytest.raises(UserError, match=message):
        spec_for(tiny_checkpoint, settings)


def test_levels_hold_until_steps_or_shift_change(tiny_checkpoint, tmp_path):
    manifest = json.loads((tiny_checkpoint / "longlive.json").read_text())
    manifest["sampling"] |= {"levels": [1.0, 0.5]}
    (tmp_path / "longlive.json").write_text(json.dumps(manifest))
    assert spec_for(tmp_path).levels == (1.0, 0.5)
    assert spec_for(tmp_path, {"steps": 2, "shift": 5.0}).levels == (1.0, 0.5)
    assert spec_for(tmp_path, {"steps": 3}).levels is None
    assert spec_for(tmp_path, {"shift": 3.0}).levels is None
    assert spec_for(tmp_path, {"steps": 1, "levels": (0.7,)}).levels == (0.7,)
