"""The compiled extension, called with all sorts of arguments: a result, or a Python exception.

A short seeded run here; `make sanitize` runs it under AddressSanitizer and
UndefinedBehaviorSanitizer, where an access outside a buffer or an overflow ends the process.
GPTAILOR_FUZZ_RUNS makes it longer, GPTAILOR_FUZZ_SEED changes its seed.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptailor import _C
from gptailor.merging.registry import METHODS, Method, Parameter

RUNS = int(os.environ.get("GPTAILOR_FUZZ_RUNS", "400"))
SEED = int(os.environ.get("GPTAILOR_FUZZ_SEED", "0"))
EXPECTED = (ValueError, TypeError, OSError, MemoryError, OverflowError, BufferError)
"""What the extension may raise; `_C.NanError` is a ValueError. Anything else is a bug."""

INTS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 2**31 - 1, 2**31,
        2**32, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]  # fmt: skip
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    0.1,
    2.0,
    1e-8,
    1e-45,
    1e-308,
    3.4e38,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
]
DTYPES = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "U8",
    "",
    "f32",
    "F32\0",
    "X" * 1000,
]
ENGINE = [name for name in METHODS if name not in ("average", "regmean")]
"""Methods the engine knows by name; average is a linear merge there, and regmean a linear solve."""
OTHER_METHODS = ["", "average", "linaer", "passthrough", "linear\0", "regmean"]
PARAMETERS = ["t", "lambda", "density", "epsilon", "seed", "eps", "max_iter", "odd", ""]


class Chooser:
    """Seeded choices of arguments, mostly valid ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rarely(self, part: float = 0.05) -> bool:
        return self.random.random() < part

    def integer(self, usual: int = 4096) -> int:
        if self.rarely(0.8):
            return self.random.randint(0, usual)
        return self.random.choice(INTS) * self.random.choice([1, 1, 1, -1]) + self.random.randint(
            -1, 1
        )

    def shape(self, n: int) -> list[int]:
        """Sizes with product n, or nonsense."""
        if self.rarely(0.1):
            return [self.integer() for _ in range(self.random.randint(0, 5))]
        if n > 1 and self.rarely(0.7):
            divisors = [d for d in range(1, min(n, 64) + 1) if n % d == 0]
            rows = self.random.choice(divisors)
            return [rows, n // rows]
        return [n] if self.rarely(0.8) else [1, n, 1]

    def number(self) -> Any:
        if self.rarely(0.02):
            return self.random.choice([None, "1", [], True, 10**400])
        if self.rarely(0.1):
            return self.random.choice(FLOATS)
        return round(self.random.uniform(-1.5, 1.5), 3)

    def dtype(self) -> str:
        return self.random.choice(DTYPES if self.rarely(0.1) else DTYPES[:3])

    def tensor(self, n: int, dtype: str) -> _C.Tensor:
        """n elements, random bits or ordinary values, which end where their buffer ends."""
        size = {"F32": 4, "F16": 2, "BF16": 2}.get(dtype, 8)
        shift = self.random.choice([0, 0, 1, 2, 3, 4, 64])
        buffer = _C.Buffer(shift + n * size)
        if self.rarely(0.1):
            raw = self.random.randbytes(n * size)
        else:  # values around 1, as random exponents would give many NaNs
            high = b"\x3f" if size == 4 else b"\x3c"
            raw = b"".join(self.random.randbytes(size - 1) + high for _ in range(min(n, 64))) * (
                n // 64 + 1
            )
        memoryview(buffer)[shift:] = raw[: n * size]
        shape = [n] if n % 2 or self.rarely(0.5) else [2, n // 2]
        return buffer.tensor(shift, shape, dtype)


@pytest.fixture(scope="module")
def chooser() -> Chooser:
    return Chooser(SEED)


def calls(kind: str) -> Iterator[Chooser]:
    for i in range(RUNS):
        yield Chooser(hash((SEED, i)) ^ sum(kind.encode()))


def test_views_of_files_and_buffers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for chooser in calls("views"):
        n = chooser.random.choice([0, 1, 7, 4095, 4096, 4097, 9000])
        path.write_bytes(chooser.random.randbytes(n))
        files = [_C.open_input(str(path), io) for io in ("mmap", "pread", "direct")]
        owners: list[_C.InputFile | _C.Buffer] = [_C.MappedFile(path), _C.Buffer(n), *files]
        for owner in owners:
            try:
                tensor = owner.tensor(
                    chooser.integer(n), chooser.shape(chooser.integer(n)), chooser.dtype()
                )
            except EXPECTED:
                continue
            assert 0 <= tensor.n_bytes <= n
            assert tensor.n_elements == math.prod(tensor.shape)
            read_all(tensor)
        try:
            read = _C.MappedFile(path).read(
                begin := chooser.integer(n), count := chooser.integer(n)
            )
        except EXPECTED:
            continue
        assert read == path.read_bytes()[begin : begin + count]
        assert len(read) == count


def read_all(tensor: _C.Tensor) -> None:
    """Every byte goes through the engine, if it merges that type: ASan sees a read too far."""
    if tensor.dtype in DTYPES[:3]:
        merge = _C.Merge("linear", [tensor], out_dtype="F32", weights=[1.0], check_nan=False)
        merge.run(0, tensor.n_elements, _C.Buffer(4 * tensor.n_elements))
    else:
        assert "Tensor" in repr(tensor)


def test_buffers_of_any_size() -> None:
    for chooser in calls("buffers"):
        size = chooser.integer()
        if 2**30 < size < 2**46:
            continue  # might be available
        try:
            assert memoryview(_C.Buffer(size)).nbytes == size
        except EXPECTED:
            assert size < 0 or size >= 2**46


def possible(chooser: Chooser, method: Method, n: int, dtype: str) -> dict[str, Any]:
    """Valid arguments for `method`."""
    low = max(method.min_sources, 1)
    count = min(max(chooser.random.choice([1, 2, 2, 3, 4, 16]), low), method.max_sources)
    same = chooser.tensor(n, dtype) if chooser.rarely(0.1) else None  # no difference, no angle
    words: dict[str, Any] = {
        "sources": [same or chooser.tensor(n, dtype) for _ in range(count)],
        "out_dtype": chooser.random.choice(DTYPES[:3]),
        "parameters": {p.name: value_of(chooser, p, count) for p in method.parameters},
        "weights": [round(chooser.random.uniform(-1, 2), 2) for _ in range(count)],
        "check_nan": chooser.rarely(0.2),
        "threads": chooser.random.choice([0, 1, 2]),
        "key": chooser.random.getrandbits(64),
    }
    if not method.weighted:
        del words["weights"]
    if method.base == "always" or words["parameters"].get("task_vectors"):
        words["base"] = same or chooser.tensor(n, dtype)
    if method.name == "fisher":
        words["statistics"] = [chooser.tensor(n, dtype) for _ in range(count)]
    if chooser.rarely(0.3):
        words["row_length"] = chooser.random.choice([d for d in range(1, 65) if n % d == 0])
    return words


def value_of(chooser: Chooser, parameter: Parameter, count: int) -> Any:
    """A value within or at the parameter's bounds, or sometimes one for each source."""

    def one() -> float:
        if parameter.kind == "flag":
            return float(chooser.rarely(0.5))
        if parameter.kind == "integer":
            return float(chooser.random.randint(int(parameter.low), int(min(parameter.high, 20))))
        if chooser.rarely(0.2):
            return chooser.random.choice([parameter.low, parameter.high])
        return chooser.random.uniform(parameter.low, min(parameter.high, 1.0))

    return [one() for _ in range(count)] if parameter.per_source and chooser.rarely(0.3) else one()


def spoil(chooser: Chooser, words: dict[str, Any], n: int) -> None:
    """Replaces one argument with something odd."""
    key = chooser.random.choice([*words, "factor", "row_length", "base", "statistics", "odd"])
    if key == "parameters":
        names = [*words["parameters"], *PARAMETERS]
        wild: list[Any] = [chooser.number(), [], [chooser.number()] * chooser.random.choice([1, 2])]
        words["parameters"][chooser.random.choice(names)] = chooser.random.choice(wild)
    elif key == "weights":
        count = chooser.random.choice([len(words["weights"])] * 5 + [0, 20])
        words["weights"] = [chooser.number() for _ in range(count)]
    elif key in ("sources", "statistics"):
        other = [chooser.tensor(n, "F32"), chooser.tensor(n + 1, "F32"), chooser.tensor(n, "I64")]
        words[key] = [*words.get(key, ()), chooser.random.choice(other)] * chooser.random.randint(
            0, 2
        )
    elif key == "base":
        words["base"] = chooser.random.choice([None, chooser.tensor(n, "BF16"), 3])
    elif key == "out_dtype":
        words["out_dtype"] = chooser.random.choice(DTYPES)
    elif key == "factor":
        words["factor"] = chooser.number()
    elif key in ("row_length", "key", "threads"):
        words[key] = chooser.integer(n)
    else:
        words[key] = chooser.number()


def test_merges_of_anything() -> None:
    done: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for chooser in calls("merge"):
        name = chooser.random.choice(ENGINE)
        n = chooser.random.choice([0, 1, 2, 3, 5, 64, 511, 512, 513, 1000, 4096, 5000])
        n = 70_000 if chooser.rarely(0.02) else n
        dtype = chooser.random.choice(DTYPES[:3])
        words = possible(chooser, METHODS[name], n, dtype)
        for _ in range(chooser.random.choice([0, 0, 0, 1, 2])):
            spoil(chooser, words, n)
        if chooser.rarely(0.02):
            name = chooser.random.choice(OTHER_METHODS)
        tried[name] += 1
        try:
            merge = _C.Merge(name, **words)
        except EXPECTED:
            continue
        assert merge.n_elements == words["sources"][0].n_elements
        done[name] += bool(run_slices(chooser, merge, merge.n_elements, words["out_dtype"]))
    for name in ENGINE:
        assert done[name] >= tried[name] // 5, (name, done[name], tried[name])


def run_slices(chooser: Chooser, merge: Any, n: int, out_dtype: str) -> int:
    """Runs the whole merge and some odd slices, into a buffer that ends with the result."""
    size = {"F32": 4, "F16": 2, "BF16": 2}[out_dtype]
    shift = chooser.random.choice([0, 1, 2, 64])
    out = _C.Buffer(shift + n * size)
    done = 0
    places = [(0, n, shift)]
    places += [(chooser.integer(n), chooser.integer(n), chooser.integer(n)) for _ in range(4)]
    for begin, count, offset in places:
        before = bytes(memoryview(out))
        try:
            merge.run(begin, count, out, offset)
        except EXPECTED:
            continue
        done += 1
        assert 0 <= begin <= begin + count <= n
        after = bytes(memoryview(out))
        assert after[:offset] == before[:offset]
        assert after[offset + count * size :] == before[offset + count * size :]
    return done


def test_merges_to_files(tmp_path: Path) -> None:
    for chooser in calls("write"):
        n = chooser.random.choice([0, 1, 512, 5000])
        source = _C.Buffer(4 * n).tensor(0, [n], "F32")
        merge = _C.Merge("linear", [source], out_dtype="BF16", weights=[1.0], check_nan=False)
        fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            begin, count = chooser.integer(n), chooser.integer(n)
            offset = (
                chooser.random.randint(0, 100) if chooser.rarely(0.7) else -abs(chooser.integer())
            )
            try:
                merge.write(begin, count, fd if not chooser.rarely() else -1, offset)
            except EXPECTED:
                continue
            assert os.fstat(fd).st_size == (offset + 2 * count if count else 0)
        finally:
            os.close(fd)


def test_an_output_that_overlaps_an_input_is_refused() -> None:
    buffer = _C.Buffer(4096)
    for chooser in calls("overlap"):
        offset, out = chooser.random.randint(0, 2048), chooser.random.randint(0, 2048)
        n = chooser.random.randint(1, 500)
        merge = _C.Merge(
            "linear", [buffer.tensor(offset, [n], "F32")], out_dtype="F32", weights=[1.0]
        )
        if offset < out + 4 * n and out < offset + 4 * n:
            with pytest.raises(ValueError, match="overlaps an input"):
                merge.run(0, n, buffer, out)
        else:
            merge.run(0, n, buffer, out)


def test_byte_ranges_of_files(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    (tmp_path / "from").write_bytes(data)
    source = os.open(tmp_path / "from", os.O_RDONLY)
    try:
        for chooser in calls("copy"):
            target = os.open(tmp_path / "to", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            begin, count = chooser.integer(len(data)), chooser.integer(len(data))
            offset = chooser.random.randint(0, 20_000)
            if chooser.rarely(0.1):
                offset = -abs(chooser.integer()) or 2**62 + chooser.random.randint(0, 2**62)
            fds = (
                (source, target)
                if not chooser.rarely(0.1)
                else (chooser.random.choice([-1, 10**6, target]), source)
            )
            try:
                _C.copy_range(fds[0], begin, fds[1], offset, count)
            except EXPECTED:
                continue
            finally:
                os.close(target)
            assert begin + count <= len(data) or count == 0
            assert (tmp_path / "to").read_bytes()[offset:] == data[begin : begin + count]
    finally:
        os.close(source)


def test_loading_to_memory(tmp_path: Path) -> None:
    data = bytes(range(256)) * 60
    (tmp_path / "from").write_bytes(data)
    ways = ["auto", "pread", "direct", "pinned", "mmap", ""]
    for chooser in calls("load"):
        sizes = [chooser.random.choice([0, 1, 100, 4096, 5000]) for _ in range(3)]
        targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        offsets = [chooser.integer(len(data)) for _ in sizes]
        paths = [tmp_path / ("from" if not chooser.rarely() else "none") for _ in sizes]
        try:
            loader = _C.DeviceLoader(
                None,
                way=chooser.random.choice(ways),
                threads=chooser.random.choice([0, 1, 3, -1]),
                buffer_bytes=chooser.random.choice([0, 1, 4096, 8192, 1 << 20, -1, 2**62]),
            )
            loader.load(list(zip(paths, offsets, targets, strict=True)))
        except (*EXPECTED, RuntimeError):
            continue
        for offset, target in zip(offsets, targets, strict=True):
            assert bytes(target.numpy()) == data[offset : offset + target.numel()]


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "nothing", "nul"])
def test_things_that_are_not_files(kind: str, tmp_path: Path) -> None:
    path: str | Path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        Path(path).mkdir()
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "nul":
        path = "a\0b"
    with pytest.raises(EXPECTED):
        _C.MappedFile(path)


@pytest.mark.parametrize("name", ENGINE)
def test_every_method_checks_its_number_of_sources(name: str) -> None:
    """The engine agrees with the registry, and checks for itself instead of trusting its caller."""
    method = METHODS[name]
    for count in (method.min_sources - 1, method.max_sources + 1):
        words = possible(Chooser(0), method, 8, "F32")
        words["sources"] = [Chooser(i).tensor(8, "F32") for i in range(count)]
        words["parameters"] = {}
        words.pop("weights", None)
        with pytest.raises(ValueError, match=r"sources|statistics"):
            _C.Merge(name, **words)
