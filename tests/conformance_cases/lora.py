"""Conformance of a DiT with LoRA: unmerged, merged, gradients, targets and initialisation."""

import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conformance_cases.dit import prompts_of_blocks
from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, EXACT, TIGHT, Case, compared, differing
from longlive_jax import layout
from longlive_jax.interop.keys_lora import PEFT, PEFT_PREFIX
from longlive_jax.io.arrays import flatten, nest
from longlive_jax.models.params import abstract
from longlive_jax.models.variants import variant
from longlive_jax.models.wan import DiT
from longlive_jax.quant.lora import LoRASpec, init_adapter, merge_adapter, num_adapted, with_adapter


def adapted(golden: Golden) -> Sequence[Case]:
    """Outputs without, with and with merged LoRA; merged weights; loss and gradients; adapters."""
    lora = _Adapted(golden)
    cases = [
        compared(name, CLOSE, compute, golden.frames(name, 1))
        for name, compute in {
            "y_base": partial(lora.velocity, golden.dit.params),
            "y_lora": lambda: lora.result()[1],
            "y_merged": lambda: lora.velocity(lora.merged()),
        }.items()
    ]
    cases.append(compared("loss", CLOSE, lambda: lora.result()[0], golden["loss"]))
    cases += [
        compared(f"merged/{key}", TIGHT, partial(lora.weight, key), want)
        for key, want in golden.under("merged/").items()
    ]
    cases += [
        compared(f"grad/{key}", CLOSE, partial(lora.gradient, key), want)
        for key, want in golden.under("grad/").items()
    ]
    return cases + lora.new_adapters()


class _Adapted:
    """Computations on a golden with LoRA."""

    def __init__(self, golden: Golden):
        self.golden, self.model = golden, golden.dit
        tensors = golden.under("lora/")
        self.leaves = PEFT.forward({key: value.shape for key, value in tensors.items()})
        self.adapter = nest(
            {
                leaf.path: jnp.asarray(np.stack([leaf.to_param(tensors[key]) for key in leaf.keys]))
                for leaf in self.leaves
            }
        )
        self.spec = LoRASpec(golden.meta["rank"], golden.meta["alpha"])
        self.velocity = jax.jit(self._velocity)
        self.result, self.merged = functools.cache(self._result), functools.cache(self._merged)

    def _velocity(self, params):
        golden, dit = self.golden, self.model.around(params)
        x = golden.frames("x", 1)
        _, frames, height, width, _ = x.shape
        chunk = golden.meta["num_frame_per_block"]
        tokens = layout.grid(frames, height // 2, width // 2, chunk_frames=chunk)
        return dit(x, jnp.asarray(golden["t"]), dit.text_kv(prompts_of_blocks(golden)), tokens)[0]

    def _result(self):
        """Returns (loss, velocity, gradients of the adapter)."""

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def measured(adapter):
            velocity = self._velocity(with_adapter(self.model.params, adapter, self.spec))
            target = self.golden.frames("target", 1)
            return jnp.mean((velocity - target) ** 2), velocity

        (loss, velocity), grads = measured(self.adapter)
        return loss, velocity, grads

    def _merged(self):
        """The model's parameters with every LoRA merged into its kernel."""
        return merge_adapter(self.model.params, self.adapter, self.spec.scale)

    def weight(self, key: str) -> np.ndarray:
        """A merged matrix under its original name."""
        return self.model.state_dict(self.merged(), [key])[key]

    def gradient(self, key: str) -> np.ndarray:
        """The gradient of one half of one adapter, `blocks.0.self_attn.q.lora_A`."""
        return self._tensors(self.result()[2])[f"{PEFT_PREFIX}{key}.weight"]

    def _tensors(self, adapter: Any) -> dict[str, np.ndarray]:
        """An adapter under PEFT's names."""
        flat = flatten(adapter)
        return {
            key: leaf.to_tensor(np.asarray(flat[leaf.path])[layer])
            for leaf in self.leaves
            for layer, key in enumerate(leaf.keys)
        }

    def new_adapters(self) -> list[Case]:
        """Names and initial values of new adapters, and the number for the 5B model's shapes."""
        meta = self.golden.meta

        def initial() -> dict[str, np.ndarray]:
            return self._tensors(init_adapter(jax.random.key(0), self.model.params, self.spec))

        def count() -> int:
            shapes = abstract(lambda: DiT(variant("wan2_2_ti2v_5b")["dit"], rngs=nnx.Rngs(0)))[1]
            make = partial(init_adapter, params=shapes, spec=LoRASpec())
            return num_adapted(jax.eval_shape(make, jax.random.key(0)))

        def modules() -> list[str]:
            return sorted({_module(key) for key in initial()})

        want = {
            "target_modules": (modules, sorted),
            "checkpoint_keys": (lambda: sorted(initial()), sorted),
            "real_5b_num_targets": (count, np.asarray),
        }
        cases = [
            compared(name, EXACT, got, order(meta[name]), differing)
            for name, (got, order) in want.items()
            if name in meta
        ]
        stats = meta.get("init_stats", {})
        sides = {"A_init_max_over_bound": ("A", NEAR_BOUND), "B_init_abs_max": ("B", EXACT)}
        return cases + [
            compared(name, tolerance, lambda side=side: _largest(initial(), side), stats[name])
            for name, (side, tolerance) in sides.items()
            if name in stats
        ]


NEAR_BOUND = 1e-3
"""Tolerance for the largest of thousands of uniform draws, as a multiple of their bound."""


def _module(key: str) -> str:
    """The adapted module of a key in PEFT's naming, `blocks.0.ffn.0`."""
    return key.removeprefix(PEFT_PREFIX).rsplit(".", 2)[0]


def _largest(tensors: Mapping[str, np.ndarray], side: str) -> float:
    """The largest absolute value in all "A", as a multiple of 1 / sqrt(inputs), or in all "B"."""
    chosen = [x for key, x in tensors.items() if key.endswith(f".lora_{side}.weight")]
    return max(np.abs(x).max() * (x.shape[1] ** 0.5 if side == "A" else 1.0) for x in chosen)
