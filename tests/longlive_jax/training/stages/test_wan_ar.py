"""The stage `clips` by the command: meshes, resuming, online encoding, and refused settings."""

import json
import shutil

import jax
import numpy as np
import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import load_component, read_manifest
from longlive_jax.io.completeness import require_components
from longlive_jax.sampling.settings import spec_for
from tests.longlive_jax.training.processes import finish, longlive

SETTINGS = (
    "batch=4", "dtype=float32", "ffn_chunks=2", "loop.log_every=1", "loop.save_every=2",
    "optim.lr=1e-3", "ema.start=1", "save_dtype=float32", "recycling=none",
)  # fmt: skip
RECYCLING = (
    "recycling.buffer.rows=4", "recycling.buffer.buckets=2", "recycling.buffer.slots=2",
    "recycling.buffer.groups=1", "recycling.clean=0.3", "recycling.warmup=1",
)  # fmt: skip
ONE_DEVICE, EIGHT_DEVICES = (f"mesh.data={n},mesh.fsdp={n},mesh.sp={n}" for n in (1, 2))


def command(data_dir, workdir, *changes):
    """Arguments of `longlive train` with the 5B recipe, for the small checkpoint of `data_dir`."""
    paths = (f"checkpoint={data_dir / 'checkpoint'}", f"clips={data_dir / 'encoded'}")
    settings = [setting for change in changes for setting in change.split(",")]
    overrides = [f"--config.{setting}" for setting in (*SETTINGS, *paths, *settings)]
    outputs = [f"--workdir={workdir}", f"--out={workdir}-out"]
    return ["train", "--config=configs/ar_5b.py:16s", *overrides, *outputs]


def records(workdir):
    """Logged records of updates (not of evaluations)."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "loss" in r]


def losses(workdir):
    return [record["loss"] for record in records(workdir)]


def held_out_error(workdir):
    """Velocity error of the last evaluation."""
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return last["held_out_velocity_error"]


def test_training_with_error_recycling_on_eight_devices_equals_one_device(data_dir, tmp_path):
    evaluation = (
        f"held_out={data_dir / 'encoded'}",
        "held_out_batches=1",
        "preview.seconds=0.5",
        "preview.prompts=['a cat runs']",
    )
    settings = (*RECYCLING, *evaluation, "loop.steps=4")
    single, eight = tmp_path / "single", tmp_path / "eight"
    for workdir, mesh in ((single, ONE_DEVICE), (eight, EIGHT_DEVICES)):
        assert run(command(data_dir, workdir, mesh, *settings)) == 0

    # 1. Metrics of updates and evaluation.
    for want, got in zip(records(single), records(eight), strict=True):
        for name in ("loss", "grad_norm", "stored_errors"):
            assert got[name] == pytest.approx(want[name], rel=2e-4), (want, got)
    last = records(single)[-1]
    assert last["stored_errors"] > 4 and last["tokens_per_s"] > 0
    assert held_out_error(eight) == pytest.approx(held_out_error(single), rel=2e-4)
    assert (eight / "sample_000004.png").stat().st_size > 500

    # 2. The export: trained parameters, and their provenance.
    trained, _ = load_component(f"{eight}-out", "dit")
    initial, _ = load_component(data_dir / "checkpoint", "dit")
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, initial)
    assert max(jax.tree.leaves(changes)) > 1e-4
    assert read_manifest(f"{eight}-out")["provenance"]["dit"]["stage"] == "clips"

    # 3. The export is complete, with the settings of an autoregressive model.
    require_components(f"{eight}-out")
    vae = data_dir / "checkpoint" / "vae"
    file = next(path for path in sorted(vae.rglob("*")) if path.is_file())
    assert (tmp_path / "eight-out" / "vae" / file.relative_to(vae)).samefile(file)
    spec = spec_for(f"{eight}-out")
    assert (spec.steps, spec.guidance, spec.solver, spec.shift) == (50, 3.0, "unipc", 5.0)
    assert (spec.size, spec.chunk_frames, spec.fps) == ((64, 32), 2, 24.0)
    assert (spec.window, spec.global_sinks, spec.shot_rope_offset) == (4, 1, 0)


def test_resuming_on_other_meshes_gives_the_same_next_loss(data_dir, tmp_path):
    """Checkpointed on data 2 x sp 4, with error buffers; resumed there, on sp 2 and on 1 device."""
    mesh = "mesh.data=2,mesh.fsdp=1,mesh.sp=4"
    start = tmp_path / "start"
    assert run(command(data_dir, start, mesh, *RECYCLING, "loop.steps=2")) == 0

    # 1. In this process, on the same mesh and on one device.
    last_records, more = {}, (*RECYCLING, "loop.steps=3")
    for name, other in {"same": mesh, "one": ONE_DEVICE}.items():
        workdir = shutil.copytree(start, tmp_path / name)
        assert run(command(data_dir, workdir, other, *more)) == 0
        last_records[name] = records(workdir)[-1]

    # 2. In a process with two devices.
    workdir = shutil.copytree(start, tmp_path / "two")
    process = longlive(
        *command(data_dir, workdir, "mesh.data=1,mesh.fsdp=1,mesh.sp=2", *more), devices=2
    )
    code, output = finish(process, 300)
    assert code == 0, output
    last_records["two"] = records(workdir)[-1]

    # 3. The third step is the same on all meshes.
    for name, record in last_records.items():
        assert record["step"] == 3 and record["stored_errors"] > 4, name
        assert record["loss"] == pytest.approx(last_records["same"]["loss"], rel=1e-5), name


NVFP4 = ("mesh.data=2,mesh.fsdp=4,mesh.sp=1,batch=16", "quant.policy=nvfp4_train", *RECYCLING)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((EIGHT_DEVICES,), id="float32"),
        pytest.param(NVFP4, id="NVFP4, error recycling", marks=pytest.mark.slow),
    ],
)
def test_resumed_with_gradient_accumulation_equals_uninterrupted(data_dir, tmp_path, more):
    settings = ("batch=8", "loop.accumulate=2", *more)
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert run(command(data_dir, uninterrupted, *settings, "loop.steps=4")) == 0
    for steps in (2, 4):
        assert run(command(data_dir, resumed, *settings, f"loop.steps={steps}")) == 0
    assert losses(resumed) == losses(uninterrupted)
    params = (load_component(f"{workdir}-out", "dit")[0] for workdir in (resumed, uninterrupted))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_online_encoding_trains_like_encoded_clips(data_dir, tmp_path):
    """The videos are decoded and encoded while training, on one device or sharded over a mesh."""
    steps = "loop.steps=3"
    assert run(command(data_dir, tmp_path / "encoded", ONE_DEVICE, steps)) == 0
    online = (f"videos={data_dir / 'videos'}", "anywhere=false", steps)
    for name, mesh in {"one": ONE_DEVICE, "eight": EIGHT_DEVICES}.items():
        workdir = tmp_path / name
        assert run(command(data_dir, workdir, mesh, *online)) == 0
        for want, got in zip(records(tmp_path / "encoded"), records(workdir), strict=True):
            for metric in ("loss", "grad_norm"):
                assert got[metric] == pytest.approx(want[metric], rel=2e-4)


def test_clips_that_start_anywhere_in_a_video_resume_as_if_uninterrupted(data_dir, tmp_path):
    # 1. Only text features are encoded beforehand.
    texts = tmp_path / "texts"
    encode = ["data", "encode", f"--source={data_dir / 'videos'}", "--chunks=2", "--texts_only"]
    assert run([*encode, f"--checkpoint={data_dir / 'checkpoint'}", f"--out={texts}"]) == 0
    settings = (ONE_DEVICE, f"videos={data_dir / 'videos'}", f"clips={texts}")

    # 2. Resumed = uninterrupted.
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    assert run(command(data_dir, uninterrupted, *settings, "loop.steps=4")) == 0
    for steps in (2, 4):
        assert run(command(data_dir, resumed, *settings, f"loop.steps={steps}")) == 0
    assert losses(resumed) == losses(uninterrupted)

    # 3. Other losses than with clips at the start of their videos.
    fixed = (*settings, "anywhere=false", "loop.steps=4")
    assert run(command(data_dir, tmp_path / "fixed", *fixed)) == 0
    assert losses(tmp_path / "fixed") != losses(uninterrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mesh.data=1,mesh.fsdp=1,mesh.sp=8", "4 attention heads do not split over mesh.sp = 8"),
        ("mesh.data=8,mesh.fsdp=1,mesh.sp=1", "4 samples in a batch do not split"),
        ("mesh.data=3,mesh.fsdp=1,mesh.sp=1", "needs 3 devices, found 8"),
        ("ffn_chunks=7," + ONE_DEVICE, "ffn_chunks = 7 does not divide the"),
        ("ffn_chunks=0," + ONE_DEVICE, "ffn_chunks must be >= 1, got 0"),
        (
            "window=2," + ONE_DEVICE,
            "window must be >= 3 with 1 global sinks and a shot sink, got 2",
        ),
        ("attention=mosaic," + ONE_DEVICE, "needs 16-bit inputs; set dtype=bfloat16"),
        ("loop.accumulate=3," + ONE_DEVICE, "does not divide by loop.accumulate = 3"),
        ("recycling.buffer.rows=3," + ONE_DEVICE, "do not fill the error buffer's 3 rows evenly"),
        ("clips=/nowhere," + ONE_DEVICE, "no encoded clips"),
        ("videos=/nowhere," + ONE_DEVICE, "/nowhere: no such dataset"),
        ("checkpoint=/nowhere," + ONE_DEVICE, "checkpoint '/nowhere' is not a directory"),
    ],
)
def test_bad_settings_are_refused_before_the_first_step(
    data_dir, tmp_path, capsys, change, message
):
    assert run(command(data_dir, tmp_path / "run", change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/state").exists()


def test_clips_of_another_checkpoints_encoders_are_refused(data_dir, tmp_path, capsys):
    other = shutil.copytree(data_dir / "checkpoint", tmp_path / "checkpoint")
    manifest = json.loads((other / "longlive.json").read_text())
    manifest["components"]["vae"]["latent_mean"][0] = 0.5
    (other / "longlive.json").write_text(json.dumps(manifest))
    changes = (ONE_DEVICE, f"checkpoint={other}")
    assert run(command(data_dir, tmp_path / "run", *changes)) == 2
    assert "encoded by another vae" in capsys.readouterr().err
