"""The stage `ar`: its recipe on a mesh, and the sampler settings that it stores."""

import json
import shutil

import pytest

from longlive_jax.adapters import load_adapter
from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.models.wan import DiTConfig
from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.sampling.settings import save_settings, spec_for
from longlive_jax.small_world import world
from longlive_jax.small_world.stage_dit import DiTStage, SampleDefaults
from longlive_jax.small_world.windows import WindowSpec
from longlive_jax.training.loop import LoopSpec
from longlive_jax.training.objectives.batch import ARLossSpec

SETTINGS = (
    "model.dim=32", "model.ffn_dim=32", "model.freq_dim=8", "model.heads=4", "model.layers=2",
    "dtype=float32", "unroll=1", "corpus.videos=8", "corpus.chunks=8", "corpus.shot_chunks=(2,4)",
    "windows.batch=8", "windows.targets=3", "windows.window=3", "held_out_batches=1",
    "loop.steps=20", "loop.log_every=1", "loop.save_every=20", "optim.warmup=2",
)  # fmt: skip
RECYCLING = (
    "recycling.buffer.by=chunk", "recycling.buffer.rows=4", "recycling.buffer.slots=2",
    "recycling.clean=0.3", "recycling.warmup=4",
)  # fmt: skip
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.sp=2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Path of a few encoded videos, which the first run writes and the others reuse."""
    return tmp_path_factory.mktemp("corpus") / "corpus.npz"


def losses(folder, corpus, *changes, base=None):
    """Runs the stage in a new folder, on a checkpoint, and returns the loss of every step."""
    folder.mkdir()
    out, workdir = folder / "checkpoint", folder / "work"
    shutil.copytree(builtin_checkpoint() if base is None else base, out)
    workdir.mkdir()
    if corpus.exists():
        shutil.copy(corpus, workdir)
    overrides = [f"--config.{change}" for change in (*SETTINGS, *changes)]
    paths = [f"--workdir={workdir}", f"--out={out}"]
    assert run(["train", "--config=configs/small_world.py:ar", *overrides, *paths]) == 0
    shutil.copy(workdir / "corpus.npz", corpus)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="plain"),
        pytest.param(RECYCLING, id="error recycling", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_on_eight_devices_equal_one_device(tmp_path, corpus, changes):
    want = losses(tmp_path / "one", corpus, *changes)
    got = losses(tmp_path / "eight", corpus, *changes, *MESH)
    assert len(want) == 20
    assert got == pytest.approx(want, rel=1e-3)
    assert got[:3] == pytest.approx(want[:3], rel=1e-5)


def test_an_adapter_on_eight_devices_equals_one_and_joins_the_checkpoint(tmp_path, corpus):
    # 1. A model to adapt.
    few = ("loop.steps=1", "recycling=none", "ema.start=1")
    losses(tmp_path / "base", corpus, *few)
    base = tmp_path / "base" / "checkpoint"
    # 2. Adapters for it, on one device and on eight.
    lora = (*few, "loop.steps=3", "start=checkpoint", "lora.rank=4", "optim.lr=1e-2")
    want = losses(tmp_path / "one", corpus, *lora, base=base)
    got = losses(tmp_path / "eight", corpus, *lora, *MESH, base=base)
    assert len(want) == 3 and got == pytest.approx(want, rel=1e-4)
    # 3. The checkpoint has both.
    trained = tmp_path / "eight" / "checkpoint"
    adapter = load_adapter(trained)
    assert adapter.base == weights_fingerprint(base, "dit") == weights_fingerprint(trained, "dit")
    assert adapter.rank == 4 and len(adapter.targets) == 10


def stage(**settings):
    model = DiTConfig(
        dim=32, ffn_dim=32, freq_dim=8, text_dim=8, text_len=16, heads=2, layers=1,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    return DiTStage(model=model, **settings)


def test_sampler_settings_follow_the_windows_and_the_loss(tmp_path):
    """A checkpoint with these settings samples with them by default."""
    settings = stage(
        windows=WindowSpec(window=5, global_sinks=0, shot_rope_offset=12),
        loss=ARLossSpec(shift=3.0),
        sampling=SampleDefaults(solver="euler", steps=6, guidance=1.5),
    ).sample_settings()
    save_settings(tmp_path, settings)
    spec = spec_for(tmp_path)
    assert (spec.size, spec.chunk_frames) == ((world.HEIGHT, world.WIDTH), world.CHUNK_LATENTS)
    assert (spec.window, spec.global_sinks, spec.shot_rope_offset) == (5, 0, 12)
    assert (spec.shift, spec.solver, spec.steps, spec.guidance) == (3.0, "euler", 6, 1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": MeshSpec(sp=4)}, r"2 attention heads do not split over mesh\.sp = 4"),
        ({"mesh": MeshSpec(data=3)}, r"16 samples in a batch do not split over mesh\.data"),
        ({"lora": LoRASpec(rank=4)}, "lora needs start='checkpoint'"),
        ({"loop": LoopSpec(accumulate=3)}, r"batch = 16 does not divide by loop\.accumulate = 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stage(**settings)
