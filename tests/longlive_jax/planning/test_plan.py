"""Plans: the step that is compiled is the real one, and the numbers are those of arithmetic."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.data.clips.clip_plan import JoinSpec
from longlive_jax.data.clips.encoding import EncodeSpec
from longlive_jax.data.clips.store import Manifest
from longlive_jax.models.wan import DiTConfig
from longlive_jax.models.wan import attention as text_attention
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.chips import CHIPS
from longlive_jax.planning.collectives import traffic
from longlive_jax.planning.plan import (
    RESERVED,
    WHOLE,
    PlanSpec,
    clip_of,
    least_bytes,
    moved,
    plan,
    policies,
)
from longlive_jax.planning.step import Clip, PlannedStep, fused, lower
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import RecyclingSpec
from longlive_jax.training.stages.wan_ar import WanARStage
from pallas_kernels.attention import attention

GIB = 2**30
CLIP = Clip(frames=8, chunk_frames=2, size=(4, 6, 4))
MODEL = DiTConfig(
    dim=24, ffn_dim=32, freq_dim=8, text_dim=8, text_len=6, heads=2, layers=3, in_channels=4,
    out_channels=4,
)  # fmt: skip


def stage_of(**settings) -> WanARStage:
    held = {"checkpoint": "nowhere", "clips": "nowhere", "mesh": MeshSpec(data=2, sp=2)}
    return WanARStage(**held | {"batch": 2, "dtype": "float32"} | settings)


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that says what the test wants; the jobs it was given."""
    jobs: list[dict] = []

    def says(peak):
        def compiled(job):
            jobs.append(job)
            kinds = {"all-gather": {"count": 1, "bytes": 10.0}}
            return {
                "peak": peak(job["stage"]), "temporary": 1, "collectives": kinds,
                "seconds": {"tracing": 1.0, "compiling": 2.0},
            }  # fmt: skip

        monkeypatch.setattr(plan_compile, "refusal", lambda: None)
        monkeypatch.setattr(plan_compile, "compiled", compiled)
        return jobs

    return says


def test_the_step_over_a_mesh_exchanges_what_the_run_would():
    """Every layer's q, k, v and output forward, the same again when it is recomputed, and their
    gradients; and no array has queries by keys."""
    stage = stage_of()
    step = PlannedStep(stage, MODEL, CLIP)
    mesh = make_mesh(stage.mesh, jax.devices()[:4])
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    text = lower(step, mesh).compile(compiler_options=options).as_text()
    found = traffic(text, mesh.size)
    tokens = 2 * CLIP.frames * 2 * 3  # clean and noisy, of one sample
    one = tokens // 2 * MODEL.dim * 4 / 2
    assert found["all-to-all"].count == 12 * MODEL.layers
    assert found["all-to-all"].bytes == 12 * MODEL.layers * one
    assert found["all-gather"].count and found["all-reduce"].count
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)}
    assert not [s for s in shapes if s.count(tokens) > 1]
    assert text_attention.attention is attention  # the stand-in has left


def test_the_stand_in_keeps_what_a_fused_kernel_keeps():
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 8), jnp.bfloat16) for n in (10, 6))
    out, pull = jax.eval_shape(lambda *x: jax.vjp(fused, *x), q, k, k)
    kept = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(pull) if x.size > 1)
    lse = ((2, 10, 3), "float32")
    wanted = [lse, *[(x.shape, "bfloat16") for x in (k, k, q, q)]]
    assert (out.shape, out.dtype) == (q.shape, q.dtype) and kept == sorted(wanted)
    grads = jax.grad(lambda *x: fused(*x).astype(jnp.float32).sum(), (0, 1, 2))
    shapes = jax.eval_shape(grads, q, k, k)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in (q, k, k)]


def test_sizes_and_operations_of_the_5b_model():
    stage = stage_of(mesh=MeshSpec(data=8, sp=4), batch=8, dtype="bfloat16", ffn_chunks=8)
    report = plan(stage, PlanSpec("gb200", compile=False))
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
    kept = report["activation_bytes_per_device"]
    assert kept["keys_and_values_of_a_layer"] == 2 * 168_960 * 3072 * 2
    assert kept["layer_inputs"] == 30 * 168_960 * 3072 * 4
    halved = dataclasses.replace(stage, stream_dtype="bfloat16")
    halved = plan(halved, PlanSpec("gb200", compile=False))["activation_bytes_per_device"]
    assert halved == kept | {"layer_inputs": kept["layer_inputs"] // 2}
    assert report["kv_cache_bytes"] == 30 * 2 * 3 * 7040 * 3072 * 2
    assert report["peak_bytes_per_device"] is report["fits"] is None


def test_clips_are_the_run_s_own_also_before_all_are_encoded(tmp_path):
    spec = EncodeSpec(join=JoinSpec(chunks=6, chunk_frames=4), size=(480, 832))
    Manifest(identity=dataclasses.asdict(spec), versions={}).write(tmp_path)
    assert clip_of(stage_of(clips=str(tmp_path))) == (Clip(24, 4, (30, 52, 48)), str(tmp_path))


@pytest.mark.parametrize(
    ("buffer", "frames"),
    [(BufferSpec(rows=12), 96), (BufferSpec(rows=12, by="chunk"), 384), (BufferSpec(), 384)],
)
def test_clips_that_are_not_there_are_as_long_as_the_error_buffers(buffer, frames):
    stage = stage_of(recycling=RecyclingSpec(buffer=buffer))
    clip, why = clip_of(stage)
    assert clip == dataclasses.replace(WHOLE, frames=frames) and "there is no nowhere" in why
    assert clip_of(stage_of())[0] == WHOLE


def test_a_step_fits_with_room_for_what_is_not_in_it(compiler):
    there = CHIPS["h100"].memory - RESERVED
    for peak, fits in ((there, True), (there + 1, False)):
        compiler(lambda stage, peak=peak: peak)
        report = plan(stage_of(), PlanSpec("h100"))
        assert report["fits"] is fits and report["peak_bytes_per_device"] == peak
        assert report["device_bytes"] == CHIPS["h100"].memory
        assert report["collective_bytes_per_step"] == 4 * 10.0


def test_the_fastest_way_that_fits(compiler):
    """Nothing is compiled that cannot fit by what it must hold; the last is compiled anyway."""
    peaks = {(False, 1): 90, (False, 8): 85, (True, 1): 70, (True, 8): 60}
    jobs = compiler(lambda stage: peaks[stage["remat"], stage["ffn_chunks"]] * GIB)
    stage = stage_of(mesh=MeshSpec(sp=8), batch=1, dtype="bfloat16")
    report = plan(stage, PlanSpec("h100", frames=64, fastest=True))
    assert (report["remat"], report["ffn_chunks"]) == (True, 1) and len(jobs) == 3
    assert [x["peak_bytes_per_device"] // GIB for x in report["does_not_fit"]] == [90, 85]
    jobs.clear()
    stage = stage_of(mesh=MeshSpec(sp=4), dtype="bfloat16", batch=1)
    report = plan(stage, PlanSpec("h100", fastest=True))
    assert len(jobs) == 1 and len(report["does_not_fit"]) == 3
    assert all("at_least_bytes_per_device" in x for x in report["does_not_fit"])


def test_what_a_step_must_hold_grows_as_less_is_recomputed():
    ways = policies(stage_of(), CLIP)
    least = [least_bytes(PlannedStep(way, MODEL, CLIP)) for way in ways]
    assert least == sorted(least, reverse=True) and len(set(least)) > 2


def test_a_stage_on_another_mesh():
    """As many clips a group of devices; error buffers with the groups and rows that then fit."""
    recycling = RecyclingSpec(buffer=BufferSpec(rows=48, groups=2))
    stage = stage_of(batch=4, recycling=recycling)
    found = moved(stage, MeshSpec(data=4, fsdp=2, sp=1), Clip(96, 8, (4, 6, 4)))
    assert found.batch == 16 and found.mesh.shape == (4, 2, 1)
    assert (found.recycling.buffer.groups, found.recycling.buffer.rows) == (8, 12)
    same = moved(stage, stage.mesh, Clip(384, 8, (4, 6, 4)))
    assert same == stage


def test_chips_describe_themselves():
    for chip in CHIPS.values():
        text = chip.description()
        assert text.count("{") == text.count("}") and str(chip.memory) in text
    assert CHIPS["gb200"].topology(32) == "1x8x4"
    assert CHIPS["h200"].topology(8) == "1x1x8"
    assert CHIPS["h200"].topology(12) == "1x3x4"
