"""Adapters plugged into pipelines: merged = unmerged, one program, settings, and refusals."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax import Pipeline, SampleSpec, Shot, ShotScript, UserError
from longlive_jax.adapters import Adapter, export_peft, save_adapter
from longlive_jax.adapters.branches import MIN_RANK, fuse, plug
from longlive_jax.bench.timing import Compilations
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.per_layer import is_unstacked
from longlive_jax.models.wan import DiT
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.quant.lora import merge_adapter
from longlive_jax.quant.low_rank import LoRAKernel
from longlive_jax.quant.packed import PackedKernel, quantize_params
from longlive_jax.quant.policy import named
from longlive_jax.sampling.engine import Engine
from longlive_jax.sampling.load import layers_apart
from tests.longlive_jax.adapters.conftest import random_adapter, same_bits
from tests.tiny import TINY, activate_outputs, tiny_parts

OPTIONS = {"chunks": 2, "output": "latents", "seed": 1}
PROMPT = "a cat runs"


def sampled(pipe, **options):
    return pipe.sample(PROMPT, **OPTIONS | options)


@pytest.fixture(scope="module")
def pair(tiny):
    """Two adapters of ranks 4 and 6."""
    params = tiny.engine.params
    return random_adapter(params), random_adapter(params, 6, seed=1, alpha=3)


def test_one_program_for_all_adapters_and_scales(pair):
    """Merged kernels give the same videos, and so do adapters in any order."""
    pipe, (small, large) = Pipeline(Engine(*tiny_parts(), SampleSpec(**TINY))), pair
    plain = sampled(pipe)
    with Compilations() as compiled:
        first = pipe.with_adapter(small)
        both = first.with_adapter(large, 0.5)
        videos = [
            sampled(first),
            sampled(both),
            sampled(pipe.with_adapter([large, small], [0.5, 1])),
        ]
        sampled(both.with_adapter(small, -2.0))
    assert compiled.counts["_step"] == 1
    with Compilations() as compiled:
        fused, without = both.fuse_adapters(), both.without_adapters()
        np.testing.assert_array_equal(sampled(without), plain)
        merged, again = sampled(fused), sampled(fused.unfuse_adapters())
    assert compiled.counts["_step"] == 0
    np.testing.assert_array_equal(again, videos[1])
    np.testing.assert_allclose(videos[1], videos[2], atol=2e-5)
    np.testing.assert_allclose(merged, videos[1], atol=2e-5)
    assert min(np.abs(x - plain).max() for x in videos) > 0.1
    assert np.abs(videos[0] - videos[1]).max() > 0.1
    want = merge_adapter(
        merge_adapter(pipe.engine.params, small.branches, small.scale),
        large.branches,
        large.scale * 0.5,
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), fused.engine.params, want
    )


def test_unfusing_restores_the_same_arrays(tiny, pair):
    before = jax.tree.map(np.asarray, tiny.engine.params)
    fused = tiny.with_adapter(pair[0]).fuse_adapters()
    assert not same_bits(fused.engine.params, before)
    restored = fused.unfuse_adapters().engine.params["blocks"]["ffn"]["up"]["kernel"]
    assert isinstance(restored, LoRAKernel)
    assert restored.kernel is tiny.engine.params["blocks"]["ffn"]["up"]["kernel"]
    assert same_bits(fused.without_adapters().engine.params, before)
    assert fused.without_adapters().engine is tiny.engine


def test_branches_have_room_that_only_grows(tiny, pair):
    small, large = pair

    def rank(pipe):
        kernels = [x for x in jax.tree.leaves(
            pipe.engine.params, is_leaf=lambda x: isinstance(x, LoRAKernel)
        ) if isinstance(x, LoRAKernel)]  # fmt: skip
        assert len(kernels) == 10
        (size,) = {x.branch.a.shape[-1] for x in kernels}
        assert {x.branch.scale for x in kernels} == {1.0}
        return size

    pipe = Pipeline(tiny.engine)
    assert rank(pipe.with_adapter(small)) == MIN_RANK
    assert rank(pipe.with_adapter([small, large, large, small])) == 32
    assert rank(pipe.with_adapter(large)) == 32
    assert rank(Pipeline(tiny.engine).with_adapter(small, rank=100)) == 100
    with pytest.raises(UserError, match="rank must be in"):
        pipe.with_adapter(small, rank=0)


def test_an_adapter_of_some_linears_leaves_the_others_alone(tiny, pair):
    blocks = pair[0].branches["blocks"]
    some = dataclasses.replace(pair[0], branches={"blocks": {"ffn": blocks["ffn"]}})
    fused = tiny.with_adapter(some).fuse_adapters().engine.params["blocks"]
    own = tiny.engine.params["blocks"]
    assert fused["self_attn"]["q"]["kernel"] is own["self_attn"]["q"]["kernel"]
    assert fused["ffn"]["up"]["kernel"] is not own["ffn"]["up"]["kernel"]
    np.testing.assert_allclose(
        sampled(tiny.with_adapter(some)),
        sampled(tiny.with_adapter(some).fuse_adapters()),
        atol=2e-5,
    )


def test_layers_apart_give_the_same_video(pair):
    """As on GPUs: parameters with one array per layer."""
    engine = Engine(*tiny_parts(), SampleSpec(**TINY))
    want = sampled(Pipeline(engine).with_adapter(list(pair)))
    engine.params = layers_apart(engine.params)
    pipe = Pipeline(engine).with_adapter(list(pair))
    assert is_unstacked(pipe.engine.params["blocks"]["ffn"]["up"]["kernel"].branch)
    np.testing.assert_allclose(sampled(pipe), want, atol=2e-5)
    fused = pipe.fuse_adapters()
    assert is_unstacked(fused.engine.params["blocks"]["ffn"]["up"]["kernel"])
    np.testing.assert_allclose(sampled(fused), want, atol=2e-5)


def test_a_mesh_of_videos_samples_with_adapters(tiny_checkpoint, pair):
    mesh = make_mesh(MeshSpec(data=2), devices=jax.devices()[:2])
    pipe = Pipeline.from_checkpoint(tiny_checkpoint, mesh=mesh)
    alone = Pipeline.from_checkpoint(tiny_checkpoint).with_adapter(pair[0])
    scripts = [ShotScript((Shot(text, chunks=2),)) for text in ("a cat runs", "a dog sleeps")]
    with Compilations() as compiled:
        got = pipe.with_adapter(pair[0]).sample(scripts, seed=1, output="latents")
        pipe.with_adapter(pair[1]).sample(scripts, output="latents")
    assert compiled.counts["_step"] == 1
    want = alone.sample(scripts, seed=1, output="latents")
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.fixture(scope="module")
def wide():
    """An engine whose matrices split into blocks, and its parameters packed in NVFP4 and FP8."""
    dit, *others = tiny_parts()
    cfg = dataclasses.replace(dit.cfg, dim=32, ffn_dim=48)
    dit = DiT(cfg, rngs=nnx.Rngs(0))
    dit = with_params(dit, activate_outputs(params_of(dit)))
    engine = Engine(dit, *others, SampleSpec(**TINY))
    packed = {name: quantize_params(engine.params, named(name)) for name in ("nvfp4", "fp8")}
    return engine, packed


@pytest.mark.parametrize("name", ["nvfp4", "fp8"])
def test_packed_kernels_keep_the_adapter_beside_them(wide, name):
    engine, packed = wide
    pipe = Pipeline(engine.with_params(packed[name]))
    adapter = random_adapter(engine.params)
    adapted = pipe.with_adapter(adapter, 0.5)
    kernel = adapted.engine.params["blocks"]["ffn"]["down"]["kernel"]
    x = jax.random.normal(jax.random.key(0), (7, 48))
    first = jax.tree.map(lambda leaf: leaf[0], kernel)
    plain = dataclasses.replace(first, branch=None)
    down = adapter.branches["blocks"]["ffn"]["down"]
    want = plain.product(x, jnp.zeros(32)) + x @ (0.5 * down["a"][0] @ down["b"][0])
    np.testing.assert_allclose(first.product(x, jnp.zeros(32)), want, atol=1e-4)
    assert np.abs(sampled(adapted) - sampled(pipe)).max() > 0.1
    with pytest.raises(UserError, match=r"is packed, so adapters stay beside it") as caught:
        adapted.fuse_adapters()
    assert "\n" not in str(caught.value)


def test_a_stored_branch_stays_in_addition(wide):
    """A packed checkpoint may have one; adapters come on top of it, in the same program."""
    engine, packed = wide
    small, large = random_adapter(engine.params, 2), random_adapter(engine.params, 3, seed=1)
    own = plug(packed["nvfp4"], [(small, 1.0)], 2)
    got = plug(own, [(large, 1.0)], 16)["blocks"]["ffn"]["up"]["kernel"]
    assert isinstance(got, PackedKernel) and got.branch.a.shape == (2, 32, 18)
    want = plug(packed["nvfp4"], [(small, 1.0), (large, 1.0)], 5)["blocks"]["ffn"]["up"]["kernel"]
    np.testing.assert_allclose(
        got.branch.a @ got.branch.b, want.branch.a @ want.branch.b, atol=1e-6
    )


def test_half_precision_kernels_are_merged_in_float32(wide):
    engine, _ = wide
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), engine.params)
    adapter = random_adapter(params)
    merged = fuse(params, [(adapter, 1.0)])["blocks"]["ffn"]["up"]["kernel"]
    up = adapter.branches["blocks"]["ffn"]["up"]
    want = params["blocks"]["ffn"]["up"]["kernel"].astype(np.float32) + up["a"] @ up["b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(want, jnp.bfloat16))


def made_for(pair, **settings):
    return dataclasses.replace(pair[0], settings=settings, name="few")


def test_an_adapter_brings_its_settings(tiny, pair):
    few = made_for(pair, steps=3, shift=3.0, solver="euler", levels=(1.0, 0.8, 0.5), guidance=2.0)
    pipe = tiny.with_adapter(few)
    spec = pipe.spec
    assert (spec.steps, spec.shift, spec.solver, spec.guidance) == (3, 3.0, "euler", 2.0)
    assert spec.levels == (1.0, 0.8, 0.5) and pipe.without_adapters().spec == tiny.spec
    other = pipe.with_adapter(made_for(pair, steps=2))
    assert (other.spec.steps, other.spec.levels, other.spec.solver) == (2, None, "euler")
    assert tiny.with_adapter(pair[1]).spec == tiny.spec


def test_what_the_user_chooses_stays(tiny_checkpoint, tiny, pair):
    few = made_for(pair, steps=3, levels=(1.0, 0.8, 0.5), solver="euler")
    pipe = Pipeline.from_checkpoint(tiny_checkpoint, steps=1, size=(64, 32)).with_adapter(few)
    assert (pipe.spec.steps, pipe.spec.levels, pipe.spec.solver) == (1, None, "euler")
    later = tiny.with_adapter(few).with_settings(solver="unipc")
    assert (later.spec.solver, later.spec.levels) == ("unipc", (1.0, 0.8, 0.5))
    assert later.engine.params is not tiny.engine.params
    assert later.with_adapter(pair[1]).spec.solver == "unipc"
    exact = tiny.with_settings(levels=(0.9, 0.4)).with_adapter(few)
    assert (exact.spec.steps, exact.spec.levels) == (2, (0.9, 0.4))
    same = tiny.with_settings(steps=3).with_adapter(few)
    assert same.spec.levels == (1.0, 0.8, 0.5)


def test_other_steps_than_the_adapters_are_remarked_once(tiny, pair):
    pipe = tiny.with_adapter(made_for(pair, steps=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = pipe.stream(PROMPT, chunks=1)
    assert not [note for note in stream.notes if "made for" in note]
    with pytest.warns(
        UserWarning, match="few was made for 2 steps and is sampled with 3"
    ) as caught:
        stream = pipe.stream(PROMPT, chunks=1, steps=3)
    assert len(caught) == 1
    assert stream.notes.count("few was made for 2 steps and is sampled with 3") == 1


def test_cached_prompts_survive_a_change_of_settings(tiny, pair):
    pipe = tiny.with_adapter(pair[0])
    sampled(pipe)
    with Compilations() as compiled:
        other = pipe.with_settings(guidance=1.0)
        assert other.engine._prompt_cache is pipe.engine._prompt_cache
        sampled(other)
    assert not compiled.counts["_step"]


def test_files_are_plugged_in_by_path(tiny, pair, tmp_path):
    want = sampled(tiny.with_adapter(pair[0], 0.5))
    save_adapter(tmp_path / "ours", pair[0])
    export_peft(tmp_path / "peft", pair[0])
    for path in (tmp_path / "ours", str(tmp_path / "peft")):
        np.testing.assert_array_equal(sampled(tiny.with_adapter(path, 0.5)), want)


def wrong_dim(pair):
    branches = {"blocks": {"ffn": {"up": {"a": np.zeros((2, 32, 4)), "b": np.zeros((2, 4, 32))}}}}
    return Adapter(branches, name="wide")


@pytest.mark.parametrize(
    ("make", "scale", "kind", "message"),
    [
        (
            wrong_dim,
            1.0,
            UserError,
            "wide: is for another model: it has 32 inputs of blocks.ffn.up",
        ),
        (lambda pair: "nowhere.pt", 1.0, UserError, "no such file"),
        (lambda pair: pair[0], float("nan"), UserError, "scale must be a finite number"),
        (lambda pair: pair[0], "1", TypeError, "scale must be a number"),
        (lambda pair: list(pair), [1.0], UserError, "2 adapters need as many scales, got 1"),
        (lambda pair: 3, 1.0, TypeError, "an adapter is a path or an Adapter, got int"),
        (lambda pair: [3], 1.0, TypeError, "an adapter is a path or an Adapter, got int"),
    ],
)
def test_what_cannot_be_plugged_in_is_named_before_anything_compiles(
    tiny, pair, make, scale, kind, message
):
    with Compilations() as compiled, pytest.raises(kind, match=message) as caught:
        tiny.with_adapter(make(pair), scale)
    assert "\n" not in str(caught.value) and not compiled.counts["_step"]


def test_values_that_are_not_finite_are_refused(tiny, pair):
    broken = jax.tree.map(lambda x: x * np.nan, pair[0].branches)
    with pytest.raises(UserError, match="NaN"):
        tiny.with_adapter(dataclasses.replace(pair[0], branches=broken))


def test_nothing_to_fuse(tiny):
    with pytest.raises(UserError, match="there is no adapter to fuse"):
        tiny.fuse_adapters()
