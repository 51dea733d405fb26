import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longlive_jax.io.checkpoint import load_component
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config, encode_prompts
from longlive_jax.small_world import stage_text as text
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
    return text.CaptionBatches(tokenizer, BATCH, steps=1000)


@pytest.fixture(scope="module")
def untrained(cfg):
    return UMT5(cfg, rngs=nnx.Rngs(0))


def trained(umt5, batches, *, steps, rate):
    """The module after some steps of Adam, and the metrics of every step."""
    graphdef, params = nnx.graphdef(umt5), params_of(umt5)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    loss = functools.partial(text.text_loss, graphdef)

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


def test_batches_repeat_and_differ(batches, tokenizer):
    again = text.CaptionBatches(tokenizer, BATCH, steps=1000)
    assert len(batches) == 1000
    np.testing.assert_array_equal(batches[7]["ids"], again[7]["ids"])
    assert (batches[7]["ids"] != batches[8]["ids"]).any()
    other = text.CaptionBatches(tokenizer, BATCH, steps=1000, seed=1)
    assert (batches[7]["ids"] != other[7]["ids"]).any()


def test_batches_never_show_a_held_out_caption(batches, tokenizer):
    plain = {row.tobytes() for row in tokenizer.encode(all_captions("held_out"), 24)[0]}
    drawn = [row for i in range(100) for row in batches[i]["ids"]]
    assert not any(row.tobytes() in plain for row in drawn)
    empty = sum(row[0] == 1 for row in drawn)
    assert 0 < empty < 0.05 * len(drawn)


def test_a_length_too_short_says_what_is_needed(tokenizer):
    with pytest.raises(ValueError, match="at least 15"):
        text.CaptionBatches(tokenizer, BATCH, steps=1, length=12)


def test_a_share_of_the_words_is_hidden_and_nothing_else():
    candidates = jnp.arange(20)[None] < jnp.asarray([[15]] * 400)
    hidden = text._hide(jax.random.key(0), candidates)
    assert not hidden[:, 15:].any()
    share = hidden[:, :15].mean()
    assert 0.3 < share < 0.35  # the middle of 0.15 and 0.5


def test_the_loss_is_the_mean_over_tokens(untrained, batches):
    graphdef, params = nnx.graphdef(untrained), params_of(untrained)
    batch, key = batches[0], jax.random.key(3)
    loss, metrics = jax.jit(functools.partial(text.text_loss, graphdef))(params, batch, key)
    ids, mask = batch["ids"], batch["mask"]
    hidden = np.asarray(text._hide(key, jnp.asarray(mask & (ids != 1))))
    masked = np.where(hidden, UNKNOWN, ids)
    features = np.asarray(untrained(jnp.asarray(masked), jnp.asarray(mask)), np.float64)
    logits = features @ np.asarray(params["token_embedding"]["embedding"]).T / 32**0.5
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    assert loss == pytest.approx(nats[mask].mean(), rel=1e-4)
    assert metrics["hidden"] == pytest.approx(nats[hidden].mean(), rel=1e-4)
    assert metrics["visible"] == pytest.approx(nats[mask & ~hidden].mean(), rel=1e-4)


def test_a_batch_of_empty_prompts_has_a_finite_gradient(untrained, tokenizer):
    ids, mask = tokenizer.encode(["", ""], 24)
    loss = functools.partial(text.text_loss, nnx.graphdef(untrained))
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(
        params_of(untrained), {"ids": ids, "mask": mask}, jax.random.key(0)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert metrics["hidden"] == 0


def test_steps_lower_the_loss(untrained, batches):
    _, history = trained(untrained, batches, steps=60, rate=1e-2)
    first, last = (np.mean([m["hidden"] for m in part]) for part in (history[:5], history[-5:]))
    assert last < 0.8 * first


def test_an_untrained_encoder_guesses_nothing(untrained, tokenizer):
    assert text.guess_accuracy(untrained, tokenizer) < 0.05


@pytest.mark.slow
def test_training_teaches_which_words_fit(untrained, batches, tokenizer):
    umt5, _ = trained(untrained, batches, steps=600, rate=1e-2)
    assert text.guess_accuracy(umt5, tokenizer) > 0.98
    assert set(text.probe_accuracy(umt5, tokenizer).values()) == {1.0}


def test_the_stage_exports_encoder_and_tokenizer(cfg, tmp_path):
    task = text.TextStage(model=cfg, batch=BATCH).task(tmp_path / "out", tmp_path, one_device())
    weights = task.trainer.init().weights
    params = weights["umt5"]
    task.export(weights, tmp_path / "out")
    loaded, settings = load_component(tmp_path / "out", "umt5")
    assert settings["dim"] == 32
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(params))
    copy = Tokenizer(tmp_path / "out" / "tokenizer.model")
    umt5 = with_params(UMT5(cfg, rngs=nnx.Rngs(1)), loaded)
    features = encode_prompts(umt5, copy, [all_captions()[0], ""], length=24)
    assert np.isfinite(features).all()
    numbers = task.evaluate(weights, 0, tmp_path)
    assert set(numbers) == {"guess_accuracy", *(f"probe_{a}" for a in
                            ("shape", "colour", "background", "motion"))}  # fmt: skip
