"""LoRA adapters: trees of low-rank factors, apart from the parameters that they adapt.

    adapter = init_adapter(key, params, spec)               # float32; changes nothing yet
    adapted = with_adapter(params, adapter, spec)           # to train, or to sample unmerged
    merged = merge_adapter(params, adapter, spec.scale)     # the same, as plain matrices

Where the parameters have `blocks/ffn/up/kernel` `[layers, i, o]`, an adapter has `blocks/ffn/up/a`
`[layers, i, r]` and `blocks/ffn/up/b` `[layers, r, o]`. The kernels may be arrays or packed.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.low_rank import Dropout, LoRAKernel, LowRank, has_product, with_branches
from longlive_jax.quant.policy import LINEARS, kernel_path
from longlive_jax.spec import nearest
from longlive_jax.typing import Array, Params

__all__ = ["LoRASpec", "adapter_specs", "check_adapter", "init_adapter", "merge_adapter"]
__all__ += ["num_adapted", "with_adapter", "without_dropout"]


@dataclasses.dataclass(frozen=True)
class LoRASpec:
    """Settings of an adapter.

    Attributes:
      rank: rank of every branch.
      alpha: numerator of the branches' scale alpha / rank; None: the rank, so that the scale is 1.
      dropout: probability that an entry of a branch's input is zeroed while training.
      targets: pattern of the adapted kernels' full paths; default: the 10 linears of each block.
    """

    rank: int = 128
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be >= 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha must be > 0, got {self.alpha}; or set none for the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"lora.targets {self.targets!r} is not a regular expression: {error}"
            ) from error

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def shapes(self, params: Params) -> dict[str, tuple[int, ...]]:
        """Shapes `[*layers, i, o]` of the adapted kernels, by path (`blocks/ffn/up/kernel`).

        Raises ValueError if no kernel matches `targets`, or one is smaller than the rank.
        """
        kernels = _kernel_shapes(params)
        chosen = {k: x for k, x in kernels.items() if re.fullmatch(self.targets, k)}
        if not chosen:
            close = nearest(self.targets, kernels)
            raise ValueError(f"lora.targets: no kernel matches {self.targets!r}{close}")
        for path, shape in chosen.items():
            if self.rank > min(shape[-2:]):
                raise ValueError(
                    f"lora.rank {self.rank} is above the {min(shape[-2:])} of {path} {shape}; "
                    "choose a smaller rank or other targets"
                )
        return chosen


def init_adapter(key: Array, params: Params, spec: LoRASpec) -> Params:
    """A new adapter, float32: A ~ U(-1/sqrt(i), 1/sqrt(i)), B = 0, so it changes nothing yet.

    `params` are parameters or their shapes. Raises ValueError like `LoRASpec.shapes`.
    """
    adapter: dict[str, Any] = {}
    for index, (path, shape) in enumerate(spec.shapes(params).items()):
        *layers, inputs, outputs = shape
        bound = inputs**-0.5
        own = jax.random.fold_in(key, index)
        a = jax.random.uniform(own, (*layers, inputs, spec.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*layers, spec.rank, outputs), jnp.float32)
        node = adapter
        for name in path.split("/")[:-1]:
            node = node.setdefault(name, {})
        node.update(a=a, b=b)
    return adapter


def with_adapter(
    params: Params,
    adapter: Params,
    spec: LoRASpec | float,
    *,
    key: Array | None = None,
    axes: tuple[str, ...] = (),
) -> Params:
    """The parameters with a branch on every kernel that the adapter adapts.

    Args:
      params: kernels as arrays or packed.
      adapter: low-rank factors.
      spec: settings of the adapter, or its scale.
      key: PRNG key of dropout, which every kernel and layer draws by itself; None: no dropout.
      axes: mesh axes over which tokens are sharded, for dropout inside `shard_map`.

    Raises ValueError if the adapter does not fit the parameters, or a kernel has a branch already.
    """
    check_adapter(params, adapter)
    adapted = _paths(params, lambda node: getattr(node, "branch", None) is not None)
    if both := [path for path, *_ in _factors(adapter) if path in adapted]:
        raise ValueError(f"{both[0]} has a low-rank branch already; merge or remove that one first")
    return with_branches(params, _branches(adapter, spec, key, axes))


def merge_adapter(params: Params, adapter: Params, scale: float) -> Params:
    """The parameters with `kernel + scale * a @ b`, summed in float32, in the dtype of the kernel.

    Raises ValueError if the adapter does not fit the parameters, or an adapted kernel is packed.
    """
    check_adapter(params, adapter)
    packed = _paths(params, lambda node: has_product(node))
    if both := [path for path, *_ in _factors(adapter) if path in packed]:
        raise ValueError(f"{both[0]} is packed; merge an adapter before the kernels are packed")
    branches = _branches(adapter, scale, None, ())
    return jax.tree.map(
        lambda x: x.merged() if isinstance(x, LoRAKernel) else x,
        with_branches(params, branches),
        is_leaf=has_product,
    )


def adapter_specs(
    specs: Any, adapter: Any, spec: LoRASpec, *, dropout: bool = False, axes: tuple[str, ...] = ()
) -> Any:
    """PartitionSpecs of `with_adapter`, from those of the parameters and of the adapter.

    `dropout` says whether there is a key; `axes` are those of `with_adapter`.
    """
    replicated: Any = P()
    return with_branches(specs, _branches(adapter, spec, replicated if dropout else None, axes))


def without_dropout(params: Params) -> Params:
    """The parameters with branches that drop nothing, as in sampling."""

    def keep_all(node: Any) -> Any:
        branch = getattr(node, "branch", None)
        if branch is None or branch.dropout is None:
            return node
        return dataclasses.replace(node, branch=dataclasses.replace(branch, dropout=None))

    return jax.tree.map(keep_all, params, is_leaf=has_product)


def check_adapter(params: Params, adapter: Params) -> None:
    """Raises ValueError, naming a kernel, if an adapter does not fit the parameters."""
    kernels = _kernel_shapes(params)
    for path, a, b in _factors(adapter):
        if path not in kernels:
            raise ValueError(f"the adapter adapts {path}, which the model has not")
        *layers, inputs, outputs = kernels[path]
        rank = a.shape[-1]
        if (a.shape, b.shape) != ((*layers, inputs, rank), (*layers, rank, outputs)):
            raise ValueError(
                f"the adapter has factors {a.shape} and {b.shape} for {path} {kernels[path]}; "
                "it is for another model"
            )


def num_adapted(adapter: Params) -> int:
    """Number of adapted matrices, counted per layer."""
    return sum(a.shape[0] if len(a.shape) > 2 else 1 for _, a, _ in _factors(adapter))


def _branches(
    adapter: Params, spec: LoRASpec | float, key: Any, axes: tuple[str, ...]
) -> dict[str, LowRank]:
    """The branches by path of the kernel; `key` may be a PartitionSpec in a tree of them."""
    scale, rate = (spec.scale, spec.dropout) if isinstance(spec, LoRASpec) else (spec, 0.0)
    branches = {}
    for index, (path, a, b) in enumerate(_factors(adapter)):
        dropout = None
        if rate and key is not None:
            own: Any = key if isinstance(key, P) else _layer_keys(key, index, a)
            dropout = Dropout(own, rate, axes)
        branches[path] = LowRank(a, b, scale, dropout)
    return branches


def _layer_keys(key: Array, index: int, a: Array) -> Array:
    own = jax.random.fold_in(key, index)
    return jax.random.split(own, a.shape[:-2]) if a.ndim > 2 else own


def _factors(adapter: Mapping[str, Any], *parents: str) -> Iterator[tuple[str, Any, Any]]:
    """(path of the kernel, a, b) of every adapted kernel, in sorted order.

    Raises ValueError for a tree of another form.
    """
    where = "/".join(parents) or "the adapter"
    if {"a", "b"} & set(adapter):
        if set(adapter) != {"a", "b"}:
            raise ValueError(f"{where} of the adapter has {sorted(adapter)} instead of a and b")
        yield "/".join((*parents, "kernel")), adapter["a"], adapter["b"]
        return
    for name in sorted(adapter):
        if not isinstance(adapter[name], Mapping):
            raise ValueError(f"{where} has an array {name!r}, which is not a low-rank factor")
        yield from _factors(adapter[name], *parents, name)


def _kernel_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of all kernels by path, packed ones included."""
    return {
        kernel_path(keys): leaf.shape
        for keys, leaf in _flatten(params)
        if keys and getattr(keys[-1], "key", None) == "kernel" and len(leaf.shape) > 1
    }


def _paths(params: Params, wanted: Any) -> set[str]:
    return {kernel_path(keys) for keys, leaf in _flatten(params) if wanted(leaf)}


def _flatten(params: Params) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=has_product)[0]
