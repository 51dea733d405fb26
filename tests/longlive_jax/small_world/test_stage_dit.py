"""The small world's own recipe over a mesh, with and without error recycling."""

import json
import shutil

import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint

SETTINGS = (
    "model.dim=32", "model.ffn_dim=32", "model.freq_dim=8", "model.heads=4", "model.layers=2",
    "dtype=float32", "unroll=1", "corpus.videos=8", "corpus.chunks=8", "corpus.shot_chunks=(2,4)",
    "episodes.batch=8", "episodes.targets=3", "episodes.window=3", "held_out_batches=1",
    "loop.steps=20", "loop.log_every=1", "loop.save_every=20", "optim.warmup=2",
)  # fmt: skip
RECYCLED = (
    "recycling.buffer.by=chunk", "recycling.buffer.rows=4", "recycling.buffer.slots=2",
    "recycling.clean=0.3", "recycling.warmup=4",
)  # fmt: skip
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.sp=2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few encoded videos, made by the first run and handed to the others."""
    return tmp_path_factory.mktemp("corpus") / "corpus.npz"


def losses(folder, corpus, *changes):
    folder.mkdir()
    out, workdir = folder / "checkpoint", folder / "work"
    shutil.copytree(builtin_checkpoint(), out)
    workdir.mkdir()
    if corpus.exists():
        shutil.copy(corpus, workdir)
    overrides = [f"--config.{change}" for change in (*SETTINGS, *changes)]
    where = [f"--workdir={workdir}", f"--out={out}"]
    assert run(["train", "--config=configs/small_world.py:ar", *overrides, *where]) == 0
    shutil.copy(workdir / "corpus.npz", corpus)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="plain"),
        pytest.param(RECYCLED, id="recycled", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_on_eight_devices_are_those_of_one(tmp_path, corpus, changes):
    found = [losses(tmp_path / str(len(mesh)), corpus, *changes, *mesh) for mesh in ((), MESH)]
    assert len(found[0]) == 20
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[1][:3] == pytest.approx(found[0][:3], rel=1e-5)
