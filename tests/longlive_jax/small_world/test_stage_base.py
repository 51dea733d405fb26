"""The stage `base`: clips whose chunks all see each other, and AR training that goes on from it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import load_component, read_manifest
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import MeshSpec
from longlive_jax.small_world.clips import ClipBatches, ClipSpec
from longlive_jax.small_world.stage_base import BaseStage
from longlive_jax.small_world.stage_dit import DiTStage
from longlive_jax.small_world.windows import EncodedVideos, WindowSpec
from longlive_jax.small_world.world import CHUNK_LATENTS
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.batch import ARLossSpec, TeacherForcingBatch, draw
from longlive_jax.training.objectives.error_recycling import RecyclingSpec
from longlive_jax.training.objectives.teacher_forcing import predict
from tests.longlive_jax.small_world.test_stage_dit import SETTINGS

MODEL = DiTConfig(
    dim=32, ffn_dim=32, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=2,
    in_channels=4, out_channels=4,
)  # fmt: skip
TOKENS = CHUNK_LATENTS * 4
"""Tokens of a chunk of latents of 4 x 4."""


def videos(count=3, chunks=8):
    rng = np.random.default_rng(0)
    shape = (count, chunks * CHUNK_LATENTS, 4, 4, 4)
    shot = np.arange(chunks) // 3 + np.zeros((count, 1), int)
    return EncodedVideos(
        rng.normal(size=shape).astype(np.float16), rng.integers(5, size=(count, chunks)), shot
    )


def velocities(stage, latents):
    """Velocity [k, m, h, w, c] of every target chunk of one clip, and of one with other latents.

    `latents` is a function of those of the clip.
    """
    batch = stage.batches(videos(), 1, 0)[0]
    batch = TeacherForcingBatch(**{k: jnp.asarray(v[:1]) for k, v in batch.items()})
    graphdef, _ = abstract(lambda: DiT(MODEL, rngs=nnx.Rngs(0)))
    dit = DiT(MODEL, rngs=nnx.Rngs(0))
    kernel = dit.head.linear.kernel
    kernel[...] = jax.random.normal(jax.random.key(9), kernel.shape)
    draws = draw(jax.random.key(1), batch, chunk_frames=CHUNK_LATENTS, spec=stage.loss)
    text = jax.random.normal(jax.random.key(2), (6, 4, 8))
    setup = stage._setup(graphdef, 5, TOKENS)
    for target in (batch.target, latents(batch.target)):
        yield predict(setup, dit, batch.replace(target=target), draws, text).reshape(
            -1, CHUNK_LATENTS, 4, 4, 4
        )


def changed(stage, latents):
    """Whether each target chunk's velocity changes with the latents."""
    before, after = velocities(stage, latents)
    return [bool(jnp.abs(x - y).max() > 1e-4) for x, y in zip(before, after, strict=True)]


def test_the_last_chunk_is_seen_by_the_first_and_the_first_by_the_last():
    stage = BaseStage(model=MODEL, windows=ClipSpec(batch=1, chunks=4))
    assert changed(stage, lambda x: x.at[:, -1].add(1.0)) == [True] * 4
    assert changed(stage, lambda x: x.at[:, 0].add(1.0)) == [True] * 4


def test_windows_of_the_ar_stage_do_not_see_other_noisy_chunks():
    stage = DiTStage(model=MODEL, windows=WindowSpec(batch=1, targets=3, window=4))
    assert changed(stage, lambda x: x.at[:, -1].add(1.0)) == [False, False, False, True]


def test_clips_begin_with_the_video_and_have_the_prompt_of_every_chunk():
    corpus = videos()
    batch = ClipBatches(corpus, ClipSpec(batch=6, chunks=5), 3, 7)[2]
    assert batch["target"].shape == (6, 5 * CHUNK_LATENTS, 4, 4, 4)
    assert batch["context"].shape[1] == 0 and not batch["chunk_index"].any()
    for target, prompt, start in zip(batch["target"], batch["prompt"], batch["start"], strict=True):
        video = int(np.argmin(np.abs(corpus.latents[:, 0] - target[0]).sum((1, 2, 3))))
        assert (target == corpus.latents[video, : len(target)]).all()
        assert (prompt == corpus.prompt[video, :5]).all()
        assert start.tolist() == [0, 4, 8, 20, 24]  # a cut before chunk 3 adds 8 latent frames


def test_clips_may_begin_inside_a_video():
    batches = ClipBatches(videos(), ClipSpec(batch=32, chunks=5, inside=1.0), 2, 0)
    starts = {tuple(row) for row in batches[0]["start"]}
    assert len(starts) > 1 and {row[0] for row in starts} == {0}
    again = ClipBatches(videos(), ClipSpec(batch=32, chunks=5, inside=1.0), 2, 0)[0]
    assert all((batches[0][k] == again[k]).all() for k in again)


def test_noise_levels_are_equal_within_a_clip_as_often_as_set():
    stage = BaseStage(model=MODEL, windows=ClipSpec(batch=200, chunks=3))
    arrays = stage.batches(videos(), 1, 0)[0]
    batch = TeacherForcingBatch(**{k: jnp.asarray(v) for k, v in arrays.items()})
    shares = {}
    for share in (0.0, 0.5, 1.0):
        spec = ARLossSpec(one_level=share)
        sigma = draw(jax.random.key(0), batch, chunk_frames=CHUNK_LATENTS, spec=spec).sigma
        shares[share] = float(jnp.mean(sigma.max(1) == sigma.min(1)))
    assert shares[0.0] < 0.05 and shares[1.0] == 1 and shares[0.5] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": MeshSpec(sp=2)}, "mesh must be of 1 device in this stage, got 2"),
        ({"mesh": MeshSpec(data=2, fsdp=2)}, "mesh must be of 1 device in this stage, got 4"),
        ({"recycling": RecyclingSpec()}, "recycling needs context"),
        ({"loss": ARLossSpec(image_to_video=True)}, "image_to_video must be False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BaseStage(model=MODEL, windows=ClipSpec(batch=8, chunks=4), **settings)


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"chunks must be <= corpus\.chunks = 8, got 9"):
        ClipBatches(videos(), ClipSpec(chunks=9), 1, 0)
    with pytest.raises(ValueError, match="inside must be between 0 and 1"):
        ClipSpec(inside=2.0)


CLIPS = ("windows.batch=8", "windows.chunks=4")
COMMON = [x for x in SETTINGS if not x.startswith(("windows.", "loop."))]


def train(stage, out, workdir, *changes):
    """Runs a stage for 4 steps; the loss of each."""
    loop = ("loop.steps=4", "loop.log_every=1", "loop.save_every=2")
    overrides = [f"--config.{change}" for change in (*COMMON, *loop, *changes)]
    paths = [f"--workdir={workdir}", f"--out={out}"]
    assert run(["train", f"--config=configs/small_world.py:{stage}", *overrides, *paths]) == 0
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r]


def test_it_trains_resumes_and_exports_a_model_that_ar_training_starts_from(tmp_path):
    # 1. The stage.
    out, workdir = shutil.copytree(builtin_checkpoint(), tmp_path / "model"), tmp_path / "base.run"
    want = train("base", out, workdir, *CLIPS)
    assert len(want) == 4

    # 2. Without its last checkpoint, the run resumes from the one before.
    trained, _ = load_component(out, "dit")
    (last,) = (workdir / "state").glob("*4")
    shutil.rmtree(last)
    assert train("base", out, workdir, *CLIPS) == want
    jax.tree.map(np.testing.assert_array_equal, trained, load_component(out, "dit")[0])

    # 3. AR training from it.
    windows = ("windows.batch=8", "windows.targets=3", "windows.window=3")
    (tmp_path / "ar.run").mkdir()
    shutil.copy(workdir / "corpus.npz", tmp_path / "ar.run")
    train("ar_from_base", out, tmp_path / "ar.run", *windows)
    provenance = read_manifest(out)["provenance"]["dit"]
    assert provenance["stage"] == "ar" and provenance["continues"]["stage"] == "base"
