"""Teacher-forcing batches of clips: their layout, and that the loss accepts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.data.clips.batches import batch_from_clip, collate
from longlive_jax.data.clips.latents import ClipLatents
from longlive_jax.layout import teacher_forcing
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.training.objectives.batch import (
    ARLossSpec,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.teacher_forcing import (
    ARSetup,
    sequence_tokens,
    teacher_forcing_loss,
)
from pallas_kernels.tokens import EMPTY, visible
from tests.longlive_jax.data.clips.models import random_params

CFG = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=4, heads=2, layers=1,
    in_channels=3, out_channels=3,
)  # fmt: skip
CHUNKS, CHUNK_FRAMES = 4, 2


def clip(seed, prompts=(0, 1, 1, 2), cut=(False, True, False, True)):
    rng = np.random.default_rng(seed)
    return ClipLatents(
        latents=rng.standard_normal((CHUNKS * CHUNK_FRAMES, 4, 4, 3)).astype(np.float16),
        mask=np.array([1] * 6 + [0] * 2, np.float32),
        cut=np.array(cut),
        shot=np.cumsum(cut).astype(np.int32),
        prompt=np.array(prompts, np.int32),
        text_features=rng.standard_normal((max(prompts) + 1, 4, 8)).astype(np.float32),
    )


def stacked_rows(*clips, num_prompts=3):
    rows = [clip.row(num_prompts) for clip in clips]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


EMPTY_TEXT_FEATURES = np.full((4, 8), 0.5, np.float32)


def test_layout_is_all_clean_chunks_then_all_noisy_chunks():
    single = batch_from_clip(clip(0))
    assert single["chunk_index"].tolist() == [0, 1, 2, 3] * 2
    assert single["start"].tolist() == [0, 2, 4, 6] * 2
    assert single["prompt"].tolist() == [0, 1, 1, 2] * 2
    assert not single["window_start"].any() and (single["sink"] == EMPTY).all()
    np.testing.assert_array_equal(single["context"], single["target"])
    batch = TeacherForcingBatch(**collate(stacked_rows(clip(0)), EMPTY_TEXT_FEATURES)[0])
    tokens = sequence_tokens(batch, CHUNK_FRAMES, global_sinks=0)
    expected = teacher_forcing(CHUNKS * CHUNK_FRAMES, 2, 2, chunk_frames=CHUNK_FRAMES)
    np.testing.assert_array_equal(visible(tokens, tokens)[0], visible(expected, expected))
    np.testing.assert_array_equal(tokens.pos[0], expected.pos)


def test_shot_rope_offset_and_window_are_optional():
    single = batch_from_clip(clip(0), shot_rope_offset=8, window=3, global_sinks=1)
    assert single["start"].tolist() == [0, 10, 12, 22] * 2
    assert single["window_start"].tolist() == [0, 0, 1, 2] * 2 or single["window_start"].max() > 0
    assert (single["sink"] >= EMPTY).all() and (single["sink"] > EMPTY).any()


def test_rows_are_padded_and_too_many_prompts_are_rejected():
    row = clip(0).row(5)
    assert row["text_features"].shape == (5, 4, 8) and not row["text_features"][3:].any()
    with pytest.raises(ValueError, match="prompts per clip must be <= 2, got 3"):
        clip(0).row(2)


@pytest.fixture(scope="module")
def loss():
    graphdef, _ = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))
    params = random_params(lambda: DiT(CFG, rngs=nnx.Rngs(0)))

    @jax.jit
    def loss(batch, text, key, dropout=0.0):
        setup = ARSetup(graphdef, CHUNK_FRAMES, text.shape[1] - 1, ARLossSpec(text_dropout=dropout))
        return teacher_forcing_loss(setup, params, TeacherForcingBatch(**batch), key, text)[0]

    return loss


def test_loss_uses_the_text_features_of_each_sample(loss):
    key = jax.random.key(0)
    batch, text = collate(stacked_rows(clip(0), clip(1, prompts=(0, 0, 1, 1))), EMPTY_TEXT_FEATURES)
    assert text.shape == (2, 4, 4, 8)
    first = float(loss(batch, jnp.asarray(text), key))
    assert np.isfinite(first) and first > 0
    # Features that no chunk refers to do not matter; others do.
    unused, used = text.copy(), text.copy()
    unused[1, 2], unused[:, 3] = 9.0, 9.0
    used[1, 1] += 1.0
    assert float(loss(batch, jnp.asarray(unused), key)) == first
    assert float(loss(batch, jnp.asarray(used), key)) != first
    assert float(loss(batch, jnp.asarray(unused), key, dropout=1.0)) != first
    # Padded latents do not matter.
    padded = dict(batch, target=batch["target"].copy())
    padded["target"][:, 6:] += 1.0
    assert float(loss(padded, jnp.asarray(text), key)) == first
