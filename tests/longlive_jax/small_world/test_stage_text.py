"""The stage `text`: caption batches, the masked-word loss, training and export."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longlive_jax.io.checkpoint import load_component
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config, encode_prompts
from longlive_jax.models.umt5.tokenizer import EOS
from longlive_jax.small_world import stage_text
from longlive_jax.small_world.tokenizer import UNKNOWN, world_tokenizer
from longlive_jax.small_world.words import all_captions
from tests.longlive_jax.training.toy_task import one_device

BATCH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


@pytest.fixture(scope="module")
def cfg(tokenizer):
    return UMT5Config(tokenizer.vocab_size, dim=32, dim_attn=32, ffn_dim=64, heads=4, layers=2)


@pytest.fixture(scope="module")
def batches(tokenizer):
    return stage_text.CaptionBatches(tokenizer, BATCH, steps=1000)


@pytest.fixture(scope="module")
def untrained(cfg):
    return UMT5(cfg, rngs=nnx.Rngs(0))


class IdentityEncoder(nnx.Module):
    """Returns the embedding of every token of its input, so a readout finds exactly that token.

    With the parameters of `identity_loss` the cross-entropy of a token is 0 if the encoder sees it,
    and `NATS` if another one is in its place. `inputs` records the ids of every call.
    """

    inputs: ClassVar[list[np.ndarray]] = []

    def __init__(self, vocab_size):
        self.token_embedding = nnx.Embed(vocab_size, vocab_size, rngs=nnx.Rngs(0))

    def __call__(self, ids, mask):
        self.inputs.append(np.asarray(ids))
        return self.token_embedding(ids)


NATS = 50.0


def identity_loss(batch, key, vocab_size):
    """Loss and metrics of the `IdentityEncoder`, and the ids [b, t] that it is given."""
    umt5 = IdentityEncoder(vocab_size)
    scale = (NATS * vocab_size**0.5) ** 0.5
    params = {"token_embedding": {"embedding": scale * jnp.eye(vocab_size)}}
    loss, metrics = stage_text.text_loss(nnx.graphdef(umt5), params, batch, key)
    return loss, metrics, IdentityEncoder.inputs.pop()


def train(umt5, batches, *, steps, rate):
    """The encoder after some steps of Adam, and the metrics of every step."""
    graphdef, params = nnx.graphdef(umt5), params_of(umt5)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    loss = functools.partial(stage_text.text_loss, graphdef)

    @jax.jit
    def step(params, state, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics | {"loss": value}

    state, history = tx.init(params), []
    for i in range(steps):
        params, state, metrics = step(params, state, batches[i], jax.random.key(i))
        history.append(metrics)
    return with_params(graphdef, params), jax.device_get(history)


def test_batches_are_a_function_of_seed_and_step(batches, tokenizer):
    again = stage_text.CaptionBatches(tokenizer, BATCH, steps=1000)
    assert len(batches) == 1000
    np.testing.assert_array_equal(batches[7]["ids"], again[7]["ids"])
    assert (batches[7]["ids"] != batches[8]["ids"]).any()
    other = stage_text.CaptionBatches(tokenizer, BATCH, steps=1000, seed=1)
    assert (batches[7]["ids"] != other[7]["ids"]).any()


def test_batches_contain_no_held_out_captions_and_a_few_empty_ones(batches, tokenizer):
    held_out = {row.tobytes() for row in tokenizer.encode(all_captions("held_out"), 24)[0]}
    rows = [row for i in range(100) for row in batches[i]["ids"]]
    assert not any(row.tobytes() in held_out for row in rows)
    empty = sum(row[0] == EOS for row in rows)
    assert 0 < empty < 0.05 * len(rows)


def test_a_length_that_is_too_short_is_refused_with_the_minimum(tokenizer):
    with pytest.raises(ValueError, match="set length to 15"):
        stage_text.CaptionBatches(tokenizer, BATCH, steps=1, length=12)


def test_a_share_of_the_words_is_hidden_but_no_end_or_padding(tokenizer):
    batch = stage_text.CaptionBatches(tokenizer, 400, steps=1)[0]
    loss, metrics, inputs = identity_loss(batch, jax.random.key(0), tokenizer.vocab_size)
    ids, mask = batch["ids"], batch["mask"]
    words = mask & (ids != EOS)

    # 1. Hidden words are the unknown piece, all other tokens are unchanged.
    hidden = inputs != ids
    assert (inputs[hidden] == UNKNOWN).all() and not hidden[~words].any()
    share = hidden[words].mean()
    assert 0.3 < share < 0.35  # the middle of 0.15 and 0.5

    # 2. The metrics separate the same hidden words from the visible tokens.
    assert metrics["hidden"] == pytest.approx(NATS, rel=1e-5)
    assert metrics["visible"] == pytest.approx(0, abs=1e-5) and metrics["hidden_accuracy"] == 0
    assert loss == pytest.approx(NATS * hidden.sum() / mask.sum(), rel=1e-5)


def test_the_loss_is_the_mean_over_tokens(untrained, batches, tokenizer):
    graphdef, params = nnx.graphdef(untrained), params_of(untrained)
    batch, key = batches[0], jax.random.key(3)
    loss, metrics = jax.jit(functools.partial(stage_text.text_loss, graphdef))(params, batch, key)
    ids, mask = batch["ids"], batch["mask"]
    *_, masked = identity_loss(batch, key, tokenizer.vocab_size)  # the same key hides the same
    hidden = masked != ids
    features = np.asarray(untrained(jnp.asarray(masked), jnp.asarray(mask)), np.float64)
    logits = features @ np.asarray(params["token_embedding"]["embedding"]).T / 32**0.5
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    assert loss == pytest.approx(nats[mask].mean(), rel=1e-4)
    assert metrics["hidden"] == pytest.approx(nats[hidden].mean(), rel=1e-4)
    assert metrics["visible"] == pytest.approx(nats[mask & ~hidden].mean(), rel=1e-4)


def test_a_batch_of_empty_prompts_has_a_finite_gradient(untrained, tokenizer):
    ids, mask = tokenizer.encode(["", ""], 24)
    loss = functools.partial(stage_text.text_loss, nnx.graphdef(untrained))
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(
        params_of(untrained), {"ids": ids, "mask": mask}, jax.random.key(0)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert metrics["hidden"] == 0


def test_training_lowers_the_loss(untrained, batches):
    _, history = train(untrained, batches, steps=60, rate=1e-2)
    first, last = (np.mean([m["hidden"] for m in steps]) for steps in (history[:5], history[-5:]))
    assert last < 0.8 * first


def test_an_untrained_encoder_guesses_almost_no_word(untrained, tokenizer):
    assert stage_text.guess_accuracy(untrained, tokenizer) < 0.05


@pytest.mark.slow
def test_a_trained_encoder_guesses_words_that_fit(untrained, batches, tokenizer):
    umt5, _ = train(untrained, batches, steps=600, rate=1e-2)
    assert stage_text.guess_accuracy(umt5, tokenizer) > 0.98
    assert set(stage_text.probe_accuracy(umt5, tokenizer).values()) == {1.0}


def test_the_stage_exports_and_evaluates_encoder_and_tokenizer(cfg, tmp_path):
    task = stage_text.TextStage(model=cfg, batch=BATCH).task(
        tmp_path / "out", tmp_path, one_device()
    )
    weights = task.trainer.init().weights
    params = weights["umt5"]
    task.export(weights, tmp_path / "out")
    loaded, settings = load_component(tmp_path / "out", "umt5")
    assert settings["dim"] == 32
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))
    exported = Tokenizer(tmp_path / "out" / "tokenizer.model")
    umt5 = with_params(UMT5(cfg, rngs=nnx.Rngs(1)), loaded)
    features = encode_prompts(umt5, exported, [all_captions()[0], ""], length=24)
    assert np.isfinite(features).all()
    metrics = task.evaluate(weights, 0, tmp_path)
    attributes = ("shape", "colour", "background", "motion")
    assert set(metrics) == {"guess_accuracy", *(f"probe_{name}" for name in attributes)}
