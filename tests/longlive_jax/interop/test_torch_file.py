"""torch.save files: all fixtures are read correctly, all hostile files are refused."""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.bench.convert_memory import torch_pickle, torch_zip
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.spec import UserError

GOOD = [
    "legacy_format.pth",
    "odd_tensors.pth",
    "umt5_bf16.pth",
    "dit_flat_bf16.pth",
    "vae.pth",
    "longlive_lora.pt",
    "longlive_model_ema.pt",
    "longlive_model_4o6.pt",
]


def archive(folder: Path, stream: bytes, members: dict[str, bytes] | None = None) -> Path:
    """A torch.save file with any pickle stream and members."""
    path = folder / "file.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        out.writestr("a/data.pkl", stream)
        for name, data in (members or {}).items():
            out.writestr(f"a/{name}", data)
    return path


def tensor(shape=(4,), strides=(1,), offset=0, count=4, storage="FloatStorage") -> bytes:
    """The stream of {"x": tensor}, with consistent sizes or not."""
    texts = (f"({''.join(f'K{chr(n)}' for n in numbers)}t" for numbers in (shape, strides))
    sizes = [text.encode("latin1") for text in texts]
    elements = b"\x8a\x08" + struct.pack("<q", count)
    pid = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\nX\x01\x00\x00\x000"
    pid += b"X\x03\x00\x00\x00cpu" + elements + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K" + bytes([offset])
    call += sizes[0] + sizes[1] + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\x00\x00\x00x" + call + b"s."


def test_tensors_of_all_dtypes_and_strides_are_read(fixtures):
    got = read_torch(fixtures / "odd_tensors.pth")
    want = np.load(fixtures / "odd_tensors_expected.npz")
    assert len(got) == len(want.files)
    for name, lazy in got.items():
        value = lazy.read()
        assert (value.shape, value.dtype) == (lazy.shape, lazy.dtype)
        assert value.flags.c_contiguous
        if name == "f8":
            assert value.dtype == ml_dtypes.float8_e4m3fn
            np.testing.assert_array_equal(value.view(np.uint8), want["f8_bits"])
        else:
            assert value.dtype == want[name].dtype
            np.testing.assert_array_equal(value, want[name])


def test_the_legacy_file_has_the_tensors_of_the_zip_file(fixtures):
    old, new = (read_torch(fixtures / n) for n in ("legacy_format.pth", "dit_flat_bf16.pth"))
    assert len(old) == 5
    for name, lazy in old.items():
        np.testing.assert_array_equal(lazy.read(), new[name].read())


def test_files_are_read_independently(fixtures):
    """The contents of a file do not depend on the files that were read before."""

    def signature(name: str) -> list:
        rows: list = []

        def visit(value, path):
            if isinstance(value, LazyTensor):
                rows.append((path, value.shape, zlib.crc32(value.read().tobytes())))
            elif isinstance(value, dict):
                for key, item in value.items():
                    visit(item, f"{path}/{key}")
            else:
                rows.append((path, repr(value)))

        visit(read_torch(fixtures / name), "")
        return rows

    want = {name: signature(name) for name in GOOD}
    for name in [*reversed(GOOD), *GOOD[::2], *GOOD[1::2]]:
        assert signature(name) == want[name]


def test_hostile_files_are_refused_without_side_effects(fixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted((fixtures / "hostile").iterdir())
    assert files
    for path in files:
        with pytest.raises(UserError) as error:
            read_torch(path)
        message = str(error.value)
        assert path.name in message
        assert "\n" not in message
        assert len(message) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", range(6))
def test_gadgets_of_every_protocol_are_refused(tmp_path, protocol):
    class Gadget:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    path = archive(tmp_path, pickle.dumps({"x": Gadget()}, protocol))
    with pytest.raises(UserError):
        read_torch(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02cos\nsystem\n.",  # a reference without a call
        b"\x80\x02(ios\nsystem\n.",  # INST
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",  # BUILD
        b"\x80\x02ctorch\nload\n)R.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",  # STACK_GLOBAL
    ],
)
def test_forbidden_opcodes_and_names_are_refused(tmp_path, stream):
    with pytest.raises(UserError):
        read_torch(archive(tmp_path, stream))


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",  # no STOP
        b"\x80\x02h\x05.",  # an empty memo
        b"\x80\x02t.",  # no mark
        b"\x80\x02(.",
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GiB
        b"\x80\x02X\xff\xff\xff\xffabc",  # a text of 4 GiB
        b"\x80\x02\x8a\x40" + b"\x01" * 64 + b".",  # an integer of 512 bits
        b"\x80\x02]" + b"\x85" * 100_000 + b".",  # nested 100,000 deep
        b"\x80\x02]q\x00h\x00a.",  # contains itself
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02K\x01" + b"".join(bytes([0x71, i, 0x68, i, 0x86]) for i in range(60)) + b".",
    ],
)
def test_bombs_and_damage_are_refused(tmp_path, stream):
    with pytest.raises(UserError):
        read_torch(archive(tmp_path, stream))


@pytest.mark.parametrize(
    "sizes",
    [
        {"count": 5},  # storage longer than its member
        {"count": 2**61},
        {"count": -1},
        {"shape": (5,)},
        {"offset": 1},
        {"shape": (2, 2), "strides": (3, 1)},
        {"shape": (100, 100), "strides": (0, 0)},  # expands a single element
        {"shape": (4,), "strides": ()},
        {"storage": "WeirdStorage"},
    ],
)
def test_wrong_sizes_are_refused(tmp_path, sizes):
    with pytest.raises(UserError):
        read_torch(archive(tmp_path, tensor(**sizes), {"data/0": bytes(16)}))


def test_a_tensor_with_right_sizes_is_read(tmp_path):
    data = np.arange(4, dtype=np.float32)
    got = read_torch(archive(tmp_path, tensor(), {"data/0": data.tobytes()}))
    np.testing.assert_array_equal(got["x"].read(), data)
    strided = archive(tmp_path, tensor(shape=(2, 2), strides=(1, 2)), {"data/0": data.tobytes()})
    np.testing.assert_array_equal(read_torch(strided)["x"].read(), data.reshape(2, 2).T)


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as out, pytest.warns(UserWarning):
        out.writestr("a/data.pkl", b"\x80\x02}.")
        out.writestr("a/data.pkl", b"\x80\x02}.")
    with pytest.raises(UserError, match="twice"):
        read_torch(path)
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a/data.pkl", b"\x80\x02}." + bytes(10_000))
    with pytest.raises(UserError, match="compressed"):
        read_torch(path)
    with pytest.raises(UserError, match="byte order"):
        read_torch(archive(tmp_path, b"\x80\x02}.", {"byteorder": b"big"}))


def test_every_truncation_is_refused(tmp_path):
    """Before any tensor is read."""
    values = {f"w{i}": np.full((3, i + 1), i, np.float32) for i in range(3)}
    path = tmp_path / "model.pt"
    torch_zip(path, {k: (v.shape, "FloatStorage", v.tobytes) for k, v in values.items()})
    data = path.read_bytes()
    for name, lazy in read_torch(path).items():
        np.testing.assert_array_equal(lazy.read(), values[name])
    for size in range(0, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(UserError):
            read_torch(path)


def test_truncated_and_hostile_legacy_files_are_refused(fixtures, tmp_path):
    data = (fixtures / "legacy_format.pth").read_bytes()
    path = tmp_path / "old.pth"
    for size in (20, 100, 500, 2000, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError):
            read_torch(path)
    hostile = data[:15] + b"\x80\x02M\xe9\x03." + b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R."
    path.write_bytes(hostile)
    with pytest.raises(UserError, match=r"os\.system"):
        read_torch(path)


def test_duplicate_keys_are_recorded():
    stream = b"".join(torch_pickle({})).replace(
        b"}(u", b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u"
    )
    from longlive_jax.interop.pickles import read_pickle

    value = read_pickle(io.BytesIO(stream), "test", persistent=lambda pid: pid)
    assert value == {"a": 2}
    assert value.duplicates == ["a"]
