"""From video files to a model: encoded, trained on a mesh, resumed; bad settings before that."""

import json
import shutil

import jax
import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import load_component, read_manifest
from tests.longlive_jax.training.processes import ended, longlive

SETTINGS = (
    "batch=4", "dtype=float32", "ffn_chunks=2", "loop.log_every=1", "loop.save_every=2",
    "optim.lr=1e-3", "ema.start=1", "save_dtype=float32", "recycling=none",
)  # fmt: skip
RECYCLED = (
    "recycling.buffer.rows=4", "recycling.buffer.buckets=2", "recycling.buffer.slots=2",
    "recycling.buffer.groups=1", "recycling.clean=0.3", "recycling.warmup=1",
)  # fmt: skip
ALONE, SHARED = (f"mesh.data={n},mesh.fsdp={n},mesh.sp={n}" for n in (1, 2))


def command(places, workdir, *changes):
    """`longlive train` with the 5B recipe on a model of its kind."""
    paths = (f"checkpoint={places / 'checkpoint'}", f"clips={places / 'encoded'}")
    words = [word for change in changes for word in change.split(",")]
    overrides = [f"--config.{word}" for word in (*SETTINGS, *paths, *words)]
    where = [f"--workdir={workdir}", f"--out={workdir}-out"]
    return ["train", "--config=configs/ar_5b.py:16s", *overrides, *where]


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def held_out(workdir):
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return last["held_out_velocity_error"]


def test_a_mesh_of_eight_trains_as_one_device_does_with_error_recycling(places, tmp_path):
    found = []
    measured = (f"held_out={places / 'encoded'}", "held_out_batches=1", "preview.seconds=0.5")
    looks = (*measured, "preview.prompts=['a cat runs']")
    for mesh in (ALONE, SHARED):
        workdir = tmp_path / mesh[-1]
        assert run(command(places, workdir, mesh, *RECYCLED, *looks, "loop.steps=4")) == 0
        found.append(records(workdir))
    for alone, shared in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "errors_held"):
            assert shared[name] == pytest.approx(alone[name], rel=2e-4), (alone, shared)
    assert found[0][-1]["errors_held"] > 4 and found[0][-1]["tokens_per_s"] > 0
    assert held_out(tmp_path / "2") == pytest.approx(held_out(tmp_path / "1"), rel=2e-4)
    assert (tmp_path / "2/sample_000004.png").stat().st_size > 500
    trained, _ = load_component(tmp_path / "2-out", "dit")
    begun, _ = load_component(places / "checkpoint", "dit")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, begun)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert read_manifest(tmp_path / "2-out")["provenance"]["dit"]["stage"] == "clips"


def test_restart_on_other_meshes_gives_the_same_next_loss(places, tmp_path):
    """Saved on data 2, sp 4, error buffers included; gone on with there, on sp 2 and on one."""
    first = ("mesh.data=2,mesh.fsdp=1,mesh.sp=4", *RECYCLED)
    assert run(command(places, tmp_path / "first", *first, "loop.steps=2")) == 0
    found = {}
    for name, mesh in {"same": first[0], "one": ALONE}.items():
        shutil.copytree(tmp_path / "first", tmp_path / name)
        assert run(command(places, tmp_path / name, mesh, *RECYCLED, "loop.steps=3")) == 0
        found[name] = records(tmp_path / name)[-1]
    shutil.copytree(tmp_path / "first", tmp_path / "two")
    two = ("mesh.data=1,mesh.fsdp=1,mesh.sp=2", *RECYCLED, "loop.steps=3")
    code, output = ended(longlive(*command(places, tmp_path / "two", *two), devices=2), 300)
    assert code == 0, output
    found["two"] = records(tmp_path / "two")[-1]
    for name, record in found.items():
        assert record["step"] == 3 and record["errors_held"] > 4, name
        assert record["loss"] == pytest.approx(found["same"]["loss"], rel=1e-5), name


NVFP4 = ("mesh.data=2,mesh.fsdp=4,mesh.sp=1,batch=16", "quant.policy=nvfp4_train", *RECYCLED)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((SHARED,), id="float32"),
        pytest.param(NVFP4, id="NVFP4, recycled", marks=pytest.mark.slow),
    ],
)
def test_accumulated_and_resumed_equals_uninterrupted(places, tmp_path, more):
    parts = ("batch=8", "loop.accumulate=2", *more)
    assert run(command(places, tmp_path / "whole", *parts, "loop.steps=4")) == 0
    for steps in (2, 4):
        assert run(command(places, tmp_path / "parts", *parts, f"loop.steps={steps}")) == 0
    whole, resumed = (records(tmp_path / name) for name in ("whole", "parts"))
    assert [r["loss"] for r in whole] == [r["loss"] for r in resumed]
    whole, resumed = (load_component(tmp_path / f"{n}-out", "dit")[0] for n in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_videos_train_as_their_encoded_clips_do(places, tmp_path):
    """Decoded and encoded on the way, on one device or shared out over a mesh."""
    steps = "loop.steps=3"
    assert run(command(places, tmp_path / "stored", ALONE, steps)) == 0
    want = records(tmp_path / "stored")
    live = (f"videos={places / 'videos'}", "anywhere=false", steps)
    for mesh in (ALONE, SHARED):
        workdir = tmp_path / mesh[-1]
        assert run(command(places, workdir, mesh, *live)) == 0
        for stored, found in zip(want, records(workdir), strict=True):
            for name in ("loss", "grad_norm"):
                assert found[name] == pytest.approx(stored[name], rel=2e-4)


def test_videos_begin_anywhere_and_resume(places, tmp_path):
    texts = tmp_path / "texts"
    encode = ["data", "encode", f"--source={places / 'videos'}", "--chunks=2", "--texts_only"]
    assert run([*encode, f"--checkpoint={places / 'checkpoint'}", f"--out={texts}"]) == 0
    more = (ALONE, f"videos={places / 'videos'}", f"clips={texts}")
    assert run(command(places, tmp_path / "whole", *more, "loop.steps=4")) == 0
    for steps in (2, 4):
        assert run(command(places, tmp_path / "parts", *more, f"loop.steps={steps}")) == 0
    whole, resumed = (records(tmp_path / name) for name in ("whole", "parts"))
    assert [r["loss"] for r in whole] == [r["loss"] for r in resumed]
    fixed = (*more, "anywhere=false", "loop.steps=4")
    assert run(command(places, tmp_path / "fixed", *fixed)) == 0
    assert [r["loss"] for r in records(tmp_path / "fixed")] != [r["loss"] for r in whole]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mesh.data=1,mesh.fsdp=1,mesh.sp=8", "4 attention heads do not split over mesh.sp = 8"),
        ("mesh.data=8,mesh.fsdp=1,mesh.sp=1", "4 samples in a batch do not split"),
        ("mesh.data=3,mesh.fsdp=1,mesh.sp=1", "needs 3 devices and there are 8"),
        ("ffn_chunks=7," + ALONE, "ffn_chunks = 7 does not divide the"),
        ("ffn_chunks=0," + ALONE, "ffn_chunks must be >= 1, got 0"),
        ("window=2," + ALONE, "window must be >= 3 with 1 global sinks and a shot sink, got 2"),
        ("attention=mosaic," + ALONE, "needs 16-bit inputs; set dtype=bfloat16"),
        ("loop.accumulate=3," + ALONE, "does not divide by loop.accumulate = 3"),
        ("recycling.buffer.rows=3," + ALONE, "do not fill the error buffer's 3 rows evenly"),
        ("clips=/nowhere," + ALONE, "no encoded clips"),
        ("videos=/nowhere," + ALONE, "/nowhere: no such dataset"),
        ("checkpoint=/nowhere," + ALONE, "no such checkpoint directory"),
    ],
)
def test_bad_settings_are_said_before_anything_is_computed(
    places, tmp_path, capsys, change, message
):
    assert run(command(places, tmp_path / "run", change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/state").exists()


def test_clips_of_other_encoders_are_refused(places, tmp_path, capsys):
    other = tmp_path / "checkpoint"
    shutil.copytree(places / "checkpoint", other)
    manifest = json.loads((other / "longlive.json").read_text())
    manifest["components"]["vae"]["latent_mean"][0] = 0.5
    (other / "longlive.json").write_text(json.dumps(manifest))
    changes = (ALONE, f"checkpoint={other}")
    assert run(command(places, tmp_path / "run", *changes)) == 2
    assert "encoded by another vae" in capsys.readouterr().err
