"""Files as torch.save writes them: read back by our own reader, the same bits."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.interop.safetensors_file import Outgoing
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.interop.torch_writer import ALIGNMENT, write_torch

TYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "float8_e4m3fn", "float8_e5m2"),
)
PLAIN = {
    "numbers": [0, 255, -1, 2**31, -(2**40), 1.5],
    "words": ("ä", "", "model."),
    "nothing": None,
    "truth": {"yes": True, "no": False, "empty": {}},
}


def outgoing(array):
    return Outgoing(array.shape, array.dtype, lambda: array)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    made = {
        name: rng.normal(size=(3, 5)).astype(getattr(ml_dtypes, name, None) or name)
        for name in TYPES
    }
    return made | {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32)}


def test_what_is_written_is_read(tmp_path, arrays):
    sizes = []
    value = {"generator": {name: outgoing(x) for name, x in arrays.items()}, **PLAIN}
    write_torch(tmp_path / "a.pt", value, progress=sizes.append)
    got = read_torch(tmp_path / "a.pt")
    tensors = got.pop("generator")
    assert got == PLAIN and sizes == [x.nbytes for x in arrays.values()]
    for name, want in arrays.items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype), name
        assert tensor.read().tobytes() == want.tobytes(), name


def test_every_fixture_survives(fixtures, tmp_path):
    def again(value):
        if isinstance(value, LazyTensor):
            return Outgoing(value.shape, value.dtype, value.read)
        return {k: again(v) for k, v in value.items()} if isinstance(value, dict) else value

    for name in ("longlive_model_ema.pt", "longlive_lora.pt"):
        value = read_torch(fixtures / name)
        write_torch(tmp_path / name, again(value))
        got = read_torch(tmp_path / name)
        part = next(key for key in value if isinstance(value[key], dict))
        assert list(got[part]) == list(value[part])
        for key, tensor in value[part].items():
            assert got[part][key].read().tobytes() == tensor.read().tobytes()


def test_the_same_bytes_every_time_and_aligned(tmp_path, arrays):
    value = {name: outgoing(x) for name, x in arrays.items()}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_torch(tmp_path / folder / "x.pt", value)
    data = [(tmp_path / folder / "x.pt").read_bytes() for folder in "ab"]
    assert data[0] == data[1]
    with zipfile.ZipFile(tmp_path / "a" / "x.pt") as archive:
        for info in archive.infolist():
            at = info.header_offset
            begin = (
                at
                + 30
                + sum(int.from_bytes(data[0][at + i : at + i + 2], "little") for i in (26, 28))
            )
            assert "/data/" not in info.filename or begin % ALIGNMENT == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"x": {1, 2}}, "a set"),
        ({"x": outgoing(np.zeros(2, np.complex64))}, "no storage of complex64"),
    ],
)
def test_what_is_no_tensor_is_refused_before_writing(tmp_path, value, said):
    with pytest.raises(TypeError, match=said):
        write_torch(tmp_path / "a.pt", value)
    assert not (tmp_path / "a.pt").exists()


def test_a_tensor_must_be_what_was_announced(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_torch(
            tmp_path / "a.pt", {"x": Outgoing((3,), np.dtype("int32"), lambda: np.zeros(2))}
        )
