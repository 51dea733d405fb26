"""The table of what encoding costs, from the command line."""

import json

import pytest

from longlive_jax.cli.app import run


def test_costs_of_the_5b_model(capsys):
    """209 raw frames with a halo where 96 would do; counted, so the numbers are the machine's."""
    assert run(["bench", "encode", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
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


def test_a_table(capsys):
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
        ("--sp=0", "give at least 1"),
        ("--size=100x100", "both sides must divide by 16"),
        ("--size=7", "expected 2 values"),
        ("--frames=a", "--frames: expected whole numbers"),
    ],
)
def test_what_cannot_be_counted_is_refused(capsys, word, message):
    assert run(["bench", "encode", word]) == 2
    assert message in capsys.readouterr().err
