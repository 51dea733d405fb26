"""Files in the format of torch.save: our reader gets the same bits back."""

import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.interop.safetensors_file import OutputTensor
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.interop.torch_writer import ALIGNMENT, write_torch

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "float8_e4m3fn", "float8_e5m2"),
)
PLAIN = {
    "numbers": [0, 255, -1, 2**31, -(2**40), 1.5],
    "words": ("ä", "", "model."),
    "nothing": None,
    "truth": {"yes": True, "no": False, "empty": {}},
}


def output_tensor(array):
    return OutputTensor(array.shape, array.dtype, lambda: array)


@pytest.fixture
def arrays():
    """An array of every dtype, a scalar, and an empty array."""
    rng = np.random.default_rng(0)
    matrices = {
        name: rng.normal(size=(3, 5)).astype(getattr(ml_dtypes, name, None) or name)
        for name in DTYPES
    }
    return matrices | {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32)}


def test_values_survive_a_round_trip(tmp_path, arrays):
    sizes = []
    value = {"generator": {name: output_tensor(x) for name, x in arrays.items()}, **PLAIN}
    write_torch(tmp_path / "a.pt", value, progress=sizes.append)
    got = read_torch(tmp_path / "a.pt")
    tensors = got.pop("generator")
    assert got == PLAIN and sizes == [x.nbytes for x in arrays.values()]
    for name, want in arrays.items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype), name
        assert tensor.read().tobytes() == want.tobytes(), name


def test_fixtures_survive_a_round_trip(fixtures, tmp_path):
    def to_output(value):
        if isinstance(value, LazyTensor):
            return OutputTensor(value.shape, value.dtype, value.read)
        return {k: to_output(v) for k, v in value.items()} if isinstance(value, dict) else value

    for name in ("longlive_model_ema.pt", "longlive_lora.pt"):
        value = read_torch(fixtures / name)
        write_torch(tmp_path / name, to_output(value))
        got = read_torch(tmp_path / name)
        entry = next(key for key in value if isinstance(value[key], dict))
        assert list(got[entry]) == list(value[entry])
        for key, tensor in value[entry].items():
            assert got[entry][key].read().tobytes() == tensor.read().tobytes()


def test_files_are_reproducible_and_tensors_aligned(tmp_path, arrays):
    value = {name: output_tensor(x) for name, x in arrays.items()}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_torch(tmp_path / folder / "x.pt", value)
    data = [(tmp_path / folder / "x.pt").read_bytes() for folder in "ab"]
    assert data[0] == data[1]
    with zipfile.ZipFile(tmp_path / "a" / "x.pt") as archive:
        for info in archive.infolist():
            header = info.header_offset
            name_size, extra_size = struct.unpack("<HH", data[0][header + 26 : header + 30])
            begin = header + 30 + name_size + extra_size
            assert "/data/" not in info.filename or begin % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": {1, 2}}, "a set cannot be written"),
        ({"x": output_tensor(np.zeros(2, np.complex64))}, "no storage of complex64"),
    ],
)
def test_other_types_are_refused_before_writing(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        write_torch(tmp_path / "a.pt", value)
    assert not (tmp_path / "a.pt").exists()


def test_values_must_match_the_declared_shape_and_dtype(tmp_path):
    tensor = OutputTensor((3,), np.dtype("int32"), lambda: np.zeros(2))
    with pytest.raises(ValueError, match=r"got \(2,\) float64, expected \(3,\) int32"):
        write_torch(tmp_path / "a.pt", {"x": tensor})
