"""Clips as episodes of full-history teacher forcing: the layout, and that the loss accepts it."""

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
CHUNKS, SIZE = 4, 2


def clip(seed, prompts=(0, 1, 1, 2), cut=(False, True, False, True)):
    rng = np.random.default_rng(seed)
    return ClipLatents(
        latents=rng.standard_normal((CHUNKS * SIZE, 4, 4, 3)).astype(np.float16),
        mask=np.array([1] * 6 + [0] * 2, np.float32),
        cut=np.array(cut),
        shot=np.cumsum(cut).astype(np.int32),
        prompt=np.array(prompts, np.int32),
        text=rng.standard_normal((max(prompts) + 1, 4, 8)).astype(np.float32),
    )


def stacked(*clips, texts=3):
    rows = [one.row(texts) for one in clips]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


EMPTY_TEXT = np.full((4, 8), 0.5, np.float32)


def test_the_layout_is_all_clean_chunks_then_all_noisy_ones():
    episode = batch_from_clip(clip(0))
    assert episode["chunk_index"].tolist() == [0, 1, 2, 3] * 2
    assert episode["start"].tolist() == [0, 2, 4, 6] * 2
    assert episode["prompt"].tolist() == [0, 1, 1, 2] * 2
    assert not episode["window_start"].any() and (episode["sink"] == EMPTY).all()
    np.testing.assert_array_equal(episode["context"], episode["target"])
    batch = TeacherForcingBatch(**collate(stacked(clip(0)), EMPTY_TEXT)[0])
    tokens = sequence_tokens(batch, SIZE, global_sinks=0)
    wanted = teacher_forcing(CHUNKS * SIZE, 2, 2, chunk_frames=SIZE)
    np.testing.assert_array_equal(visible(tokens, tokens)[0], visible(wanted, wanted))
    np.testing.assert_array_equal(tokens.pos[0], wanted.pos)


def test_phases_and_windows_are_optional():
    episode = batch_from_clip(clip(0), shot_rope_offset=8, window=3, global_sinks=1)
    assert episode["start"].tolist() == [0, 10, 12, 22] * 2
    assert episode["window_start"].tolist() == [0, 0, 1, 2] * 2 or episode["window_start"].max() > 0
    assert (episode["sink"] >= EMPTY).all() and (episode["sink"] > EMPTY).any()


def test_rows_are_filled_up_and_too_many_texts_are_refused():
    row = clip(0).row(5)
    assert row["text"].shape == (5, 4, 8) and not row["text"][3:].any()
    with pytest.raises(ValueError, match="3 prompts, room is made for 2"):
        clip(0).row(2)


@pytest.fixture(scope="module")
def loss():
    graphdef, _ = abstract(lambda: DiT(CFG, rngs=nnx.Rngs(0)))
    params = random_params(lambda: DiT(CFG, rngs=nnx.Rngs(0)))

    @jax.jit
    def loss(batch, text, key, dropout=0.0):
        setup = ARSetup(graphdef, SIZE, text.shape[1] - 1, ARLossSpec(text_dropout=dropout))
        return teacher_forcing_loss(setup, params, TeacherForcingBatch(**batch), key, text)[0]

    return loss


def test_the_loss_takes_a_batch_and_reads_each_samples_texts(loss):
    key = jax.random.key(0)
    batch, text = collate(stacked(clip(0), clip(1, prompts=(0, 0, 1, 1))), EMPTY_TEXT)
    assert text.shape == (2, 4, 4, 8)
    first = float(loss(batch, jnp.asarray(text), key))
    assert np.isfinite(first) and first > 0
    # What no chunk's prompt is does not matter; what one is does.
    unused, used = text.copy(), text.copy()
    unused[1, 2], unused[:, 3] = 9.0, 9.0
    used[1, 1] += 1.0
    assert float(loss(batch, jnp.asarray(unused), key)) == first
    assert float(loss(batch, jnp.asarray(used), key)) != first
    assert float(loss(batch, jnp.asarray(unused), key, dropout=1.0)) != first
    # Nor does padding.
    padded = dict(batch, target=batch["target"].copy())
    padded["target"][:, 6:] += 1.0
    assert float(loss(padded, jnp.asarray(text), key)) == first
