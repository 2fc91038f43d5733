"""Mapped files, buffers and tensors: bounds, lifetimes, and what torch sees of them."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from gptailor import _C

BYTES = bytes(range(256)) * 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "weights.bin"
    file.write_bytes(BYTES)
    return file


def test_a_mapped_file_is_what_is_on_disk(path: Path) -> None:
    file = _C.MappedFile(str(path))
    assert (file.path, file.size) == (str(path), len(BYTES))
    assert file.read(0, len(BYTES)) == BYTES
    assert file.read(250, 10) == BYTES[250:260]
    assert file.read(len(BYTES), 0) == b""
    assert _C.MappedFile(path).size == len(BYTES)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    file = _C.MappedFile(tmp_path / "empty")
    assert (file.size, file.read(0, 0)) == (0, b"")
    assert torch.utils.dlpack.from_dlpack(file.tensor(0, (0, 3), "F32")).shape == (0, 3)


@pytest.mark.parametrize(
    ("offset", "n_bytes"), [(-1, 1), (0, -1), (4096, 1), (4000, 97), (2**62, 2**62)]
)
def test_reading_beyond_the_file(path: Path, offset: int, n_bytes: int) -> None:
    with pytest.raises(ValueError, match="do not lie within 4096 bytes"):
        _C.MappedFile(path).read(offset, n_bytes)


def test_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        _C.MappedFile(str(tmp_path / "nö"))
    assert error.value.filename == str(tmp_path / "nö")
    with pytest.raises(IsADirectoryError):
        _C.MappedFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        _C.MappedFile(tmp_path / "pipe")


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(name).write_bytes(b"abc")
    file = _C.MappedFile(name)
    assert (file.path, file.read(0, 3)) == (name, b"abc")


def test_tensors_outlive_the_file_object(path: Path) -> None:
    file = _C.MappedFile(path)
    ref = weakref.ref(file) if hasattr(file, "__weakref__") else None
    view = file.tensor(0, (1024,), "I32")
    t = torch.utils.dlpack.from_dlpack(view)
    path.unlink()
    del file, view
    gc.collect()
    assert ref is None or ref() is None
    assert t.numpy().tobytes() == BYTES
    row = t[7:8]
    del t
    gc.collect()
    assert row.numpy().tobytes() == BYTES[28:32]


def test_the_mapping_ends_with_the_last_tensor(path: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(path))

    t = torch.utils.dlpack.from_dlpack(_C.MappedFile(path).tensor(0, (8,), "U8"))
    assert maps() == 1
    del t
    gc.collect()
    assert maps() == 0
    capsule = _C.MappedFile(path).tensor(0, (8,), "U8").__dlpack__()  # never consumed
    assert maps() == 1
    del capsule
    assert maps() == 0


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I64", "F64"])
def test_any_offset(path: Path, offset: int, dtype: str) -> None:
    t = _C.MappedFile(path).tensor(offset, (5, 3), dtype)
    assert (t.shape, t.dtype, t.n_elements) == ((5, 3), dtype, 15)
    seen = torch.utils.dlpack.from_dlpack(t)
    assert seen.shape == (5, 3)
    assert seen.clone().view(torch.uint8).numpy().tobytes() == BYTES[offset:][: t.n_bytes]


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        ("BOOL", torch.bool), ("U8", torch.uint8), ("I8", torch.int8), ("I16", torch.int16),
        ("U16", torch.uint16), ("F16", torch.float16), ("BF16", torch.bfloat16),
        ("I32", torch.int32), ("U32", torch.uint32), ("F32", torch.float32),
        ("I64", torch.int64), ("U64", torch.uint64), ("F64", torch.float64),
        ("C64", torch.complex64),
    ],
)  # fmt: skip
def test_torch_knows_the_type(dtype: str, want: torch.dtype) -> None:
    buffer = _C.Buffer(64)
    t = buffer.tensor(0, (2, 1, 3), dtype)
    seen = torch.utils.dlpack.from_dlpack(t)
    assert (seen.dtype, tuple(seen.shape)) == (want, (2, 1, 3))
    assert t.n_bytes == 6 * seen.element_size()
    assert t.__dlpack_device__() == (1, 0)
    assert torch.utils.dlpack.from_dlpack(buffer.tensor(0, (), dtype)).shape == ()
    if dtype != "BOOL":
        again = _C.Tensor.from_dlpack(seen)
        assert (again.shape, again.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_sub_byte_types_are_sized_but_not_exported(dtype: str) -> None:
    t = _C.Buffer(64).tensor(0, (8,), dtype)
    assert t.n_bytes == (4 if dtype == "F4" else 6)
    with pytest.raises(BufferError, match=dtype):
        t.__dlpack__()
    with pytest.raises(ValueError, match="whole byte"):
        _C.Buffer(64).tensor(0, (3,), dtype)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_eight_bit_floats(dtype: str) -> None:
    assert _C.Buffer(64).tensor(1, (7, 9), dtype).n_bytes == 63


@pytest.mark.parametrize(
    ("offset", "shape", "dtype", "message"),
    [
        (0, (17,), "F32", "do not lie within 64"),
        (1, (16,), "F32", "do not lie within 64"),
        (-1, (1,), "F32", "do not lie within 64"),
        (65, (0,), "F32", "do not lie within 64"),
        (0, (-1,), "F32", "negative dimension"),
        (0, (-1, 0), "F32", "negative dimension"),
        (0, (2**32, 2**32), "F32", "more than 2"),
        (0, (2**62,), "F32", "more than 2"),
        (2**63 - 1, (1,), "F32", "do not lie within 64"),
        (0, (1,), "float32", "unknown dtype 'float32'.*BF16"),
    ],
)
def test_views_that_do_not_fit(
    offset: int, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Buffer(64).tensor(offset, shape, dtype)


def test_a_buffer_is_zeroed_aligned_and_writable() -> None:
    buffer = _C.Buffer(1 << 20)
    view = memoryview(buffer)
    assert (buffer.size, view.nbytes, view.readonly) == (1 << 20, 1 << 20, False)
    assert not np.frombuffer(view, np.uint8).any()
    t = torch.utils.dlpack.from_dlpack(buffer.tensor(0, (4,), "F32"))
    assert t.data_ptr() % 64 == 0
    t[2] = 1.5
    assert np.frombuffer(memoryview(buffer), np.float32)[2] == 1.5
    del buffer
    gc.collect()
    view[0:4] = np.float32(2.5).tobytes()
    assert t[0] == 2.5


def test_buffers_that_cannot_be_allocated() -> None:
    assert memoryview(_C.Buffer(0)).nbytes == 0
    with pytest.raises(MemoryError):
        _C.Buffer(2**62)
    with pytest.raises(ValueError, match="negative"):
        _C.Buffer(-1)


def test_tensors_of_other_libraries() -> None:
    t = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    view = _C.Tensor.from_dlpack(t)
    assert (view.shape, view.dtype) == ((2, 3), "BF16")
    assert torch.utils.dlpack.from_dlpack(view).data_ptr() == t.data_ptr()
    merge = _C.Merge("linear", [view], out_dtype="F32")
    del t, view
    gc.collect()
    out = _C.Buffer(24)
    merge.run(0, 6, out)
    assert np.frombuffer(memoryview(out), np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(BufferError, match="contiguous"):
        _C.Tensor.from_dlpack(torch.zeros(3, 4).t())
    assert _C.Tensor.from_dlpack(torch.zeros(3, 4)[1:2].t()).shape == (4, 1)
    assert _C.Tensor.from_dlpack(np.array([1, 2], np.float32)).shape == (2,)
    with pytest.raises(AttributeError):
        _C.Tensor.from_dlpack([1.0])  # type: ignore[arg-type]
