"""Saved runs: any mesh, parts, damage of every kind, other models, full disks."""

import dataclasses
import shutil
from collections import namedtuple

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
from longlive_jax.training.checkpointing import LORA, Saves, restore_weights
from longlive_jax.training.fingerprints import fingerprints
from longlive_jax.training.state import TrainState


def state_of(step: int, place: NamedSharding | None = None) -> TrainState:
    w = np.random.default_rng(step).normal(size=(64, 16)).astype(np.float32)
    params = {"w": w, "b": jnp.full(3, step, jnp.bfloat16)}
    count = jnp.asarray(step, jnp.int32)
    state = TrainState(count, params, jax.tree.map(jnp.copy, params), (count + 0,), count * 0)
    if place is None:
        return jax.device_put(state)
    whole = NamedSharding(place.mesh, P())
    return jax.tree.map(lambda x: jax.device_put(x, place if x.ndim == 2 else whole), state)


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def split(*shape):
    mesh = make_mesh(MeshSpec(*shape), jax.devices()[: np.prod(shape)])
    return NamedSharding(mesh, P(("fsdp", "sp")))


@pytest.fixture
def workdir(tmp_path):
    """Saves of steps 10, 20 and 30."""
    with Saves(tmp_path, keep=3) as saves:
        for step in (10, 20, 30):
            saves.save(step, state_of(step))
    return tmp_path


def restored(folder, target=None, *, whole=False, origin=None):
    said, target = [], like(state_of(0)) if target is None else target
    with Saves(folder, origin=origin) as saves:
        found = saves.restore(target, say=said.append, whole=whole)
    return found, said


def test_the_newest_is_restored(workdir):
    (step, state), said = restored(workdir)
    assert step == 30 and not said
    chex.assert_trees_all_equal(state, state_of(30))
    chex.assert_trees_all_equal_dtypes(state, state_of(30))


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restored(tmp_path) == (None, [])


def test_a_save_of_one_mesh_is_restored_on_another(tmp_path):
    with Saves(tmp_path) as saves:
        saves.save(5, state_of(5, split(2, 1, 4)))
    for place in (split(1, 1, 2), split(1, 1, 1)):
        (_, state), _ = restored(tmp_path, like(state_of(0, place)))
        chex.assert_trees_all_equal(state, state_of(5))
        assert state.params["w"].sharding.is_equivalent_to(place, 2)


def test_a_part_is_restored_alone(workdir):
    (step, part), _ = restored(workdir, {"ema": {"w": like(state_of(0)).ema["w"]}})
    assert step == 30 and set(part) == {"ema"} and set(part["ema"]) == {"w"}
    chex.assert_trees_all_equal(part["ema"]["w"], state_of(30).ema["w"])


def test_the_average_alone_is_restored_onto_another_mesh(tmp_path):
    with Saves(tmp_path) as saves:
        saves.save(5, state_of(5, split(2, 1, 4)))
    wanted = like(state_of(0, split(1, 1, 2))).ema
    step, average = restore_weights(tmp_path, wanted, say=pytest.fail)
    assert step == 5 and average["w"].sharding.is_equivalent_to(wanted["w"].sharding, 2)
    chex.assert_trees_all_equal(average, jax.device_get(state_of(5).ema))
    with pytest.raises(UserError, match="holds no save of a run"):
        restore_weights(tmp_path / "nothing", wanted, say=pytest.fail)


def adapted(seed):
    """A state whose matrix has a low-rank branch."""
    state, rng = state_of(seed), np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 2), (2, 16)))
    params = {"q": {"kernel": LoRAKernel(state.params["w"], LowRank(a, b, 0.5))}}
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


def test_low_rank_branches_alone_are_restored_onto_a_base_from_elsewhere(tmp_path):
    trained, base = adapted(5), adapted(6)
    with Saves(tmp_path) as saves:
        saves.save(5, trained)
    shapes, other = like(base).params["q"]["kernel"], base.params["q"]["kernel"]
    mixed = {"q": {"kernel": dataclasses.replace(shapes, kernel=other.kernel)}}
    step, found = restore_weights(tmp_path, mixed, part="params", only=LORA, say=pytest.fail)
    kernel = found["q"]["kernel"]
    assert step == 5 and kernel.kernel is other.kernel
    chex.assert_trees_all_equal(kernel.branch, trained.params["q"]["kernel"].branch)
    with pytest.raises(UserError, match="no parameter's path matches 'lora_'"):
        restore_weights(tmp_path, mixed, only="lora_", say=pytest.fail)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_description(folder):
    """In the name of what a save must have, so that it is still JSON."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"fingerprints", b"fingerprintr"))


def flip_shape(folder):
    """As if the save were of another model."""
    path = folder / "about/metadata"
    path.write_bytes(path.read_bytes().replace(b"64", b"65", 1))


def truncate(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# A reader of damaged files leaves threads of its own with what it could not say.
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
def test_damage_is_said_put_aside_and_the_save_before_is_taken(workdir, kind):
    DAMAGE[kind](workdir / "state/30")
    (step, state), said = restored(workdir)
    assert step == 20
    chex.assert_trees_all_equal(state, state_of(20))
    assert len(said) == 1 and "step 30 is damaged" in said[0]
    assert (workdir / "damaged/30.0").is_dir() and not (workdir / "state/30").exists()
    with Saves(workdir) as saves:  # the place is free again
        saves.save(30, state_of(30))
    assert restored(workdir)[0][0] == 30


def test_a_flipped_bit_restores_silently_without_fingerprints(workdir, monkeypatch):
    """Or the check would be for nothing."""
    flip(workdir / "state/30")
    monkeypatch.setattr(module, "fingerprints", lambda tree: {})
    monkeypatch.setattr(module, "_check_same", lambda *_: None)
    with pytest.raises(AssertionError):
        found, _ = restored(workdir)
        chex.assert_trees_all_equal(found[1], state_of(30))


def test_all_damaged_is_an_error_that_touches_nothing(workdir):
    for step in (10, 20, 30):
        truncate(workdir / f"state/{step}")
    with pytest.raises(UserError, match=r"no save can be read.*step 30.*step 10"):
        restored(workdir)
    assert not (workdir / "damaged").exists()


def test_an_unfinished_save_is_no_save(workdir):
    (workdir / "state/40.orbax-checkpoint-tmp").mkdir()
    assert restored(workdir)[0][0] == 30


def test_a_save_of_another_model_is_refused(workdir):
    target = like(state_of(0))
    target.params["w"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    with pytest.raises(
        UserError,
        match=r"another model.*params/w is float32 \[64, 16\] there and float32 \[64, 8\]",
    ):
        restored(workdir, target)


def test_a_whole_restore_wants_all_that_was_saved(workdir):
    """A part may be asked for, but a run must not forget what it had, such as a LoRA."""
    target = like(state_of(0))
    del target.params["b"]
    assert restored(workdir, target)[0][0] == 30
    with pytest.raises(UserError, match=r"params/b is bfloat16 \[3\] there and missing here"):
        restored(workdir, target, whole=True)


def test_a_run_that_goes_on_otherwise_is_told(tmp_path):
    origin = {"seed": 1, "clips": "abc"}
    with Saves(tmp_path, origin=origin) as saves:
        saves.save(5, state_of(5))
    assert restored(tmp_path, whole=True, origin=origin)[1] == []
    found, said = restored(tmp_path, whole=True, origin=origin | {"seed": 2})
    assert found[0] == 5 and len(said) == 1
    assert said[0].startswith("seed was 1 when step 5 was saved and is 2 now")


def test_room_is_needed_for_one_copy(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    mesh = make_mesh(MeshSpec(4, 1, 1), jax.devices()[:4])
    state = jax.device_put({"w": jnp.zeros(1000)}, NamedSharding(mesh, P()))
    with Saves(tmp_path) as saves:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 4000))
        saves.check_room(state)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 3999))
        with pytest.raises(Failure, match="nothing is saved yet"):
            saves.check_room(state)


def test_a_full_disk_loses_nothing(workdir, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with (
        pytest.raises(Failure, match=r"a save needs up to .*step 30 is saved"),
        Saves(workdir) as s,
    ):
        s.save(40, state_of(40))
    assert restored(workdir)[0][0] == 30


def test_a_save_that_failed_is_said_once(workdir, monkeypatch):
    """Closing meets the same error again, which must not take the place of the message."""

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match=r"could not be written .*No space.*step 30 is saved"):  # noqa: SIM117
        with Saves(workdir) as saves:
            monkeypatch.setattr(saves._manager, "wait_until_finished", fails)
            monkeypatch.setattr(saves._manager, "close", fails)
            saves.wait()
    with pytest.raises(Failure, match="could not be written"), Saves(workdir) as saves:
        monkeypatch.setattr(saves._manager, "close", fails)


def test_a_save_that_fails_while_written_says_what_is_left(workdir, monkeypatch):
    with Saves(workdir) as saves:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saves._manager, "save", full)
        with pytest.raises(Failure, match=r"step 40 could not be written .*No space.*step 30"):
            saves.save(40, state_of(40))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_a_fingerprint_sees_every_element_and_its_place(dtype):
    x = (
        np.arange(24).reshape(2, 3, 4) % 2 == 0
        if dtype == "bool"
        else np.arange(24).reshape(2, 3, 4)
    )
    x = jnp.asarray(x, dtype)
    first = fingerprints({"x": x})["x"]
    seen = {first}
    for i in range(24):
        changed = x.reshape(-1).at[i].set(x.reshape(-1)[i] == 0).reshape(x.shape)
        seen.add(fingerprints({"x": changed})["x"])
    assert len(seen) == 25 or (dtype == "bool" and len(seen) == 25)
    assert fingerprints({"x": jnp.roll(x, 1)})["x"] != first
    assert fingerprints({"x": jax.device_put(x, split(2, 1, 2))})["x"] == first
