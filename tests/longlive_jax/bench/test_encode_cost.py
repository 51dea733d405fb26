"""`longlive bench encode`: the cost of VAE encoding per device."""

import json

import pytest

from longlive_jax.cli.app import run


def test_cost_for_the_5b_model(capsys):
    """A device encodes 209 raw frames with a halo for 96 of its own. The numbers are counted, so
    they do not depend on the machine."""
    assert run(["bench", "encode", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"sp", "size", "tflop_per_latent", "clips"}
    assert report["sp"] == 4 and list(report["clips"]) == ["96", "192", "384"]
    clips = report["clips"].values()
    assert [c["raw_frames"] for c in clips] == [
        {"halo": 209, "tails": 97},
        {"halo": 305, "tails": 193},
        {"halo": 497, "tails": 385},
    ]
    assert report["clips"]["96"]["raw_frames_own"] == 96
    assert report["clips"]["96"]["halo_by_device"]["raw_frames"] == [93, 189, 209, 209]
    for clip in clips:
        assert clip["default"] == "tails" and clip["halo_latents"] == 28
        assert clip["tflop"]["tails"] < clip["tflop"]["halo"] < clip["tflop_whole"]
        assert clip["halo_by_device"]["tflop"][-1] == clip["tflop"]["halo"]


def test_table(capsys):
    assert run(["bench", "encode", "--sp=8", "--frames=8,16", "--size=32x64"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["8", "halo", "29"],
        ["16", "halo", "61"],
        ["16", "tails", "9"],
    ]
    assert rows[0][-1] == rows[2][-1] == "default"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--sp=5", "96 latents do not split over mesh.sp = 5"),
        ("--sp=0", "sp and frames must be >= 1, got 0"),
        ("--size=100x100", "both sides of size must be multiples of 16, got (100, 100)"),
        ("--size=7", "expected 2 values"),
        ("--frames=a", "--frames: expected whole numbers"),
    ],
)
def test_invalid_options_are_rejected(capsys, word, message):
    assert run(["bench", "encode", word]) == 2
    assert message in capsys.readouterr().err
