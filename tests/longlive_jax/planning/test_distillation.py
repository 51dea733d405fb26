"""The plan of a distillation: three models, two updates, and the rows of the paper's Table 2."""

import dataclasses
import json
import re

import jax
import pytest
from flax import nnx

from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.planning import compile as plan_compile
from longlive_jax.planning.distillation import estimate_distillation, on_mesh
from longlive_jax.planning.distillation_step import PlannedDistillation
from longlive_jax.planning.plan import PlanSpec
from longlive_jax.planning.step import Clip, lower
from longlive_jax.quant.lora import LoRASpec
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.dmd.draws import RolloutSpec
from longlive_jax.training.stages.frozen_roles import RolePrecision
from longlive_jax.training.stages.wan_dmd import WanDMDStage

CONFIG = "--config=configs/dmd_5b.py"
ROWS = ("t2v", "t2v,nvfp4_student", "t2v,nvfp4_teacher", "t2v,nvfp4")
"""Arguments of the four rows of Table 2: bf16, then NVFP4 student, teacher and critic."""
GIB, GB = 2**30, 10**9
TINY = DiTConfig(
    dim=32, ffn_dim=48, freq_dim=8, text_dim=8, text_len=6, heads=2, layers=2, in_channels=4,
    out_channels=4,
)  # fmt: skip
compiles = pytest.mark.skipif(
    plan_compile.refusal() is not None, reason="no CUDA plugin to compile with"
)


def plan(capsys, argument, *words):
    assert run(["plan", f"{CONFIG}:{argument}", *words]) == 0
    return capsys.readouterr().out


def json_of(capsys, argument, *words):
    return json.loads(plan(capsys, argument, "--json", *words))


def test_bytes_of_the_models_by_role(capsys):
    reports = [json_of(capsys, row, "--chip=gb200", "--no-compile") for row in ROWS]
    for report in reports:
        assert report["devices"] == report["batch"] == 1 and report["latent_frames"] == 32
        assert report["size"] == [44, 80, 48] and report["remat"] == "everything"
        state = report["state_bytes_per_device"]
        assert state["adapters"] == 2 * 4 * 322_437_120 and state["average"] == 0
        activations = report["activation_bytes_per_device"]
        assert activations["layer_inputs"] == 30 * 28_160 * 3072 * 2
        assert activations["kv_cache"] == 2 * activations["layer_inputs"]
        assert report["peak_bytes_per_device"] is report["fits"] is None
    sizes = [{k: x["bytes"] / GB for k, x in report["roles"].items()} for report in reports]
    bf16, two_way, one_way = 10.0, 5.71, 2.95  # packed with and without the transposed copy
    wanted = [
        (bf16, bf16, bf16),
        (two_way, bf16, bf16),
        (two_way, bf16, one_way),
        (two_way, 0, one_way),
    ]
    for got, want in zip(sizes, wanted, strict=True):
        assert tuple(got.values()) == pytest.approx(want, rel=0.01)
    owners = [report["roles"]["critic"]["shared_with"] for report in reports]
    assert owners == [None, None, None, "student"]


def test_chips_without_fp4_units_keep_no_transposed_copy(capsys):
    report = json_of(capsys, "t2v,nvfp4", "--chip=h200", "--no-compile")
    assert report["roles"]["student"]["bytes"] == report["roles"]["teacher"]["bytes"]


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    peaks = iter((60 * GIB, 50 * GIB))
    jobs = []

    def compile_step(job):
        jobs.append(job)
        return {
            "peak": next(peaks), "arguments": 30 * GIB, "temporary": 1,
            "seconds": {"tracing": 1.0, "compiling": 2.0}, "collectives": {},
        }  # fmt: skip

    monkeypatch.setattr(plan_compile, "compile_step", compile_step)
    out = plan(capsys, "t2v", "--chip=gb200")
    assert [job["group"] for job in jobs] == ["generator", "critic"]
    table = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert table["teacher"] == "none, 9.32 GiB per device"
    assert table["batch"].startswith("1 videos of 32 x 44x80x48 (5 s) in chunks of 8, 4 steps")
    assert table["critic's update"].startswith("peak 50.0 GiB per device, 30.0 of them arguments")
    assert table["peak memory"].startswith("60.0 GiB per device: fits")
    # Without a compile.
    out = plan(capsys, "t2v,nvfp4", "--chip=gb200", "--no-compile")
    assert "critic         nvfp4_frozen, the arrays of the student" in out


def test_arrays_that_two_roles_share_count_once(monkeypatch):
    """All three models are one, as for an adapter that suits any model of the family."""
    stage = WanDMDStage(checkpoint="nowhere", batch=1, lora=LoRASpec(rank=4))
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    result = {"peak": 40 * GB, "arguments": 25 * GB, "temporary": 1, "collectives": {}}
    result["seconds"] = {"tracing": 1.0, "compiling": 2.0}
    monkeypatch.setattr(plan_compile, "compile_step", lambda job: result)
    report = estimate_distillation(stage, PlanSpec("gb200", frames=32))
    assert report["roles"]["teacher"]["shared_with"] == "student"
    assert report["roles"]["teacher"]["bytes"] == report["roles"]["critic"]["bytes"] == 0
    saved = report["roles"]["student"]["bytes"]
    assert report["peak_bytes_per_device"] == 40 * GB - saved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fastest", "--fastest is for stage 'clips'"),
        ("--size=44x80x16", "the model takes latents of 48 channels, got 16"),
        ("--frames=30", "not a multiple of the 8 frames of a chunk. Set it to 32"),
        ("--config.ffn_chunks=7", "config.ffn_chunks = 7 does not divide the 28160 tokens"),
        ("--config.batch=9", "config.batch must be a multiple of config.mesh.data *"),
        ("--config.lora.rank=4000", "lora.rank 4000 is above the 3072"),
        ("--mesh=sp=5", "24 attention heads do not split over mesh.sp = 5"),
    ],
)
def test_mistakes_are_reported_before_anything_is_compiled(capsys, monkeypatch, words, message):
    monkeypatch.setattr(plan_compile, "refusal", lambda: None)
    monkeypatch.setattr(plan_compile, "compile_step", None)
    assert run(["plan", CONFIG, "--chip=gb200", *words.split()]) == 2
    output = capsys.readouterr()
    assert message in output.err and not output.out


def test_the_batch_follows_the_mesh():
    stage = WanDMDStage(checkpoint="nowhere", batch=32, mesh=MeshSpec(data=4, fsdp=8))
    assert on_mesh(stage, MeshSpec()).batch == 1
    assert on_mesh(stage, MeshSpec(data=2, sp=2)).batch == 2
    with pytest.raises(UserError, match="must be a multiple"):
        on_mesh(dataclasses.replace(stage, batch=30), MeshSpec())


@pytest.mark.parametrize("group", ["generator", "critic"])
def test_an_update_is_lowered_with_the_arguments_of_the_run(group):
    """The frozen models are not donated; the state is, and comes back."""
    stage = WanDMDStage(checkpoint="nowhere", batch=1, lora=LoRASpec(rank=4), dtype="float32")
    stage = dataclasses.replace(stage, rollout=RolloutSpec(chunks=2))
    step = PlannedDistillation(stage, TINY, Clip(4, 2, (4, 8, 4)), group)
    lowered = lower(step, make_mesh(MeshSpec(), jax.devices()[:1]))
    state, frozen, _ = lowered.args_info[0]
    donated = {x.donated for x in jax.tree.leaves(state)}
    assert donated == {True} and not any(x.donated for x in jax.tree.leaves(frozen))
    assert set(frozen) == {"student_backbone", "teacher"}
    assert jax.tree.structure(lowered.out_info[0]) == jax.tree.structure(state)


@compiles
@pytest.mark.slow
def test_both_updates_of_a_small_model_are_compiled(tmp_path):
    """Their arguments are the frozen models, both adapters with their moments, and a batch."""
    folder = tmp_path / "tiny"
    save_component(folder, "dit", params_of(DiT(TINY, rngs=nnx.Rngs(0))), TINY)
    packed = RolePrecision(student="nvfp4_frozen", teacher="nvfp4_frozen", critic="nvfp4_frozen")
    stage = WanDMDStage(
        checkpoint=str(folder), batch=1, lora=LoRASpec(rank=4), precision=packed, dtype="float32"
    )
    spec = PlanSpec("gb200", frames=4, chunk_frames=2, size=(4, 8, 4))
    report = estimate_distillation(stage, spec)
    assert set(report["updates"]) == {"generator", "critic"}
    frozen = sum(role["bytes"] for role in report["roles"].values())
    least = frozen + sum(report["state_bytes_per_device"].values())
    for update in report["updates"].values():
        assert least < update["argument_bytes_per_device"] < 2 * least
        assert update["argument_bytes_per_device"] < update["peak_bytes_per_device"]
        assert update["collective_bytes_per_step"] == 0
    peaks = [update["peak_bytes_per_device"] for update in report["updates"].values()]
    assert report["peak_bytes_per_device"] == max(peaks) and report["fits"] is True


@compiles
@pytest.mark.slow
def test_rows_of_table_2(capsys):
    """The order of the paper's rows, its ratio of the last to the first, and 40 GB."""
    reports = [json_of(capsys, row, "--chip=gb200") for row in ROWS]
    peaks = [report["peak_bytes_per_device"] for report in reports]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    assert peaks[-1] <= 0.69 * peaks[0]
    assert peaks[-1] <= 40 * GB
