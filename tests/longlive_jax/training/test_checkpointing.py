"""Checkpoints: restoring on any mesh, partial states, damage, other models, full disks."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.quant.low_rank import LoRAKernel, LowRank
from longlive_jax.spec import Failure, UserError
from longlive_jax.training import checkpointing as module
from longlive_jax.training.checkpointing import (
    LORA,
    TrainCheckpoints,
    parameter_digests,
    restore_weights,
)
from longlive_jax.training.fingerprints import fingerprints
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import RecyclingSpec, buffer_state
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.state import Trained, TrainState
from longlive_jax.training.update import EMASpec, Group, Trainer, stateless
from pallas_kernels.nvfp4 import quantize
from tests.longlive_jax.training.toy_task import two_groups


def state_of(step: int, sharding: NamedSharding | None = None) -> TrainState:
    w = np.random.default_rng(step).normal(size=(64, 16)).astype(np.float32)
    params = {"w": w, "b": jnp.full(3, step, jnp.bfloat16)}
    count = jnp.asarray(step, jnp.int32)
    trained = Trained(params, jax.tree.map(jnp.copy, params), (count + 0,), count * 0)
    state = TrainState(count, {"model": trained})
    if sharding is None:
        return jax.device_put(state)
    replicated = NamedSharding(sharding.mesh, P())
    return jax.tree.map(lambda x: jax.device_put(x, sharding if x.ndim == 2 else replicated), state)


def shapes_of(state):
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def model(state):
    """The only group of a state."""
    return state.groups["model"]


def row_sharding(*shape):
    """Rows over fsdp and sp of a mesh of this shape."""
    mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
    return NamedSharding(mesh, P(("fsdp", "sp")))


@pytest.fixture
def workdir(tmp_path):
    """Work directory with checkpoints of steps 10, 20 and 30."""
    with TrainCheckpoints(tmp_path, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state_of(step))
    return tmp_path


def restore(folder, target=None, *, complete=False, origin=None):
    """The result of `TrainCheckpoints.restore`, and the messages that it reported."""
    messages, target = [], shapes_of(state_of(0)) if target is None else target
    with TrainCheckpoints(folder, origin=origin) as checkpoints:
        result = checkpoints.restore(target, notify=messages.append, complete=complete)
    return result, messages


def test_the_newest_checkpoint_is_restored(workdir):
    (step, state), messages = restore(workdir)
    assert step == 30 and not messages
    chex.assert_trees_all_equal(state, state_of(30))
    chex.assert_trees_all_equal_dtypes(state, state_of(30))


def test_without_checkpoints_nothing_is_restored(tmp_path):
    assert restore(tmp_path) == (None, [])


def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5, row_sharding(2, 1, 4)))
    for sharding in (row_sharding(1, 1, 2), row_sharding(1, 1, 1)):
        (_, state), _ = restore(tmp_path, shapes_of(state_of(0, sharding)))
        chex.assert_trees_all_equal(state, state_of(5))
        kernel = state.groups["model"].params["w"]
        assert kernel.sharding.is_equivalent_to(sharding, 2)


def test_a_part_of_the_state_can_be_restored_alone(workdir):
    target = {"groups": {"model": {"ema": {"w": shapes_of(model(state_of(0))).ema["w"]}}}}
    (step, part), _ = restore(workdir, target)
    assert step == 30 and jax.tree.structure(part) == jax.tree.structure(target)
    chex.assert_trees_all_equal(jax.tree.leaves(part), [model(state_of(30)).ema["w"]])


def test_the_ema_alone_can_be_restored_on_another_mesh(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5, row_sharding(2, 1, 4)))
    wanted = shapes_of(model(state_of(0, row_sharding(1, 1, 2)))).ema
    step, ema = restore_weights(tmp_path, wanted, group="model", notify=pytest.fail)
    assert step == 5 and ema["w"].sharding.is_equivalent_to(wanted["w"].sharding, 2)
    chex.assert_trees_all_equal(ema, jax.device_get(model(state_of(5)).ema))
    with pytest.raises(UserError, match="has no checkpoint of a run"):
        restore_weights(tmp_path / "nothing", wanted, group="model", notify=pytest.fail)


def lora_state(seed):
    """A state whose matrix has a low-rank branch."""
    state, rng = state_of(seed), np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 2), (2, 16)))
    params = {"q": {"kernel": LoRAKernel(model(state).params["w"], LowRank(a, b, 0.5))}}
    trained = model(state).replace(params=params, ema=jax.tree.map(jnp.copy, params))
    return state.replace(groups={"model": trained})


def test_low_rank_branches_alone_can_be_restored_onto_another_base(tmp_path):
    trained, base = lora_state(5), lora_state(6)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, trained)
    shapes, other = (model(x).params["q"]["kernel"] for x in (shapes_of(base), base))
    mixed = {"q": {"kernel": dataclasses.replace(shapes, kernel=other.kernel)}}
    options = {"group": "model", "part": "params", "notify": pytest.fail}
    step, params = restore_weights(tmp_path, mixed, only=LORA, **options)
    kernel = params["q"]["kernel"]
    assert step == 5 and kernel.kernel is other.kernel
    chex.assert_trees_all_equal(kernel.branch, model(trained).params["q"]["kernel"].branch)
    with pytest.raises(UserError, match="no parameter's path matches 'lora_'"):
        restore_weights(tmp_path, mixed, only="lora_", **options)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_description(folder):
    """Changes the name of a required entry; the description is still valid JSON."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"fingerprints", b"fingerprintr"))


def flip_shape(folder):
    """Changes a shape, as if the checkpoint were of another model."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"64", b"65", 1))


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# Orbax leaves threads behind that raise errors of their own after reading damaged files.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGE = {
    "flipped bit": flip,
    "flipped bit in a name of the description": flip_description,
    "flipped bit in a shape of the description": flip_shape,
    "missing file": lambda folder: largest(folder).unlink(),
    "truncated file": truncate,
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no description": lambda folder: shutil.rmtree(folder / "about"),
    "empty folder": empty,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_moved_aside_and_the_previous_checkpoint_is_used(workdir, kind):
    DAMAGE[kind](workdir / "state/30")
    (step, state), messages = restore(workdir)
    assert step == 20
    chex.assert_trees_all_equal(state, state_of(20))
    assert len(messages) == 1 and "step 30 is damaged" in messages[0]
    assert (workdir / "damaged/30.0").is_dir() and not (workdir / "state/30").exists()
    with TrainCheckpoints(workdir) as checkpoints:  # the step can be saved again
        checkpoints.save(30, state_of(30))
    assert restore(workdir)[0][0] == 30


def test_without_fingerprints_a_flipped_bit_is_restored_silently(workdir, monkeypatch):
    """Orbax itself does not notice it, so the fingerprints are needed."""
    flip(workdir / "state/30")
    monkeypatch.setattr(module, "fingerprints", lambda tree: {})
    (step, state), messages = restore(workdir)
    assert step == 30 and not messages
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(state, state_of(30))


def test_if_all_checkpoints_are_damaged_the_error_leaves_them_in_place(workdir):
    for step in (10, 20, 30):
        truncate(workdir / f"state/{step}")
    with pytest.raises(UserError, match=r"no checkpoint can be read.*step 30.*step 10"):
        restore(workdir)
    assert not (workdir / "damaged").exists()


def test_an_unfinished_checkpoint_is_ignored(workdir):
    (workdir / "state/40.orbax-checkpoint-tmp").mkdir()
    assert restore(workdir)[0][0] == 30


def test_a_checkpoint_of_another_model_is_refused(workdir):
    target = shapes_of(state_of(0))
    model(target).params["w"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    with pytest.raises(
        UserError,
        match=r"another model.*params/w is float32 \[64, 16\] there and float32 \[64, 8\]",
    ):
        restore(workdir, target)


def test_a_complete_restore_refuses_stored_arrays_that_the_state_lacks(workdir):
    """A part may be restored alone, but a resumed run must not lose arrays, such as a LoRA."""
    target = shapes_of(state_of(0))
    del model(target).params["b"]
    assert restore(workdir, target)[0][0] == 30
    with pytest.raises(UserError, match=r"params/b is bfloat16 \[3\] there and missing here"):
        restore(workdir, target, complete=True)


def test_resuming_with_another_origin_is_reported(tmp_path):
    origin = {"seed": 1, "clips": "abc"}
    with TrainCheckpoints(tmp_path, origin=origin) as checkpoints:
        checkpoints.save(5, state_of(5))
    assert restore(tmp_path, complete=True, origin=origin)[1] == []
    result, messages = restore(tmp_path, complete=True, origin=origin | {"seed": 2})
    assert result[0] == 5 and len(messages) == 1
    assert messages[0].startswith("seed was 1 when step 5 was checkpointed and is 2 now")


def test_the_disk_needs_room_for_one_copy_of_replicated_arrays(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    mesh = make_mesh(MeshSpec(4, 1, 1), jax.devices()[:4])
    state = jax.device_put({"w": jnp.zeros(1000)}, NamedSharding(mesh, P()))
    with TrainCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 4000))
        checkpoints.check_disk_space(state)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 3999))
        with pytest.raises(Failure, match="newest checkpoint: none"):
            checkpoints.check_disk_space(state)


def test_a_full_disk_loses_no_checkpoint(workdir, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with (
        pytest.raises(Failure, match=r"a checkpoint needs up to .*newest checkpoint: step 30"),
        TrainCheckpoints(workdir) as checkpoints,
    ):
        checkpoints.save(40, state_of(40))
    assert restore(workdir)[0][0] == 30


def test_a_failed_checkpoint_is_reported_once(workdir, monkeypatch):
    """Closing raises the same error again, which must not replace the first message."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    failure = pytest.raises(Failure, match=r"could not be written .*No space.*: step 30\)")
    with monkeypatch.context() as patch, failure, TrainCheckpoints(workdir) as checkpoints:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        patch.setattr(ocp.CheckpointManager, "close", fail)
        checkpoints.wait()
    failure = pytest.raises(Failure, match="could not be written")
    with monkeypatch.context() as patch, failure, TrainCheckpoints(workdir):
        patch.setattr(ocp.CheckpointManager, "close", fail)


def test_a_failed_write_names_the_newest_checkpoint(workdir, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    failure = pytest.raises(Failure, match=r"step 40 could not be written .*No space.*step 30")
    with TrainCheckpoints(workdir) as checkpoints, failure:
        checkpoints.save(40, state_of(40))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_a_fingerprint_depends_on_every_element_and_its_position(dtype):
    x = (
        np.arange(24).reshape(2, 3, 4) % 2 == 0
        if dtype == "bool"
        else np.arange(24).reshape(2, 3, 4)
    )
    x = jnp.asarray(x, dtype)
    original = fingerprints({"x": x})["x"]
    prints = {original}
    for i in range(24):
        changed = x.reshape(-1).at[i].set(x.reshape(-1)[i] == 0).reshape(x.shape)
        prints.add(fingerprints({"x": changed})["x"])
    assert len(prints) == 25
    assert fingerprints({"x": jnp.roll(x, 1)})["x"] != original
    assert fingerprints({"x": jax.device_put(x, row_sharding(2, 1, 2))})["x"] == original


def test_frozen_nvfp4_parameters_have_digests():
    """Their codes have 4 bits. The digest depends on each of them."""
    packed = quantize(jnp.arange(64.0).reshape(2, 32), implementation="xla")
    codes = np.array(packed.codes)
    codes[1, 31] = 0
    changed = dataclasses.replace(packed, codes=jnp.asarray(codes))
    named = {"backbone": {"kernel": packed}, "other": {"kernel": changed}}
    first, again = parameter_digests(named), parameter_digests(named)
    assert first == again and first["backbone"] != first["other"]


EARLIER = Path(__file__).with_name("earlier_version")
"""Work directories of runs by versions whose train state had no groups."""


def test_error_buffers_of_an_earlier_version_are_restored(tmp_path):
    """There the loss state was called `memory`, and its leaf `num_updates` was called `seen`."""
    shutil.copytree(EARLIER / "buffers", tmp_path, dirs_exist_ok=True)
    spec = RecyclingSpec(buffer=BufferSpec(rows=2, buckets=2, slots=2))
    mesh = make_mesh(MeshSpec(), jax.devices()[:1])
    group = Group(
        init=lambda key: {"w": jnp.zeros((2, 3))},
        loss=stateless(lambda *_: (jnp.zeros(()), {})),
        tx=make_optimizer(OptimSpec(), 10),
        ema=EMASpec(),
    )
    buffers = buffer_state(spec, (1, 2, 2, 1), MeshSpec())
    target = Trainer({"dit": group}, mesh, loss_state=buffers).abstract
    (step, state), _ = restore(tmp_path, target, complete=True, origin={"seed": 0})
    assert step == 4 and int(state.step) == 4
    params = np.asarray(state.groups["dit"].params["w"])
    np.testing.assert_array_equal(params, np.arange(6.0).reshape(2, 3))
    assert int(state.loss_state.num_updates) == 11
    stored = np.asarray(state.loss_state.latent.entries.astype(jnp.float32))
    np.testing.assert_array_equal(stored.ravel(), np.arange(stored.size) % 7 + 1)


def test_a_run_of_an_earlier_version_cannot_resume_with_several_groups(tmp_path):
    shutil.copytree(EARLIER / "buffers", tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"one group .* this run has \['critic', 'generator'\]"):
        restore(tmp_path, two_groups().abstract, complete=True)
    assert not (tmp_path / "damaged").exists()


def test_weights_of_an_earlier_version_are_restored(tmp_path):
    shutil.copytree(EARLIER / "buffers", tmp_path, dirs_exist_ok=True)
    wanted = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=row_sharding(1, 1, 1))}
    step, ema = restore_weights(tmp_path, wanted, group="dit", notify=pytest.fail)
    assert step == 4
    np.testing.assert_array_equal(ema["w"], np.arange(6.0).reshape(2, 3))
