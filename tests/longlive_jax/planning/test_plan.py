"""`planning`: the compiled step is the real one, and sizes equal those computed by hand."""

import dataclasses
import re

import jax
import pytest

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.encoding import EncodeSpec
from longlive_jax.data.clips.store import Manifest
from longlive_jax.models.wan import DiTConfig
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.chips import CHIPS
from longlive_jax.planning.collectives import traffic
from longlive_jax.planning.plan import (
    DEFAULT_CLIP,
    RESERVED_BYTES,
    PlanSpec,
    clip_of,
    estimate,
    min_bytes_per_device,
    remat_policies,
    scale_to_mesh,
)
from longlive_jax.planning.step import Clip, PlannedStep, lower
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.quant.policy import QuantSpec
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import RecyclingSpec
from longlive_jax.training.stages.wan_ar import WanARStage

GIB = 2**30
CLIP = Clip(frames=8, chunk_frames=2, size=(4, 6, 4))
MODEL = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=6, heads=2, layers=3, in_channels=4,
    out_channels=4,
)  # fmt: skip


def stage_of(**settings) -> WanARStage:
    defaults = {"checkpoint": "nowhere", "clips": "nowhere", "mesh": MeshSpec(data=2, sp=2)}
    return WanARStage(**defaults | {"batch": 2, "dtype": "float32"} | settings)


@pytest.fixture
def compiler(monkeypatch):
    """Installs a fake compiler with the peak `peak(stage)`; returns the list of its jobs."""
    jobs: list[dict] = []

    def install(peak):
        def compile_step(job):
            jobs.append(job)
            kinds = {"all-gather": {"count": 1, "bytes": 10.0}}
            return {
                "peak": peak(job["stage"]), "temporary": 1, "collectives": kinds,
                "seconds": {"tracing": 1.0, "compiling": 2.0},
            }  # fmt: skip

        monkeypatch.setattr(plan_compile, "refusal", lambda: None)
        monkeypatch.setattr(plan_compile, "compile_step", compile_step)
        return jobs

    return install


def test_the_planned_step_communicates_like_the_run():
    """Every layer exchanges q, k, v and output in the forward pass, in its recomputation, and as
    gradients. No array has the shape [queries, keys]."""
    stage = stage_of()
    step = PlannedStep(stage, MODEL, CLIP)
    mesh = make_mesh(stage.mesh, jax.devices()[:4])
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    text = lower(step, mesh).compile(compiler_options=options).as_text()
    volumes = traffic(text, mesh.size)
    tokens = 2 * CLIP.frames * 2 * 3  # clean and noisy, one sample
    exchange_bytes = tokens // 2 * MODEL.dim * 4 / 2
    assert volumes["all-to-all"].count == 12 * MODEL.layers
    assert volumes["all-to-all"].bytes == 12 * MODEL.layers * exchange_bytes
    assert volumes["all-gather"].count and volumes["all-reduce"].count
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)}
    assert not [s for s in shapes if s.count(tokens) > 1]


def test_sizes_and_flops_of_the_5b_model():
    stage = stage_of(mesh=MeshSpec(data=8, sp=4), batch=8, dtype="bfloat16", ffn_chunks=8)
    report = estimate(stage, PlanSpec("gb200", compile=False))
    assert report["parameters"] == 4_999_787_712
    assert report["devices"] == 32 and report["latent_frames"] == 384
    assert report["tokens_per_step"] == 8 * 675_840
    state = report["state_bytes_per_device"]
    assert state["parameters"] == pytest.approx(4 * 4_999_787_712 / 4, rel=2e-3)
    assert state["average"] == state["parameters"] and state["error_buffers"] == 0
    assert state["moments"] == pytest.approx(2 * state["parameters"], rel=1e-6)
    flops = report["flops"]
    assert sum(flops.values()) == report["flops_per_step"]
    assert flops["attention"] / report["flops_per_step"] == pytest.approx(0.88, abs=0.01)
    activations = report["activation_bytes_per_device"]
    assert activations["keys_and_values_of_a_layer"] == 2 * 168_960 * 3072 * 2
    assert activations["layer_inputs"] == 30 * 168_960 * 3072 * 4
    halved = dataclasses.replace(stage, stream_dtype="bfloat16")
    halved = estimate(halved, PlanSpec("gb200", compile=False))["activation_bytes_per_device"]
    assert halved == activations | {"layer_inputs": activations["layer_inputs"] // 2}
    assert report["kv_cache_bytes"] == 30 * 2 * 3 * 7040 * 3072 * 2
    assert report["peak_bytes_per_device"] is report["fits"] is None


@pytest.mark.parametrize(
    ("policy", "bytes_per_weight"), [("none", 2), ("fp8", 1), ("nvfp4_frozen", 4.5 / 8)]
)
def test_a_lora_of_the_5b_model_keeps_state_for_its_adapter_alone(policy, bytes_per_weight):
    stage = stage_of(
        mesh=MeshSpec(),
        batch=1,
        dtype="bfloat16",
        lora=LoRASpec(rank=128),
        quant=QuantSpec(policy),
        ema=None,
    )
    report = estimate(stage, PlanSpec("l40s", frames=32, compile=False))
    state, adapter = report["state_bytes_per_device"], 4 * 322_437_120
    assert state["parameters"] == adapter and state["average"] == 0
    assert state["moments"] == pytest.approx(2 * adapter, rel=1e-6)
    packed = 4_907_335_680  # weights of the 300 matrices
    rest = 2 * (4_999_787_712 - packed)
    assert state["frozen_parameters"] == pytest.approx(packed * bytes_per_weight + rest, rel=2e-3)
    full = estimate(
        dataclasses.replace(stage, lora=None, quant=QuantSpec()),
        PlanSpec("l40s", frames=32, compile=False),
    )
    assert 0.6 < report["flops_per_step"] / full["flops_per_step"] < 0.9
    assert state["frozen_parameters"] > full["state_bytes_per_device"]["frozen_parameters"] == 0


def test_the_planned_step_of_a_lora_compiles_sharded():
    mesh = MeshSpec(data=2, fsdp=2)
    stage = stage_of(mesh=mesh, batch=4, lora=LoRASpec(rank=4, dropout=0.1))
    step = PlannedStep(stage, MODEL, CLIP)
    mesh = make_mesh(stage.mesh, jax.devices()[:4])
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    volumes = traffic(lower(step, mesh).compile(compiler_options=options).as_text(), mesh.size)
    # A gradient is reduced for both factors of 10 linears, inside the scan over layers.
    assert volumes["reduce-scatter"].count == 20 * MODEL.layers
    assert not volumes["all-to-all"].count


def test_the_clip_is_read_from_the_manifest_even_before_any_clip_is_encoded(tmp_path):
    spec = EncodeSpec(join=JoinSpec(chunks=6, chunk_frames=4), size=(480, 832))
    Manifest(identity=dataclasses.asdict(spec), versions={}).write(tmp_path)
    assert clip_of(stage_of(clips=str(tmp_path))) == (Clip(24, 4, (30, 52, 48)), str(tmp_path))


@pytest.mark.parametrize(
    ("buffer", "frames"),
    [(BufferSpec(rows=12), 96), (BufferSpec(rows=12, by="chunk"), 384), (BufferSpec(), 384)],
)
def test_without_encoded_clips_the_length_follows_the_error_buffers(buffer, frames):
    stage = stage_of(recycling=RecyclingSpec(buffer=buffer))
    clip, origin = clip_of(stage)
    assert clip == dataclasses.replace(DEFAULT_CLIP, frames=frames)
    assert "no clips at nowhere" in origin
    assert clip_of(stage_of())[0] == DEFAULT_CLIP


def test_a_step_fits_if_its_peak_leaves_the_reserved_memory_free(compiler):
    usable = CHIPS["h100"].memory_bytes - RESERVED_BYTES
    for peak, fits in ((usable, True), (usable + 1, False)):
        compiler(lambda stage, peak=peak: peak)
        report = estimate(stage_of(), PlanSpec("h100"))
        assert report["fits"] is fits and report["peak_bytes_per_device"] == peak
        assert report["device_bytes"] == CHIPS["h100"].memory_bytes
        assert report["collective_bytes_per_step"] == 4 * 10.0


def test_the_fastest_policy_that_fits_is_chosen(compiler):
    """Policies whose lower bound does not fit are not compiled, except for the last one."""
    names = ("none", "attention_saved", "everything")
    policies = [(name, parts) for name in names for parts in (1, 8)]
    peaks = dict(zip(policies, (90, 85, 82, 81, 70, 60), strict=True))
    jobs = compiler(lambda stage: peaks[stage["remat"], stage["ffn_chunks"]] * GIB)
    stage = stage_of(mesh=MeshSpec(sp=8), batch=1, dtype="bfloat16")
    report = estimate(stage, PlanSpec("h100", frames=64, fastest=True))
    assert (report["remat"], report["ffn_parts"]) == ("everything", 1) and len(jobs) == 5
    assert [x["peak_bytes_per_device"] // GIB for x in report["does_not_fit"]] == [90, 85, 82, 81]
    jobs.clear()
    stage = stage_of(mesh=MeshSpec(sp=4), dtype="bfloat16", batch=1)
    report = estimate(stage, PlanSpec("h100", fastest=True))
    assert len(jobs) == 1 and len(report["does_not_fit"]) == 5
    assert all("at_least_bytes_per_device" in x for x in report["does_not_fit"])


def test_the_lower_bound_shrinks_with_more_recomputation():
    steps = [PlannedStep(stage, MODEL, CLIP) for stage in remat_policies(stage_of(), CLIP)]
    bounds = [min_bytes_per_device(step) for step in steps]
    assert bounds == sorted(bounds, reverse=True) and len(set(bounds)) > 2


def test_a_stage_scales_to_another_mesh():
    """Clips per sp group stay the same; groups and rows of the error buffers follow."""
    recycling = RecyclingSpec(buffer=BufferSpec(rows=48, groups=2))
    stage = stage_of(batch=4, recycling=recycling)
    scaled = scale_to_mesh(stage, MeshSpec(data=4, fsdp=2, sp=1), Clip(96, 8, (4, 6, 4)))
    assert scaled.batch == 16 and scaled.mesh.shape == (4, 2, 1)
    assert (scaled.recycling.buffer.groups, scaled.recycling.buffer.rows) == (8, 12)
    same = scale_to_mesh(stage, stage.mesh, Clip(384, 8, (4, 6, 4)))
    assert same == stage


def test_descriptions_and_topologies_of_chips():
    for chip in CHIPS.values():
        text = chip.description()
        assert text.count("{") == text.count("}") and str(chip.memory_bytes) in text
    assert "shared_memory_per_core: 102400" in CHIPS["l40s"].description()
    assert CHIPS["gb200"].topology(32) == "1x8x4"
    assert CHIPS["h200"].topology(8) == "1x1x8"
    assert CHIPS["h200"].topology(12) == "1x3x4"
