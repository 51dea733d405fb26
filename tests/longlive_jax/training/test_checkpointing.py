"""Checkpoints: any mesh, parts of a state, every kind of damage, other models, full disks."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel.mesh import MeshSpec, make_mesh
from longlive_jax.quant.low_rank import LoRAKernel, LowRank
from longlive_jax.spec import Failure, UserError
from longlive_jax.training import checkpointing as module
from longlive_jax.training.checkpointing import LORA, TrainCheckpoints, restore_weights
from longlive_jax.training.fingerprints import fingerprints
from longlive_jax.training.objectives.error_buffer import BufferSpec
from longlive_jax.training.objectives.error_recycling import RecyclingSpec, buffer_state
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.state import Trained, TrainState
from longlive_jax.training.update import EMASpec, Group, Trainer, stateless


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


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def model(state):
    """The group of a state."""
    return state.groups["model"]


def split(*shape):
    mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
    return NamedSharding(mesh, P(("fsdp", "sp")))


@pytest.fixture
def workdir(tmp_path):
    """Checkpoints of steps 10, 20 and 30."""
    with TrainCheckpoints(tmp_path, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state_of(step))
    return tmp_path


def restored(folder, target=None, *, complete=False, origin=None):
    messages, target = [], like(state_of(0)) if target is None else target
    with TrainCheckpoints(folder, origin=origin) as checkpoints:
        result = checkpoints.restore(target, say=messages.append, complete=complete)
    return result, messages


def test_the_newest_is_restored(workdir):
    (step, state), messages = restored(workdir)
    assert step == 30 and not messages
    chex.assert_trees_all_equal(state, state_of(30))
    chex.assert_trees_all_equal_dtypes(state, state_of(30))


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restored(tmp_path) == (None, [])


def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5, split(2, 1, 4)))
    for sharding in (split(1, 1, 2), split(1, 1, 1)):
        (_, state), _ = restored(tmp_path, like(state_of(0, sharding)))
        chex.assert_trees_all_equal(state, state_of(5))
        kernel = state.groups["model"].params["w"]
        assert kernel.sharding.is_equivalent_to(sharding, 2)


def test_a_part_is_restored_alone(workdir):
    target = {"groups": {"model": {"ema": {"w": like(model(state_of(0))).ema["w"]}}}}
    (step, part), _ = restored(workdir, target)
    assert step == 30 and jax.tree.structure(part) == jax.tree.structure(target)
    chex.assert_trees_all_equal(jax.tree.leaves(part), [model(state_of(30)).ema["w"]])


def test_the_ema_alone_is_restored_onto_another_mesh(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_of(5, split(2, 1, 4)))
    wanted = like(model(state_of(0, split(1, 1, 2)))).ema
    step, ema = restore_weights(tmp_path, wanted, group="model", say=pytest.fail)
    assert step == 5 and ema["w"].sharding.is_equivalent_to(wanted["w"].sharding, 2)
    chex.assert_trees_all_equal(ema, jax.device_get(model(state_of(5)).ema))
    with pytest.raises(UserError, match="has no checkpoint of a run"):
        restore_weights(tmp_path / "nothing", wanted, group="model", say=pytest.fail)


def adapted(seed):
    """A state whose matrix has a low-rank branch."""
    state, rng = state_of(seed), np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 2), (2, 16)))
    params = {"q": {"kernel": LoRAKernel(model(state).params["w"], LowRank(a, b, 0.5))}}
    trained = model(state).replace(params=params, ema=jax.tree.map(jnp.copy, params))
    return state.replace(groups={"model": trained})


def test_low_rank_branches_alone_are_restored_onto_a_base_from_elsewhere(tmp_path):
    trained, base = adapted(5), adapted(6)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, trained)
    shapes, other = (model(x).params["q"]["kernel"] for x in (like(base), base))
    mixed = {"q": {"kernel": dataclasses.replace(shapes, kernel=other.kernel)}}
    options = {"group": "model", "part": "params", "say": pytest.fail}
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
    """In the name of a required entry, so that it is still JSON."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"fingerprints", b"fingerprintr"))


def flip_shape(folder):
    """As if the checkpoint were of another model."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"64", b"65", 1))


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# A reader of damaged files leaves threads behind with errors of their own.
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
    (step, state), messages = restored(workdir)
    assert step == 20
    chex.assert_trees_all_equal(state, state_of(20))
    assert len(messages) == 1 and "step 30 is damaged" in messages[0]
    assert (workdir / "damaged/30.0").is_dir() and not (workdir / "state/30").exists()
    with TrainCheckpoints(workdir) as checkpoints:  # the step is free again
        checkpoints.save(30, state_of(30))
    assert restored(workdir)[0][0] == 30


def test_a_flipped_bit_restores_silently_without_fingerprints(workdir, monkeypatch):
    """Otherwise the check would be redundant."""
    flip(workdir / "state/30")
    monkeypatch.setattr(module, "fingerprints", lambda tree: {})
    monkeypatch.setattr(module, "_check_same", lambda *_: None)
    with pytest.raises(AssertionError):
        result, _ = restored(workdir)
        chex.assert_trees_all_equal(result[1], state_of(30))


def test_all_damaged_is_an_error_that_touches_nothing(workdir):
    for step in (10, 20, 30):
        truncate(workdir / f"state/{step}")
    with pytest.raises(UserError, match=r"no checkpoint can be read.*step 30.*step 10"):
        restored(workdir)
    assert not (workdir / "damaged").exists()


def test_an_unfinished_checkpoint_is_ignored(workdir):
    (workdir / "state/40.orbax-checkpoint-tmp").mkdir()
    assert restored(workdir)[0][0] == 30


def test_a_checkpoint_of_another_model_is_refused(workdir):
    target = like(state_of(0))
    model(target).params["w"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    with pytest.raises(
        UserError,
        match=r"another model.*params/w is float32 \[64, 16\] there and float32 \[64, 8\]",
    ):
        restored(workdir, target)


def test_a_complete_restore_wants_every_stored_array(workdir):
    """A part may be read alone, but a run must not lose arrays that it had, such as a LoRA."""
    target = like(state_of(0))
    del model(target).params["b"]
    assert restored(workdir, target)[0][0] == 30
    with pytest.raises(UserError, match=r"params/b is bfloat16 \[3\] there and missing here"):
        restored(workdir, target, complete=True)


def test_a_run_that_resumes_with_another_origin_is_told(tmp_path):
    origin = {"seed": 1, "clips": "abc"}
    with TrainCheckpoints(tmp_path, origin=origin) as checkpoints:
        checkpoints.save(5, state_of(5))
    assert restored(tmp_path, complete=True, origin=origin)[1] == []
    result, messages = restored(tmp_path, complete=True, origin=origin | {"seed": 2})
    assert result[0] == 5 and len(messages) == 1
    assert messages[0].startswith("seed was 1 when step 5 was checkpointed and is 2 now")


def test_room_is_needed_for_one_copy(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    mesh = make_mesh(MeshSpec(4, 1, 1), jax.devices()[:4])
    state = jax.device_put({"w": jnp.zeros(1000)}, NamedSharding(mesh, P()))
    with TrainCheckpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 4000))
        checkpoints.check_room(state)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 3999))
        with pytest.raises(Failure, match="newest checkpoint: none"):
            checkpoints.check_room(state)


def test_a_full_disk_loses_nothing(workdir, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with (
        pytest.raises(Failure, match=r"a checkpoint needs up to .*newest checkpoint: step 30"),
        TrainCheckpoints(workdir) as s,
    ):
        s.save(40, state_of(40))
    assert restored(workdir)[0][0] == 30


def test_a_failed_checkpoint_is_reported_once(workdir, monkeypatch):
    """Closing meets the same error again, which must not replace the message."""

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    failure = pytest.raises(Failure, match=r"could not be written .*No space.*: step 30\)")
    with failure, TrainCheckpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fails)
        monkeypatch.setattr(checkpoints._manager, "close", fails)
        checkpoints.wait()
    failure = pytest.raises(Failure, match="could not be written")
    with failure, TrainCheckpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "close", fails)


def test_a_checkpoint_that_fails_while_written_names_the_newest_one(workdir, monkeypatch):
    with TrainCheckpoints(workdir) as checkpoints:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(Failure, match=r"step 40 could not be written .*No space.*step 30"):
            checkpoints.save(40, state_of(40))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_a_fingerprint_depends_on_every_element_and_its_position(dtype):
    x = (
        np.arange(24).reshape(2, 3, 4) % 2 == 0
        if dtype == "bool"
        else np.arange(24).reshape(2, 3, 4)
    )
    x = jnp.asarray(x, dtype)
    first = fingerprints({"x": x})["x"]
    prints = {first}
    for i in range(24):
        changed = x.reshape(-1).at[i].set(x.reshape(-1)[i] == 0).reshape(x.shape)
        prints.add(fingerprints({"x": changed})["x"])
    assert len(prints) == 25 or (dtype == "bool" and len(prints) == 25)
    assert fingerprints({"x": jnp.roll(x, 1)})["x"] != first
    assert fingerprints({"x": jax.device_put(x, split(2, 1, 2))})["x"] == first


EARLIER = Path(__file__).with_name("earlier_version")
"""Work directories of runs before train states had groups."""


def test_error_buffers_of_an_earlier_version_are_restored(tmp_path):
    """Its loss state was `memory`, and its leaf `num_updates` was `seen`."""
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
    (step, state), _ = restored(tmp_path, target, complete=True, origin={"seed": 0})
    assert step == 4 and int(state.step) == 4
    np.testing.assert_array_equal(model_params(state), np.arange(6.0).reshape(2, 3))
    assert int(state.loss_state.num_updates) == 11
    stored = np.asarray(state.loss_state.latent.entries.astype(jnp.float32))
    np.testing.assert_array_equal(stored.ravel(), np.arange(stored.size) % 7 + 1)


def test_weights_of_an_earlier_version_are_restored(tmp_path):
    shutil.copytree(EARLIER / "buffers", tmp_path, dirs_exist_ok=True)
    wanted = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=split(1, 1, 1))}
    step, ema = restore_weights(tmp_path, wanted, group="dit", say=pytest.fail)
    assert step == 4
    np.testing.assert_array_equal(ema["w"], np.arange(6.0).reshape(2, 3))


def model_params(state):
    return np.asarray(state.groups["dit"].params["w"])
