"""Stage `text`: trains the small world's text encoder to guess hidden words of captions.

The loss predicts the word of every token from its feature, with part of the words hidden (masked
language modelling, arXiv:1810.04805, but visible words count too). The tokenizer's unknown piece
replaces a hidden word, so a word from outside the world looks like one to be guessed.

A linear probe reads every attribute of a caption even from the features of an untrained encoder, so
it only guards against collapse. Training adds knowledge of which words fit where
(`guess_accuracy`), and features that change little when a prompt contains foreign words.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.io.checkpoint import TOKENIZER, CheckpointWriter, save_component
from longlive_jax.models.params import abstract, params_of, with_params
from longlive_jax.models.umt5 import UMT5, Tokenizer, UMT5Config, encode_prompts
from longlive_jax.models.umt5.tokenizer import EOS
from longlive_jax.parallel.hosts import gather_to_hosts
from longlive_jax.small_world.tokenizer import TEXT_LENGTH, UNKNOWN, world_tokenizer
from longlive_jax.small_world.words import Scene, all_captions, all_scenes
from longlive_jax.training.feed import feed_in_order
from longlive_jax.training.stages.stage import RunSpec
from longlive_jax.training.task import Task, global_batches
from longlive_jax.training.update import Group, stateless
from longlive_jax.typing import Array, Float, Params

HIDDEN_SHARE = (0.15, 0.5)
"""Smallest and largest share of hidden words in a caption; every caption draws its own share."""

EMPTY_SHARE = 0.02
"""Share of empty prompts in a batch, from which the encoding of the negative prompt is learnt."""


class CaptionBatches(Sequence):
    """`batches[i]` is the batch of step i: {"ids" int32 [b, t], "mask" bool [b, t]}.

    A batch has training captions, with and without the cut prefix and a full stop, and a few empty
    prompts. The same `seed` and step give the same batch. Raises ValueError if a caption exceeds
    `length` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        steps: int,
        seed: int = 0,
        length: int = TEXT_LENGTH,
    ):
        captions = all_captions("train")
        prompts = [p + c + stop for p in ("", CUT_PREFIX) for c in captions for stop in ("", ".")]
        if cut := tokenizer.truncations(prompts, length):
            raise ValueError(f"{cut[0]}; set length to {max(c.tokens for c in cut)}")
        self._ids, self._mask = tokenizer.encode(["", *prompts], length)
        self.batch_size, self.steps, self.seed = batch_size, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, int(i)))
        rows = rng.integers(1, len(self._ids), self.batch_size)
        rows[rng.random(self.batch_size) < EMPTY_SHARE] = 0
        return {"ids": self._ids[rows], "mask": self._mask[rows]}


def text_loss(graphdef: nnx.GraphDef[UMT5], params: Params, batch: Mapping[str, Array], key: Array):
    """Mean cross-entropy in nats, over all tokens, of softmax(E f / sqrt(e)).

    f are the features of the caption with hidden words, E is the token embedding of width e.
    Metrics: `hidden` and `visible`, the same mean over those tokens alone, and `hidden_accuracy`.
    """
    ids, mask = jnp.asarray(batch["ids"]), jnp.asarray(batch["mask"])
    hidden = _hide(key, mask & (ids != EOS))
    features = with_params(graphdef, params)(jnp.where(hidden, UNKNOWN, ids), mask)
    table = params["token_embedding"]["embedding"].astype(jnp.float32)
    logits = features.astype(jnp.float32) @ table.T / table.shape[1] ** 0.5
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    metrics = {
        "hidden": _mean(nats, hidden),
        "visible": _mean(nats, mask & ~hidden),
        "hidden_accuracy": _mean(logits.argmax(-1) == ids, hidden),
    }
    return _mean(nats, mask), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextStage(RunSpec):
    """Stage `text`: the tokenizer, and the encoder trained to guess hidden words.

    Attributes:
      model: architecture.
      batch: captions per batch.
    """

    model: UMT5Config
    batch: int = 128

    def __post_init__(self):
        self.check_data_parallel(self.batch)

    def task(self, out: pathlib.Path, workdir: pathlib.Path, mesh: Mesh) -> Task:
        """See `RunSpec.task`."""
        tokenizer, loop = world_tokenizer(), self.loop
        batches = CaptionBatches(tokenizer, self.batch, steps=loop.steps, seed=loop.seed)
        graphdef, _ = abstract(lambda: UMT5(self.model, rngs=nnx.Rngs(0)))
        group = Group(
            init=lambda key: params_of(UMT5(self.model, rngs=nnx.Rngs(key))),
            loss=stateless(functools.partial(text_loss, graphdef)),
            tx=self.optimizer(),
            ema=self.ema,
        )

        def evaluate(
            weights: Mapping[str, Params], step: int, workdir: pathlib.Path
        ) -> dict[str, float]:
            umt5 = with_params(graphdef, gather_to_hosts(weights["umt5"]))
            guess = {"guess_accuracy": guess_accuracy(umt5, tokenizer)}
            return guess | probe_accuracy(umt5, tokenizer)

        return Task(
            trainer=self.trainer({"umt5": group}, mesh),
            batches=global_batches(feed_in_order(batches), mesh),
            evaluate=evaluate,
            export=functools.partial(self._export, tokenizer),
        )

    def _export(
        self, tokenizer: Tokenizer, weights: Mapping[str, Params], directory: pathlib.Path
    ) -> None:
        """Writes the encoder and its tokenizer."""
        params, provenance = weights["umt5"], self.provenance("text")
        save_component(directory, "umt5", params, self.model, provenance=provenance, overwrite=True)
        with CheckpointWriter(directory, overwrite=True) as writer:
            writer.stage(TOKENIZER).write_bytes(tokenizer.model)
            writer.commit()


def guess_accuracy(umt5: UMT5, tokenizer: Tokenizer) -> float:
    """Share of guesses that fit, when each word of each held-out caption is hidden alone.

    A guess fits if the caption with it is again a caption of the world: another colour for a
    colour, but neither `an` before `red` nor `moves` before `still`. An untrained encoder has 0.
    """
    captions = all_captions("held_out")
    ids, mask = tokenizer.encode(captions, TEXT_LENGTH)
    place = np.tile(np.arange(len(captions[0].split())), len(captions))
    row = np.arange(len(place))
    masked, mask = (np.repeat(x, len(place) // len(captions), axis=0) for x in (ids, mask))
    guess = masked.copy()
    masked[row, place] = UNKNOWN
    features = jax.jit(lambda m, *batch: m(*batch))(umt5, masked, mask)[row, place]
    guess[row, place] = (features @ umt5.token_embedding.embedding[...].T).argmax(-1)
    world = {line.tobytes() for line in tokenizer.encode(all_captions(), TEXT_LENGTH)[0]}
    return float(np.mean([line.tobytes() in world for line in guess]))


def probe_accuracy(umt5: UMT5, tokenizer: Tokenizer) -> dict[str, float]:
    """Accuracy of a linear probe for the attributes of a caption in its mean feature.

    One ridge regression per attribute of `Scene`, fitted on the training captions and scored on the
    held-out ones; both with and without the cut prefix.
    """
    fit, score = (_mean_features(umt5, tokenizer, split) for split in ("train", "held_out"))
    ridge = fit.T @ fit + 1e-4 * len(fit) * np.eye(fit.shape[1])
    accuracy = {}
    for name in (field.name for field in dataclasses.fields(Scene)):
        fitted, new = ([getattr(s, name) for s in all_scenes(k)] * 2 for k in ("train", "held_out"))
        classes = sorted(set(fitted))
        target = np.asarray([[word == c for c in classes] for word in fitted], float)
        guess = (score @ np.linalg.solve(ridge, fit.T @ target)).argmax(-1)
        accuracy[f"probe_{name}"] = float(np.mean(np.asarray(classes)[guess] == new))
    return accuracy


def _hide(key: Array, candidates: Array) -> Array:
    """Chooses the candidates to hide; every caption has its own share."""
    share_key, word_key = jax.random.split(key)
    low, high = HIDDEN_SHARE
    share = jax.random.uniform(share_key, (candidates.shape[0], 1), minval=low, maxval=high)
    return candidates & (jax.random.uniform(word_key, candidates.shape) < share)


def _mean(values: Array, where: Array) -> Float[Array, ""]:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)


def _mean_features(umt5: UMT5, tokenizer: Tokenizer, split: str) -> np.ndarray:
    """Mean feature over the tokens of every caption, and a constant 1, float64 [2 b, e + 1].

    First all captions of the split, then all with the cut prefix.
    """
    prompts = [prefix + c for prefix in ("", CUT_PREFIX) for c in all_captions(split)]
    features = np.asarray(encode_prompts(umt5, tokenizer, prompts, length=TEXT_LENGTH), np.float64)
    tokens = tokenizer.encode(prompts, TEXT_LENGTH)[1].sum(1, keepdims=True)
    return np.concatenate([features.sum(1) / tokens, np.ones((len(prompts), 1))], axis=1)
