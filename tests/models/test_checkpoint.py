"""A malformed file for each error, random damage, and agreement with safetensors' own reader."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptailor.errors import ModelError
from gptailor.models.checkpoint import DTYPE_BITS, Checkpoint, read_header
from tests.models.tiny import encoded, file_bytes, run_python, save_index, save_model, save_tensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
DATA = bytes(range(32))


def header(**changes: object) -> bytes:
    return file_bytes({"a": A | changes, "b": B}, DATA)


DUPLICATE = b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}"
DUPLICATE_INSIDE = b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
NESTED = b'{"a":' + b"[" * 100_000

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 12345\n"
)

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated: it has 0 bytes"),
    "prefix cut": (b"\x10\0\0", "truncated: it has 3 bytes, but 8"),
    "header cut": (file_bytes({"a": A})[:-5], "truncated: its header has"),
    "header beyond the file": ((10**6).to_bytes(8, "little") + b"{}", "its header has 1000000"),
    "header beyond the limit": (
        (2**63).to_bytes(8, "little") + b"{}",
        "header of at most 100,000,000 bytes",
    ),
    "a git-lfs pointer": (POINTER, "a git-lfs pointer, not the file itself: fetch"),
    "a web page": (b"<!DOCTYPE html><html>", "does not begin with the length of a header"),
    "a pickle": (b"\x80\x02}q\x00(X" + b"\xff" * 40, "not a safetensors file"),
    "no header": (file_bytes(b""), "not valid JSON"),
    "not JSON": (file_bytes(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "nested too deep": (file_bytes(NESTED), "not valid JSON"),
    "a number of 5000 digits": (file_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "not an object": (file_bytes([1, 2]), "not a JSON object"),
    "duplicate tensor": (file_bytes(DUPLICATE, DATA[:24]), "'a' appears twice"),
    "duplicate key": (file_bytes(DUPLICATE_INSIDE, DATA[:24]), "'dtype' appears twice"),
    "name over two lines": (
        file_bytes({"a\nb": A}, DATA[:24]),
        r"'a\nb' is not a valid tensor name",
    ),
    "name is half a character": (
        file_bytes({"\ud800": A}, DATA[:24]),
        "is not a valid tensor name",
    ),
    "entry is no object": (file_bytes({"a": 3}), "a has not exactly the keys"),
    "entry lacks the shape": (
        file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 0]}}),
        "a has not exactly the keys",
    ),
    "entry has a key too many": (header(more=1), "a has not exactly the keys"),
    "unknown dtype": (header(dtype="F33"), "a has the unknown dtype 'F33'"),
    "dtype of another type": (header(dtype=["F32"]), "a has the unknown dtype"),
    "shape is a number": (header(shape=6), "a has the shape 6"),
    "shape is null": (header(shape=None), "a has the shape None"),
    "size is negative": (header(shape=[-2, -3]), "a has the shape [-2, -3]"),
    "size is a boolean": (header(shape=[True, 6]), "a has the shape [True, 6]"),
    "size is a float": (header(shape=[2.0, 3]), "a has the shape [2.0, 3]"),
    "size is text": (header(shape=["2", 3]), "a has the shape"),
    "size is huge": (header(shape=[2**63]), "a has the shape"),
    "product overflows": (header(shape=[2**62, 2**62]), "need more than any file has"),
    "product wraps to the right size": (header(shape=[2**61 + 6]), "a has 24 bytes"),
    "shape is larger": (header(shape=[2, 4]), "a has 24 bytes, but its shape [2, 4]"),
    "dtype is wider": (header(dtype="F64"), "dtype F64 need 48"),
    "offsets are three": (header(data_offsets=[0, 24, 24]), "a has the data_offsets"),
    "offsets are negative": (header(data_offsets=[-24, 0]), "a has the data_offsets"),
    "offsets are booleans": (header(data_offsets=[False, 24]), "a has the data_offsets"),
    "offsets go backwards": (header(data_offsets=[24, 0]), "a has the data_offsets [24, 0]"),
    "offsets are missing": (header(data_offsets=None), "a has the data_offsets None"),
    "bytes overlap": (
        file_bytes({"a": A, "b": B | {"data_offsets": [20, 28]}}, DATA[:28]),
        "b overlap another tensor",
    ),
    "bytes are the same": (
        file_bytes({"a": A, "b": A}, DATA[:24]),
        "b overlap another tensor",
    ),
    "a hole": (
        file_bytes({"a": A, "b": B | {"data_offsets": [28, 36]}}, DATA + DATA[:4]),
        "4 bytes before b belong to no tensor",
    ),
    "a hole at the beginning": (file_bytes({"b": B}, DATA), "24 bytes before b"),
    "beyond the file": (file_bytes({"a": A, "b": B}, DATA[:-1]), "is truncated"),
    "all data missing": (file_bytes({"a": A, "b": B}), "is truncated"),
    "bytes follow": (file_bytes({"a": A, "b": B}, DATA + b"x"), "1 bytes follow its last tensor"),
    "bytes follow nothing": (file_bytes({}, b"x"), "1 bytes follow"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case: str, tmp_path: Path) -> None:
    raw, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert str(path) in text
    assert message in text
    assert "\n" not in text


def test_a_shape_with_a_million_sizes_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(shape=[2**62] * 200_000))
    start = time.perf_counter()
    with pytest.raises(ModelError, match="more than any file has"):
        Checkpoint(tmp_path)
    assert time.perf_counter() - start < 5


def test_valid_files_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(header())
    found = read_header(path)
    assert [(t.name, t.dtype, t.shape, t.n_bytes) for t in found.values()] == [
        ("a", "F32", (2, 3), 24),
        ("b", "BF16", (4,), 8),
    ]
    path.write_bytes(file_bytes({"__metadata__": {"format": "pt"}}))
    assert read_header(path) == {}
    empty = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    path.write_bytes(file_bytes({"s": scalar, "e": empty}, DATA[:4]))
    assert {n: t.n_elements for n, t in read_header(path).items()} == {"e": 0, "s": 1}


@pytest.fixture(scope="module")
def valid_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    value = np.arange(6.0).reshape(2, 3)
    save_tensors(
        path,
        {d: (d, (2, 3), encoded(value, d)) for d in ("F32", "BF16", "F16")},
    )
    return path.read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_is_an_error_or_still_a_valid_file(
    data: st.DataObject, valid_bytes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(valid_bytes)
    n_header = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, n_header + 12)) % len(raw)
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "cut"]))
        byte = data.draw(st.sampled_from(b'0123456789-,:{}[]"e.\0\xff') | st.integers(0, 255))
        if kind == "set":
            raw[place] = byte
        elif kind == "delete" and len(raw) > 1:
            del raw[place]
        elif kind == "insert":
            raw.insert(place, byte)
        else:
            raw = raw[: data.draw(st.integers(1, len(raw)))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_header(path)
    except ModelError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    for info in tensors.values():
        assert 0 <= info.offset <= info.offset + info.n_bytes <= len(raw)
        assert info.n_bytes * 8 == info.n_elements * DTYPE_BITS[info.dtype]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=_json)
def test_any_json_header_is_an_error_or_valid(
    content: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(file_bytes(content))
    try:
        assert all(t.n_bytes == 0 for t in read_header(path).values())
    except ModelError as error:
        assert str(path) in str(error)


def test_index_errors(tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (tmp_path / shard).write_bytes(header())
    good: dict[str, object] = {"a": shard, "b": shard}
    cases: list[tuple[dict[str, object], str]] = [
        (good | {"c": "model-00002-of-00002.safetensors"}, "model-00002-of-00002.safetensors"),
        (good | {"c": shard}, f"puts c into {shard}, but that file lacks it"),
        ({"a": shard}, "holds b, which"),
        (
            good | {"c": "../x.safetensors"},
            "'../x.safetensors' for c, which is not a file in the same folder",
        ),
        (good | {"c": "/etc/passwd"}, "which is not a file in the same folder"),
        (good | {"c": ".."}, "which is not a file in the same folder"),
        (good | {"c": ""}, "which is not a file in the same folder"),
        (good | {"c": 3}, "names 3 for c"),
        (good | {"c": None}, "names None for c"),
        (good | {"c": "x" * 5000}, "which is not a file in the same folder"),
        (good | {"c": "x\0y"}, "which is not a file in the same folder"),
        (good | {"c": "."}, "which is not a file in the same folder"),
        ({}, "has no weight_map"),
    ]
    for weight_map, message in cases:
        save_index(tmp_path, weight_map)
        with pytest.raises(ModelError) as caught:
            Checkpoint(tmp_path)
        assert message in str(caught.value), weight_map
        assert "model.safetensors.index.json" in str(caught.value)
    save_index(tmp_path, good)
    assert set(Checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "x", "a": "x"}}', "\xff"]
)
def test_index_is_not_an_index(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    assert str(index) in str(caught.value)
    assert "header" not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in ("one.safetensors", "two.safetensors"):
        (tmp_path / shard).write_bytes(file_bytes({"a": A}, DATA[:24]))
    save_index(tmp_path, {"a": "one.safetensors"})
    assert set(Checkpoint(tmp_path).tensors) == {"a"}  # the index does not name the second file
    (tmp_path / "two.safetensors").write_bytes(file_bytes({"a": A, "b": B}, DATA))
    save_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two\.safetensors holds a, which"):
        Checkpoint(tmp_path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", shards=3)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ModelError, match=rf"{shard.name} is truncated"):
        Checkpoint(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=rf"names the shard {shard.name} .*does not exist"):
        Checkpoint(folder)


def test_a_single_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    # as transformers does: we must stitch the tensors that it loads
    save_model(tmp_path / "m", shards=2)
    (tmp_path / "m" / "model.safetensors").write_bytes(header())
    assert set(Checkpoint(tmp_path / "m").tensors) == {"a", "b"}


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="holds neither model"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle .* safe_serialization"):
        Checkpoint(tmp_path)


def test_agrees_with_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.int32, torch.int16]
    saved = {str(d): torch.randn(3, 5).mul(9).to(d) for d in dtypes}
    saved |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(7).half()}
    save_file(saved, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as theirs:
        assert set(checkpoint.tensors) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118
            expected = theirs.get_tensor(name)
            found = torch.from_dlpack(checkpoint.tensor(name))
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape == checkpoint.tensors[name].shape
            assert torch.equal(found, expected)
            info = theirs.get_slice(name)
            assert checkpoint.tensors[name].dtype == info.get_dtype()


def test_views_are_not_copies_and_outlive_the_checkpoint(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    name = "model.embed_tokens.weight"
    views = [checkpoint.tensor(name) for _ in range(2)]
    addresses = [np.from_dlpack(_as_bytes(checkpoint, name)).ctypes.data for _ in range(2)]
    assert addresses[0] == addresses[1]
    expected = (folder / "model.safetensors").read_bytes()
    info = checkpoint.tensors[name]
    del checkpoint
    (folder / "model.safetensors").unlink()
    gc.collect()
    from gptailor import _C

    out = _C.Buffer(info.n_elements * 4)
    _C.Merge("linear", [views[0]], out_dtype="F32", weights=[1.0]).run(0, info.n_elements, out)
    bits = np.frombuffer(expected[info.offset : info.offset + info.n_bytes], "<u2")
    assert np.array_equal(np.frombuffer(memoryview(out), "<u4") >> 16, bits)


def _as_bytes(checkpoint: Checkpoint, name: str) -> Any:
    info = checkpoint.tensors[name]
    checkpoint.tensor(name)
    return checkpoint.file(info.path).tensor(info.offset, (info.n_bytes,), "U8")


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="became shorter"):
        checkpoint.tensor("model.norm.weight")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    n_bytes = 50 * 10**9
    entry = {"dtype": "F32", "shape": [n_bytes // 4], "data_offsets": [0, n_bytes]}
    raw = file_bytes({"model.layers.0.w": entry})
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + n_bytes)
    start = time.perf_counter()
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensor("model.layers.0.w").n_bytes == n_bytes
    assert time.perf_counter() - start < 1.0


def test_no_heavy_import(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    code = (
        "import sys; from gptailor.models.family import Family\n"
        "Family({'m': sys.argv[1]}, 'm')\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'lm_eval'} & set(sys.modules)))"
    )
    done = run_python(code, tmp_path / "m")
    assert done.stdout.strip() == "[]", done.stderr
