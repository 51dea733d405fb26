"""Every example runs, with few steps, and writes what it says."""

import json
import runpy
import sys

import av
import chex
import matplotlib
import pytest

from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import load_component


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def example(repository, folder, monkeypatch):
    """A function that runs a program of examples/ with arguments."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(repository / "examples" / name), run_name="__main__")

    return run


def frames_of(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_sample(example, folder):
    example("sample.py", 1, "a.mp4")
    assert frames_of(folder / "a.mp4") == 141  # nine chunks of sixteen frames, the first of 13


def test_steer(example, folder, capsys):
    example("steer.py", 1, "a.mp4")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chunk")]
    assert "moves right" in lines[5] and "yellow cross" in lines[8] and len(lines) == 9
    assert frames_of(folder / "a.mp4") == 141


def test_batch(example, folder):
    example("batch.py", 1, "videos")
    lengths = {p.stem: frames_of(p) for p in (folder / "videos").glob("*.mp4")}
    assert lengths == {"left": 45, "up": 45, "two_shots": 93}


def test_convert(example, folder, capsys):
    example("convert.py")
    assert "sde with 32 steps" in capsys.readouterr().out  # the settings of the built-in model
    assert frames_of(folder / "out" / "converted.mp4") == 29
    for name in ("dit", "vae", "umt5"):  # nothing is lost on the way there and back
        (theirs, _), (ours, _) = (
            load_component(path, name) for path in (builtin_checkpoint(), folder / "out/converted")
        )
        chex.assert_trees_all_equal(theirs, ours)


def test_own_clips(example, folder):
    example("own_clips.py", 1)
    assert len(list((folder / "out" / "own_clips" / "clips").glob("*.mp4"))) == 8
    assert frames_of(folder / "out" / "own_clips" / "video.mp4") == 45


def test_the_notebook(repository, folder):
    """Its code cells run in order; a cell with the tag "parameters" is overridden."""
    notebook = json.loads((repository / "examples" / "first_video.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    matplotlib.use("Agg")
    names: dict = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names["steps"] = 1
    assert names["frames"].shape[0] == 1 and frames_of(folder / "first_video.mp4") == 93


def test_all_examples_are_tested(repository):
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    programs = {path.stem for path in (repository / "examples").glob("*.py")}
    assert programs <= tested
