"""Loading file ranges into memory gives the file's bytes for any chunks, threads and way."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptailor import _C

EMULATED = _C.build_info()["cuda_version"] == "emulated"
DEVICES = [
    None,
    pytest.param(
        0,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(_C.cuda_device_count() == 0, reason="no CUDA device"),
        ],
    ),
]
SIZE = 3_000_017


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path = tmp_path_factory.mktemp("load") / "weights.bin"
    path.write_bytes(content.tobytes())
    return path, content


def empty(n: int, device: int | None) -> torch.Tensor:
    where = "cpu" if device is None or EMULATED else f"cuda:{device}"
    return torch.full((n,), 7, dtype=torch.uint8, device=where)


def stream(device: int | None) -> int:
    return 0 if device is None or EMULATED else torch.cuda.current_stream(device).cuda_stream


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["auto", "pread", "direct", "pinned"])
@pytest.mark.parametrize("buffer_bytes", [1, 4096, 100_000, 1 << 20])
def test_ranges_arrive(
    file: tuple[Path, np.ndarray], way: str, buffer_bytes: int, device: int | None
) -> None:
    if way == "pinned" and device is None:
        pytest.skip("only for a GPU")
    path, content = file
    try:
        loader = _C.DeviceLoader(
            device, way=way, threads=3, buffer_bytes=buffer_bytes, pin_bytes=1 << 30
        )
    except RuntimeError as error:
        pytest.fail(str(error))
    ranges = [(0, SIZE), (0, 0), (SIZE, 0), (SIZE - 1, 1), (4095, 2), (4096, 4096), (17, 1_000_000)]
    ranges += [(1_000_017, 999_983), (17, 1_000_000)]  # neighbours, and the same bytes twice
    outs = [empty(n, device) for _, n in ranges]
    for _ in range(2):  # the buffers are reused
        loader.load(
            [(path, begin, out) for (begin, _), out in zip(ranges, outs, strict=True)],
            stream=stream(device),
        )
        for (begin, n), out in zip(ranges, outs, strict=True):
            np.testing.assert_array_equal(out.cpu().numpy(), content[begin : begin + n])
            out.fill_(7)
    loaded = loader.loaded
    assert sum(loaded.values()) == 2 * sum(n for _, n in ranges)
    if way == "pread":
        assert {k for k, v in loaded.items() if v} == {"pread"}
    if way == "pinned":
        assert {k for k, v in loaded.items() if v} == {"pinned"}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.integers(0, SIZE), min_size=2, max_size=12),
    order=st.randoms(use_true_random=False),
    buffer_bytes=st.sampled_from([4096, 8192, 65_536, 1 << 20]),
    way=st.sampled_from(["pread", "direct"]),
)
def test_any_cut_into_one_block(
    file: tuple[Path, np.ndarray],
    cuts: list[int],
    order: random.Random,
    buffer_bytes: int,
    way: str,
) -> None:
    path, content = file
    cuts = sorted(cuts)
    block = empty(cuts[-1] - cuts[0] + 2, None)
    requests = [(path, a, block[1 + a - cuts[0] : 1 + b - cuts[0]]) for a, b in pairwise(cuts)]
    order.shuffle(requests)
    _C.DeviceLoader(None, way=way, threads=2, buffer_bytes=buffer_bytes).load(requests)
    assert block[0] == block[-1] == 7  # nothing outside the ranges is written
    np.testing.assert_array_equal(block[1:-1].numpy(), content[cuts[0] : cuts[-1]])


def test_several_files_and_types(tmp_path: Path) -> None:
    values = {
        f"{k}.bin": torch.randn(1000, generator=torch.Generator().manual_seed(k)) for k in (1, 2)
    }
    for name, value in values.items():
        (tmp_path / name).write_bytes(value.numpy().tobytes())
    outs = [torch.zeros(50, 10), torch.zeros(500, dtype=torch.float32)]
    _C.DeviceLoader(None).load(
        [(tmp_path / "2.bin", 0, outs[0]), (str(tmp_path / "1.bin"), 2000, outs[1])]
    )
    assert torch.equal(outs[0].flatten(), values["2.bin"][:500])
    assert torch.equal(outs[1], values["1.bin"][500:])


class LoaderOptions(TypedDict, total=False):
    way: str
    threads: int
    buffer_bytes: int
    pin_bytes: int


def test_wrong_requests_and_options(file: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = file
    loader = _C.DeviceLoader(None)
    with pytest.raises(ValueError, match="do not lie within"):
        loader.load([(path, SIZE - 3, empty(4, None))])
    with pytest.raises(ValueError, match="do not lie within"):
        loader.load([(path, -1, empty(4, None))])
    with pytest.raises(FileNotFoundError) as missing:
        loader.load([(tmp_path / "none", 0, empty(4, None))])
    assert missing.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        loader.load([(tmp_path, 0, empty(4, None))])
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="Invalid argument"):
        loader.load([(tmp_path / "fifo", 0, empty(0, None))])
    with pytest.raises(BufferError, match="contiguous"):
        loader.load([(path, 0, torch.zeros(4, 4).t())])
    wrong: list[tuple[LoaderOptions, str]] = [
        ({"way": "fast"}, "unknown way to load 'fast'"),
        ({"way": "pinned"}, "only loads to a GPU"),
        ({"threads": -1}, "threads is negative"),
        ({"buffer_bytes": 0}, "buffer_bytes must be"),
        ({"pin_bytes": -1}, "pin_bytes is negative"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            _C.DeviceLoader(None, **arguments)
    with pytest.raises(ValueError, match="device is -1"):
        _C.DeviceLoader(-1)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(100_000))
    loader = _C.DeviceLoader(None)
    out = empty(100_000, None)
    loader.load([(path, 0, out)])
    os.truncate(path, 50_000)
    with pytest.raises(ValueError, match="do not lie within 50000 bytes"):
        loader.load([(path, 0, out)])


@pytest.mark.parametrize("way", ["pread", "direct"])
def test_a_file_that_ends_before_its_size_is_an_error(way: str) -> None:
    """As when a file is truncated during a read: sysfs states sizes larger than the content."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.is_file() or path.stat().st_size < 4096:
        pytest.skip("no such file here")
    with pytest.raises(OSError, match="Stale file handle") as error:
        _C.DeviceLoader(None, way=way).load([(path, 0, empty(4096, None))])
    assert error.value.filename == str(path)


@pytest.mark.skipif(_C.cuda_device_count() > 0, reason="there is a GPU")
def test_without_a_gpu_the_error_says_why() -> None:
    expected = "CUDA: .* \\(cuda|built without CUDA"
    with pytest.raises(RuntimeError, match=expected):
        _C.DeviceLoader(0)
