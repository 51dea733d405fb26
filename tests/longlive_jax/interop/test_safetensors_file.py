"""safetensors files: the same tensors as the library's, and damaged files refused."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from longlive_jax.interop.safetensors_file import (
    OutputTensor,
    read_index,
    read_safetensors,
    write_safetensors,
)
from longlive_jax.spec import UserError

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def shards(fixtures, tmp_path):
    """A writable copy of a sharded checkpoint."""
    folder = tmp_path / "transformer"
    shutil.copytree(fixtures / "diffusers" / "transformer", folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def test_tensors_equal_those_read_by_the_library(fixtures):
    path = fixtures / "diffusers" / "vae" / "diffusion_pytorch_model.safetensors"
    want, got = load_file(path), read_safetensors(path)
    assert set(got) == set(want)
    for name, lazy in got.items():
        np.testing.assert_array_equal(lazy.read(), want[name])


def test_written_files_can_be_read_by_the_library(tmp_path):
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.float32(3.0).reshape(()),
        "d": np.arange(12, dtype=np.int64).reshape(3, 4).T,  # not contiguous
        "e": np.zeros((0, 2), np.float16),
    }
    tensors = {k: OutputTensor(v.shape, v.dtype, lambda v=v: v) for k, v in values.items()}
    (path,) = write_safetensors(tmp_path, "single", tensors)
    for source in (load_file(path), {k: v.read() for k, v in read_safetensors(path).items()}):
        assert set(source) == set(values)
        for name, value in source.items():
            assert value.dtype == values[name].dtype
            np.testing.assert_array_equal(value, values[name])
    paths = write_safetensors(tmp_path, "sharded", tensors, shard_bytes=40)
    assert len(paths) == 3
    index = tmp_path / "sharded.safetensors.index.json"
    assert json.loads(index.read_text())["metadata"]["total_size"] == 24 + 8 + 4 + 96
    for name, lazy in read_index(index).items():
        np.testing.assert_array_equal(lazy.read(), values[name])


def test_an_index_gives_the_tensors_of_all_shards(shards):
    assert len(read_index(shards / INDEX)) == 69


def test_all_problems_of_an_index_are_reported_at_once(shards):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["ghost"] = "diffusion_pytorch_model-00001-of-00003.safetensors"
    del index["weight_map"]["patch_embedding.bias"]
    (shards / INDEX).write_text(json.dumps(index))
    third = shards / "diffusion_pytorch_model-00003-of-00003.safetensors"
    third.unlink()
    second = shards / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file(load_file(second) | {"patch_embedding.weight": np.zeros(3, np.float32)}, second)
    with pytest.raises(UserError) as error:
        read_index(shards / INDEX)
    message = str(error.value)
    assert "1 missing shards: diffusion_pytorch_model-00003" in message
    assert "1 missing tensors: ghost" in message
    assert "1 unlisted tensors: patch_embedding.bias" in message
    assert "1 duplicate tensors: patch_embedding.weight" in message


def test_shards_outside_the_folder_are_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        read_index(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_broken_indices_are_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match="not a safetensors index"):
        read_index(index)


def write_raw(path, header: str, data: bytes):
    """Writes a safetensors file with any header, valid or not."""
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 4),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 8),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', 8),
        ('{"a":{"dtype":"ODD","shape":[2],"data_offsets":[0,8]}}', 8),
        ("{" * 1000, 0),
        ("not json", 0),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, size):
    with pytest.raises(UserError):
        read_safetensors(write_raw(tmp_path / "x.safetensors", header, bytes(size)))


def test_duplicate_names_are_refused(tmp_path):
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    path = write_raw(tmp_path / "x.safetensors", f'{{"a":{entry},"a":{entry}}}', bytes(8))
    with pytest.raises(UserError):
        read_safetensors(path)


def test_short_and_empty_files_are_refused(tmp_path):
    for data in (b"", b"abc", struct.pack("<Q", 2**62), struct.pack("<Q", 50) + b"{}"):
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        with pytest.raises(UserError):
            read_safetensors(path)
