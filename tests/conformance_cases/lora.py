"""Conformance of a DiT with LoRA: unmerged, merged, and the gradients of the adapters."""

import functools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from conformance_cases.dit import prompts_of_blocks
from conformance_cases.golden import Golden
from conformance_cases.rows import CLOSE, TIGHT, Case, compared
from longlive_jax import layout
from longlive_jax.interop.keys_lora import PEFT
from longlive_jax.quant.low_rank import LoRAKernel, LowRank, with_branches


def adapted(golden: Golden) -> Sequence[Case]:
    """Outputs without LoRA, with LoRA and with merged LoRA; merged weights; loss and gradients."""
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
    return cases + [
        compared(f"grad/{key}", CLOSE, partial(lora.gradient, key), want)
        for key, want in golden.under("grad/").items()
    ]


class _Adapted:
    """Computations on a golden with LoRA."""

    def __init__(self, golden: Golden):
        self.golden, self.model = golden, golden.dit
        tensors = golden.under("lora/")
        self.leaves = PEFT.forward({key: value.shape for key, value in tensors.items()})
        halves = {
            leaf.path: jnp.asarray(np.stack([leaf.to_param(tensors[key]) for key in leaf.keys]))
            for leaf in self.leaves
        }
        scale = golden.meta["alpha"] / golden.meta["rank"]
        self.branches = {
            "/".join((*path[:-1], "kernel")): LowRank(a, halves[*path[:-1], "b"], scale)
            for path, a in halves.items()
            if path[-1] == "a"
        }
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
        """Returns (loss, velocity, gradients by path of the kernel)."""

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def measured(branches):
            velocity = self._velocity(with_branches(self.model.params, branches))
            target = self.golden.frames("target", 1)
            return jnp.mean((velocity - target) ** 2), velocity

        (loss, velocity), grads = measured(self.branches)
        return loss, velocity, grads

    def _merged(self):
        """The model's parameters with every LoRA merged into its kernel."""
        return jax.tree.map(
            lambda x: x.merged() if isinstance(x, LoRAKernel) else x,
            with_branches(self.model.params, self.branches),
            is_leaf=lambda x: isinstance(x, LoRAKernel),
        )

    def weight(self, key: str) -> np.ndarray:
        """A merged matrix under its original name."""
        return self.model.state_dict(self.merged(), [key])[key]

    def gradient(self, key: str) -> np.ndarray:
        """The gradient of one half of one adapter, `blocks.0.self_attn.q.lora_A`."""
        grads = self.result()[2]
        for leaf in self.leaves:
            for layer, name in enumerate(leaf.keys):
                if name.endswith(f".{key}.weight"):
                    branch = grads["/".join((*leaf.path[:-1], "kernel"))]
                    return leaf.to_tensor(np.asarray(getattr(branch, leaf.path[-1]))[layer])
        raise KeyError(key)
