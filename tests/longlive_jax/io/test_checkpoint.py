"""The checkpoint directory: atomic writes, compatibility with Orbax, and detection of damage."""

import json
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from longlive_jax.io.arrays import ArrayReader, ArraySpec, ArrayWriter, flatten, nest
from longlive_jax.io.checkpoint import (
    CheckpointWriter,
    load_component,
    open_component,
    read_manifest,
    save_component,
)
from longlive_jax.models.vae import VAEConfig
from longlive_jax.spec import UserError

PARAMS = {
    "blocks": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)},
    "list": {0: {"scale": np.ones(3, ml_dtypes.bfloat16)}, 1: {"scale": np.float32(2.0)}},
    "codes": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "zeros": np.zeros((5, 5), np.float32),
    "count": np.arange(3, dtype=np.int32),
}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with one component."""
    save_component(tmp_path / "ck", "dit", PARAMS, {"dim": 4}, provenance={"source": "test"})
    return tmp_path / "ck"


def test_components_survive_a_round_trip(saved):
    params, config = load_component(saved, "dit")
    assert config == {"dim": 4}
    assert read_manifest(saved)["provenance"]["dit"] == {"source": "test"}
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for path, value in flatten(PARAMS).items():
        got = flatten(params)[path]
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(got), value)


def test_the_next_array_is_read_while_one_is_placed(saved, monkeypatch):
    began, read = threading.Semaphore(0), ArrayReader.read

    def counted(self, path, layer=None):
        began.release()
        return read(self, path, layer)

    def put(path, value):
        if not order:
            assert all(began.acquire(timeout=60) for _ in range(2)), "no second array was read"
        order.append(path)
        return jax.numpy.asarray(value)

    order: list = []
    monkeypatch.setattr(ArrayReader, "read", counted)
    load_component(saved, "dit", put=put)
    assert order == list(open_component(saved, "dit")[0].specs)


def test_reading_ahead_is_bounded(saved, monkeypatch):
    started, read = [], ArrayReader.read
    monkeypatch.setattr(
        ArrayReader, "read", lambda self, path: started.append(path) or read(self, path)
    )
    reader, _ = open_component(saved, "dit")
    for count, _ in enumerate(reader.read_many(reader.specs, ahead=0), 1):
        assert len(started) == count


def test_an_array_of_the_right_dtype_is_not_copied(saved, monkeypatch):
    values, read = {}, ArrayReader.read

    def recorded(self, path):
        values[path] = read(self, path)
        return values[path]

    monkeypatch.setattr(ArrayReader, "read", recorded)
    params, _ = load_component(saved, "dit", dtype=np.float32)
    for path, param in flatten(params).items():
        is_same = param.unsafe_buffer_pointer() == values[path].ctypes.data
        assert is_same == (values[path].dtype == param.dtype), path
    assert any(value.dtype == np.float32 for value in values.values())


def test_a_loaded_array_can_be_donated(saved):
    kernel = load_component(saved, "dit")[0]["blocks"]["kernel"]
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(kernel)
    np.testing.assert_array_equal(result, PARAMS["blocks"]["kernel"] + 1)
    assert kernel.is_deleted()


def test_only_floating_point_arrays_are_cast(saved):
    params, _ = load_component(saved, "dit", dtype=ml_dtypes.bfloat16)
    assert params["blocks"]["kernel"].dtype == ml_dtypes.bfloat16
    assert params["count"].dtype == np.int32


def test_no_file_contains_the_path_it_was_saved_to(saved):
    for path in saved.rglob("*"):
        assert path.is_dir() or str(saved).encode() not in path.read_bytes(), path


def test_orbax_can_read_a_component(saved):
    with ocp.PyTreeCheckpointer() as checkpointer:
        got = checkpointer.restore(saved / "dit")
    np.testing.assert_array_equal(got["blocks"]["kernel"], PARAMS["blocks"]["kernel"])
    np.testing.assert_array_equal(got["list"]["1"]["scale"], 2.0)
    np.testing.assert_array_equal(got["zeros"], PARAMS["zeros"])


def test_orbax_can_restore_a_component_sharded_and_cast(saved):
    """As a trainer with a mesh does."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    kernel = jax.ShapeDtypeStruct((2, 3, 4), ml_dtypes.bfloat16, sharding=sharding)
    abstract = {"blocks": {"kernel": kernel}}
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        got = checkpointer.restore(saved / "dit", args=arguments)["blocks"]["kernel"]
    assert got.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(np.asarray(got, np.float32), PARAMS["blocks"]["kernel"])


def test_nest_inverts_flatten():
    tree = {"a": {0: 1, 1: {"b": 2}}}
    assert nest(flatten(tree)) == tree


def test_configs_are_written_as_json(tmp_path):
    save_component(tmp_path / "ck", "vae", {"a": np.ones(2)}, VAEConfig(dtype=ml_dtypes.bfloat16))
    config = read_manifest(tmp_path / "ck")["components"]["vae"]
    assert config["dtype"] == "bfloat16"
    assert config["dim_mult"] == [1, 2, 4, 4]


def test_components_are_added_and_only_replaced_with_overwrite(saved):
    save_component(saved, "vae", {"a": np.ones(2)}, {})
    assert set(read_manifest(saved)["components"]) == {"dit", "vae"}
    with pytest.raises(UserError, match="--overwrite"):
        save_component(saved, "vae", {"a": np.zeros(2)}, {})
    save_component(saved, "vae", {"a": np.zeros(2)}, {}, overwrite=True)
    np.testing.assert_array_equal(load_component(saved, "vae")[0]["a"], 0)
    assert sorted(p.name for p in saved.iterdir()) == ["dit", "longlive.json", "vae"]


def test_a_failure_leaves_no_files(tmp_path, saved):
    specs = {("a",): ArraySpec((2, 2), np.dtype(np.float32))}
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "new") as writer:
        writer.add_component("dit", specs, {})
        raise RuntimeError("disk full")
    assert not (tmp_path / "new").exists()
    before = sorted(saved.rglob("*"))
    with pytest.raises(ValueError, match="never written: a"), CheckpointWriter(saved) as writer:
        writer.add_component("vae", specs, {})
        writer.commit()
    assert sorted(saved.rglob("*")) == before
    assert set(read_manifest(saved)["components"]) == {"dit"}


def test_slices_must_match_the_spec(tmp_path):
    writer = ArrayWriter(tmp_path / "x", {("a",): ArraySpec((2, 3), np.dtype(np.float32))})
    with pytest.raises(ValueError, match="got 1 slices, expected 2"):
        writer.write(("a",), [np.zeros(3, np.float32)], stacked=True)
    with pytest.raises(ValueError, match=r"got \(4,\) float32, expected \(3,\) float32"):
        writer.write(("a",), [np.zeros(4, np.float32)] * 2, stacked=True)


def test_layers_larger_than_a_commit_are_written_in_blocks_of_rows(tmp_path, monkeypatch):
    from longlive_jax.io import arrays

    monkeypatch.setattr(arrays, "CHUNK_BYTES", 100)
    monkeypatch.setattr(arrays, "COMMIT_BYTES", 250)
    value = np.arange(3 * 37 * 5, dtype=np.float32).reshape(3, 37, 5)
    specs = {("s",): ArraySpec(value.shape, value.dtype), ("w",): ArraySpec((37, 5), value.dtype)}
    writer = ArrayWriter(tmp_path / "x", specs)
    writer.write(("s",), list(value), stacked=True)
    writer.write(("w",), [value[1]], stacked=False)
    writer.flush()
    reader = arrays.ArrayReader(tmp_path / "x", writer.fingerprints)
    np.testing.assert_array_equal(reader.read(("s",)), value)
    np.testing.assert_array_equal(reader.read(("s",), 2), value[2])
    np.testing.assert_array_equal(reader.read(("w",)), value[1])


def test_changed_values_are_detected(saved):
    reader, _ = open_component(saved, "dit")
    changed = (np.arange(24, dtype=np.float32) + 1).reshape(2, 3, 4)
    other = ArrayWriter(saved / "other", {("blocks", "kernel"): reader.specs["blocks", "kernel"]})
    other.write(("blocks", "kernel"), [changed], stacked=False)
    other.flush()
    reader.folder = saved / "other"
    with pytest.raises(UserError, match=r"blocks\.kernel has changed on disk"):
        reader.read(("blocks", "kernel"))


def test_missing_foreign_and_damaged_directories_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint directory"):
        load_component(tmp_path / "nowhere", "dit")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="longlive convert"):
        load_component(tmp_path / "foreign", "dit")
    with pytest.raises(UserError, match="holds other files"):
        save_component(tmp_path / "foreign", "dit", PARAMS, {})
    with pytest.raises(UserError, match="has no component 'dot'; did you mean 'dit'"):
        load_component(saved, "dot")
    for data in (saved / "dit").rglob("d"):
        shutil.rmtree(data)
    with pytest.raises(UserError, match="missing or damaged"):
        load_component(saved, "dit")
    shutil.rmtree(saved / "dit")
    with pytest.raises(UserError, match="incomplete"):
        load_component(saved, "dit")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifests_are_refused(saved, text):
    (saved / "longlive.json").write_text(text)
    with pytest.raises(UserError, match=r"longlive\.json"):
        load_component(saved, "dit")


def test_damaged_fingerprints_are_refused(saved):
    manifest = json.loads((saved / "longlive.json").read_text())
    manifest["arrays"]["dit"]["zeros"] = "nonsense"
    (saved / "longlive.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fingerprint of zeros"):
        load_component(saved, "dit")
