"""The attention path of every shipped config, on devices that are not present."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.cli import recipes
from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.planning.step import Clip, PlannedStep, lower
from longlive_jax.sampling.settings import SampleSpec
from longlive_jax.small_world.stage_dit import DiTStage
from longlive_jax.spec import UserError, build
from longlive_jax.training.stages.attention_path import attention_note
from longlive_jax.training.stages.wan_ar import WanARStage
from pallas_kernels.attention import LAST_RESORT, select_implementation
from pallas_kernels.dispatch import assumed_device

GPUS = {"A100": "8.0", "L40S": "8.9", "H200": "9.0", "GB200": "10.0", "RTX PRO 6000": "12.0"}
CHUNKS = {"16s": 12, "32s": 24, "64s": 48}
MODEL = DiTConfig(dtype="bfloat16")
CHUNK_TOKENS = 8 * 22 * 40


def stage_of(where: str) -> WanARStage:
    settings = recipes.load_config(where).to_dict()
    settings.pop("stage")
    return build(WanARStage, settings)


@pytest.mark.parametrize("capability", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("where", ["ar_5b:16s", "ar_5b:32s", "ar_5b:64s", "ar_5b:64s,nvfp4"])
def test_full_clips_take_cudnn_on_every_gpu(where, capability):
    chunks = CHUNKS[re.search(r"\d+s", where)[0]]
    with assumed_device("gpu", capability):
        path = stage_of(where).attention_path(MODEL, chunks, CHUNK_TOKENS)
    assert path == f"cudnn: {2 * chunks} dense segments in {chunks} calls"


@pytest.mark.parametrize("capability", GPUS.values(), ids=GPUS)
def test_small_recipes_have_small_dense_masks(capability):
    """Their window depends on the cuts of a sample."""
    stage, small = stage_of("own_clips"), DiTConfig(dim=256, heads=4, dtype="bfloat16")
    with assumed_device("gpu", capability):
        assert stage.attention_path(small, 4, 2 * 4 * 4) == "xla: dense mask"
    names = {field.name for field in dataclasses.fields(DiTStage)}
    assert "attention" not in names  # stage `dit` gathers the chunks of a window: attend_chunks


@pytest.mark.parametrize("capability", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", ["distilled", "two_step", "ar"])
def test_cached_sampling_takes_cudnn_on_every_gpu(kind, capability):
    settings = recipes.load_config(f"sample_5b:{kind}").to_dict()["sample"]
    spec = build(SampleSpec, settings)
    policy = CachePolicy(window=spec.window, global_sinks=spec.global_sinks)
    model = DiTConfig(layers=1, dim=256, heads=2, dtype="bfloat16")

    def sample():
        cache = empty_cache(model, 1, (8, 2, 2), policy)
        own = cache.upcoming(noisy=True)
        q, k = (jnp.zeros((1, n, 2, 128), jnp.bfloat16) for n in (32, policy.slots * 32))
        chosen.append(select_implementation(q, k, k, own, cache.tokens(own)))

    chosen: list[str] = []
    with assumed_device("gpu", capability):
        jax.eval_shape(sample)
    assert chosen == ["cudnn"]


def test_older_gpus_and_float32_have_another_path():
    stage = stage_of("ar_5b:16s")
    with assumed_device("gpu", "7.5"):
        assert stage.attention_path(MODEL, 12, CHUNK_TOKENS).startswith("xla: ")
        named = dataclasses.replace(stage, attention="cudnn")
        with pytest.raises(UserError, match=r"needs compute capability 8\.0"):
            named.attention_path(MODEL, 12, CHUNK_TOKENS)
    full = dataclasses.replace(stage, dtype="float32")
    with assumed_device("gpu", "9.0"):
        path = full.attention_path(DiTConfig(dtype="float32"), 12, CHUNK_TOKENS)
    assert path == "xla: 24 dense segments in 24 calls"


def test_a_long_clip_in_the_slowest_loop_is_warned_about():
    stage = dataclasses.replace(stage_of("ar_5b:64s"), window=4)
    tokens = 2 * 48 * CHUNK_TOKENS
    with assumed_device("gpu", "9.0"):
        path = stage.attention_path(MODEL, 48, CHUNK_TOKENS)
        assert path == LAST_RESORT
        assert "Warning" in attention_note(path, tokens, "bfloat16")
        assert "config.window" in attention_note(path, tokens, "bfloat16")
        assert "config.dtype=bfloat16" in attention_note(path, tokens, "float32")
        assert "Warning" not in attention_note(path, 1000, "bfloat16")
        assert attention_note("cudnn: x", tokens, "bfloat16") == "attention: cudnn: x"
    with assumed_device("cpu"):
        assert attention_note(path, tokens, "bfloat16") == f"attention: {LAST_RESORT}"


@pytest.mark.parametrize(("remat", "forwards"), [("attention_saved", 1), ("everything", 2)])
def test_a_training_step_for_a_gpu_attends_by_cudnn_without_a_conditional(remat, forwards):
    """The step of stage `clips` over a mesh, lowered for CUDA: inside `shard_map`, self-attention
    is one call a chunk and pass, and attention to the text one more."""
    # 1. Lower the step.
    clip = Clip(frames=8, chunk_frames=2, size=(4, 4, 4))
    model = DiTConfig(
        dim=32, ffn_dim=32, freq_dim=8, text_dim=8, text_len=8, heads=4, layers=3, in_channels=4,
        out_channels=4, dtype="bfloat16",
    )  # fmt: skip
    stage = WanARStage(
        checkpoint="nowhere", clips="nowhere", mesh=MeshSpec(data=2, sp=4), batch=2, remat=remat
    )
    mesh = make_mesh(stage.mesh, jax.devices()[:8])
    with assumed_device("gpu", "9.0"):
        text = lower(PlannedStep(stage, model, clip), mesh, platform="cuda").as_text()
    # 2. Count calls: the body of every scan is in the program once.
    calls = re.findall(r"custom_call @__cudnn\$fmhaSoftmax(Backward)?\(", text)
    to_text = 1
    assert calls.count("") == forwards * clip.chunks + 2 * to_text
    assert calls.count("Backward") == clip.chunks + to_text
    # 3. Nothing branches, and nothing is [tokens, tokens].
    assert "stablehlo.case" not in text and "stablehlo.if" not in text
    tokens = 2 * clip.chunks * clip.chunk_tokens
    assert f"{tokens}x{tokens}x" not in text
