"""The stage `dmd`: updates, resuming, shared backbones, non-finite updates, refused settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from longlive_jax.adapters import load_adapter
from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import save_component
from longlive_jax.models.params import params_of
from longlive_jax.models.wan import DiT
from longlive_jax.parallel.mesh import make_mesh
from longlive_jax.spec import UserError
from longlive_jax.training.checkpointing import parameter_digests
from longlive_jax.training.loop import LoopSpec, train
from longlive_jax.training.objectives.dmd.roles import (
    CRITIC,
    CRITIC_BACKBONE,
    GENERATOR,
    STUDENT_BACKBONE,
    TEACHER,
)
from tests.longlive_jax.data.clips.models import write_encoders
from tests.longlive_jax.training.conftest import DIT
from tests.longlive_jax.training.stages import tiny_distillation

BOTH = (GENERATOR, CRITIC)


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory):
    """The checkpoint, and encoded prompts."""
    checkpoint = data_dir / "checkpoint"
    out = tmp_path_factory.mktemp("dmd") / "prompts"
    return checkpoint, tiny_distillation.encode_prompts(checkpoint, out)


@pytest.fixture(scope="module")
def small(folders, tmp_path_factory):
    """The stage and its task, whose programs all tests share."""
    return tiny_distillation.task(*folders, tmp_path_factory.mktemp("task"))


def spec(**changes):
    return LoopSpec(**{"steps": 4, "log_every": 1, "save_every": 2} | changes)


def updates(workdir):
    """Records of updates."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "steps_per_s" in record]


def packed(policy):
    """Settings that pack all three models."""
    return tuple(f"precision.{role}={policy}" for role in ("student", "teacher", "critic"))


def arrays(state):
    return jax.tree.map(np.asarray, state)


def test_updates_train_both_adapters_with_two_programs(small, tmp_path):
    _, task = small
    before = parameter_digests(task.frozen)
    state = train(task, tmp_path, spec())
    assert parameter_digests(task.frozen) == before

    # 1. Both adapters have changed; there is no EMA.
    for name in BOTH:
        group = state.groups[name]
        assert group.ema is None and int(group.bad_steps) == 0
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(arrays(group.params)))
    # 2. Two programs, each compiled once.
    programs = task.trainer.programs(BOTH)
    assert task.trainer.programs((CRITIC,)) == programs[1:]
    assert [program._cache_size() for program in programs] == [1, 1]
    # 3. The generator in every second step; the metrics of both.
    records = updates(tmp_path)
    assert ["generator_loss" in record for record in records] == [True, False, True, False]
    assert {"generator_matching_gradient", "generator_score_distance"} <= records[0].keys()
    levels = [k for record in records for k in record if k.startswith("critic_error_")]
    assert levels and all("critic_loss" in record for record in records)
    kinds = {k for record in records for k in record if k.startswith("seconds_")}
    assert kinds == {"seconds_critic", "seconds_generator_and_critic"}
    assert set(task.frozen) == {STUDENT_BACKBONE, TEACHER}


def test_a_resumed_run_equals_an_uninterrupted_one(small, tmp_path):
    _, task = small
    want = train(task, tmp_path / "uninterrupted", spec())
    train(task, tmp_path / "resumed", spec(steps=2))
    got = train(task, tmp_path / "resumed", spec())
    jax.tree.map(np.testing.assert_array_equal, arrays(want), arrays(got))


def test_resuming_over_another_base_is_refused(small, tmp_path):
    _, task = small
    train(task, tmp_path, spec(steps=2))
    changed = jax.tree.map(lambda x: x + 1, task.frozen[TEACHER])
    other = dataclasses.replace(task, frozen={**task.frozen, TEACHER: changed})
    with pytest.raises(UserError, match=r"frozen parameters are not those of step 2: teacher\."):
        train(other, tmp_path, spec())


def test_a_critic_that_is_not_finite_changes_nothing(small, tmp_path):
    """Its own update is skipped, and so is the generator's, which it scores."""
    _, task = small
    state, batch = task.trainer.init(), batch_of(task)
    critic = state.groups[CRITIC]
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), critic.params)
    groups = {**state.groups, CRITIC: dataclasses.replace(critic, params=broken)}
    generator = arrays(state.groups[GENERATOR].params)
    state = dataclasses.replace(state, groups=groups)
    state, metrics = task.trainer.program(BOTH)(state, task.frozen, batch)
    assert int(metrics["critic_bad_steps"]) == int(metrics["generator_bad_steps"]) == 1
    assert int(state.groups[CRITIC].bad_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, arrays(state.groups[GENERATOR].params), generator)


def batch_of(task):
    with task.batches.feed(0) as feed:
        return task.batches.put(next(feed))


def test_separate_backbones_give_the_same_update(small, folders, tmp_path):
    stage, task = small
    separate = dataclasses.replace(stage, share_backbones=False)
    mesh = make_mesh(stage.mesh, jax.devices()[:1])
    frozen = separate.frozen(separate.model(), mesh)
    assert set(frozen) == {STUDENT_BACKBONE, CRITIC_BACKBONE, TEACHER}
    assert task.frozen[TEACHER] is task.frozen[STUDENT_BACKBONE]
    assert len({id(jax.tree.leaves(params)[0]) for params in frozen.values()}) == 3
    update, batch = task.trainer.program((CRITIC,)), batch_of(task)
    want, _ = update(task.trainer.init(), task.frozen, batch)
    got, _ = update(task.trainer.init(), frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, arrays(want), arrays(got))


@pytest.mark.parametrize("policy", ["fp8", pytest.param("nvfp4_frozen", marks=pytest.mark.slow)])
def test_packed_models_train_by_the_command_and_leave_adapters(folders, tmp_path, policy):
    """All three are packed; the export has the sampling settings, and a run goes on from it."""
    preview = ("preview.prompts=['a cat runs']", "preview.seconds=0.5", "preview_steps=(2,1)")
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = (*packed(policy), "loop.steps=1", "loop.save_every=1")
    assert run(tiny_distillation.command(*folders, first, *arguments, *preview)) == 0
    assert (first / "sample_000001_2_steps.png").stat().st_size > 500
    assert (first / "sample_000001_1_steps.png").stat().st_size > 500

    # 1. The adapters.
    generator = load_adapter(f"{first}-out")
    critic = load_adapter(f"{first}-out", role="critic")
    assert generator.role == "generator" and critic.role == "critic"
    want = {"steps": 2, "shift": 5.0, "solver": "unipc", "guidance": 1.0}
    assert dict(generator.settings) == want and generator.rank == 4 and generator.scale == 1.0

    # 2. A run goes on from them.
    more = (*arguments, f"init_adapters={first}-out", "optim.lr=0", "optim.weight_decay=0")
    assert run(tiny_distillation.command(*folders, second, *more)) == 0
    same = load_adapter(f"{second}-out")
    jax.tree.map(np.testing.assert_array_equal, generator.branches, same.branches)


def test_first_images_reach_both_losses(data_dir, tmp_path):
    """Image to video; the programs are traced, not compiled."""
    scripts, images = tmp_path / "scripts.jsonl", tmp_path / "images"
    scripts.write_text('{"name": "walk", "shots": [{"caption": "a cat walks", "chunks": 2}]}\n')
    images.mkdir()
    Image.fromarray(np.full((64, 32, 3), 90, np.uint8)).save(images / "walk.png")
    checkpoint, prompts = data_dir / "checkpoint", tmp_path / "prompts"
    command = ["data", "encode", f"--scripts={scripts}", f"--checkpoint={checkpoint}"]
    assert run([*command, f"--out={prompts}", f"--first_images={images}"]) == 0
    change = ("image_to_video=true", "scores.per_chunk=true")
    _, task = tiny_distillation.task(checkpoint, prompts, tmp_path, *change)
    batch = batch_of(task)
    assert batch["first_frame"].shape == (2, 4, 2, 4)
    update = task.trainer.program(BOTH)
    state, metrics = jax.eval_shape(update, task.trainer.abstract, task.frozen, batch)
    assert metrics["generator_loss"].shape == metrics["critic_loss"].shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(task.trainer.abstract)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "nvfp4_frozen"])
def test_eight_devices_sample_and_train_like_one(folders, tmp_path, policy):
    settings = ("batch=4", "loop.steps=1", "preview.prompts=['a cat runs']", *packed(policy))
    meshes = {"one": (), "eight": ("mesh.data=2", "mesh.fsdp=2", "mesh.sp=2")}
    for name, mesh in meshes.items():
        more = (*settings, *mesh, "preview.seconds=0.5", "preview_steps=(1,)")
        assert run(tiny_distillation.command(*folders, tmp_path / name, *more)) == 0
    want, got = (updates(tmp_path / name)[0] for name in meshes)
    limit = (
        1e-4 if policy == "none" else 0.1
    )  # stochastic rounding draws other numbers on every device
    for name in ("generator_loss", "critic_loss", "generator_grad_norm", "critic_grad_norm"):
        assert got[name] == pytest.approx(want[name], rel=limit), name
    assert (tmp_path / "eight" / "sample_000001_1_steps.png").stat().st_size > 500


@pytest.fixture(scope="module")
def other_family(tmp_path_factory):
    """A checkpoint whose DiT has another width."""
    folder = write_encoders(tmp_path_factory.mktemp("other") / "checkpoint")
    model = dataclasses.replace(DIT, dim=32)
    save_component(folder, "dit", params_of(DiT(model, rngs=nnx.Rngs(0))), model)
    return folder


REFUSED = {
    "teacher={other}": r"config\.teacher: .* has dim 32 and config\.checkpoint has 64",
    "teacher=nowhere": r"nowhere",
    "checkpoint=nowhere": r"nowhere",
    "prompts={clips}": r"has no scripts",
    "batch=3": r"batch = 3 does not divide by loop\.accumulate = 2",
    "lora.rank=65": r"lora\.rank 65 is above the 64 of",
    "lora.targets=blocks/x": r"no kernel matches",
    "rollout.steps=0": r"rollout\.steps must be >= 1, got 0",
    "preview_steps=(4,0)": r"preview_steps must be >= 1",
    "ffn_chunks=7": r"ffn_chunks = 7 does not divide the \d+ tokens",
    "init_adapters={clips}": r"encoded",
    "image_to_video=true": r"has no first images",
    "precision.student=int8": r"precision\.student",
}


@pytest.mark.parametrize("change", REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    data_dir, folders, other_family, tmp_path, change
):
    message = REFUSED[change]
    change = change.format(other=other_family, clips=data_dir / "encoded")
    more = ("loop.accumulate=2",) if change.startswith("batch") else ()
    with pytest.raises((UserError, ValueError), match=message) as error:
        tiny_distillation.task(*folders, tmp_path, change, *more)
    assert "\n" not in str(error.value)
