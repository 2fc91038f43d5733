"""Mutations that know the format: a JSON tree (keys may appear twice), a header around it.

Random changes of bytes rarely leave a valid header; these change one thing in a good one, or glue
two together. Everything depends only on the generator that is passed in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

INTEGERS = [
    0, 1, 2, 3, 7, 8, 16, 24, 32, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**61, 2**62,
    2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400,
]  # fmt: skip
SCALARS: list[Any] = [
    None, True, False, "", "a", "\n", "\x1b[2J", "\ud800", "\u202e", "x" * 600, "1.5", 0.0, 1.5,
    1e308, float("inf"), float("nan"), -1, "..", "../x", "a/b", "/etc/passwd", "a\0b",
    "pytorch_model.bin",
    "model.safetensors", "model.layers.0.x", "model.layers.999999.x", "0.", "1.2.3.4.5.6.7.8.9.0.",
]  # fmt: skip
KEYS = [
    "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "num_hidden_layers",
    "n_layer", "text_config", "layer_types", "mlp_only_layers", "num_experts", "auto_map",
    "first_k_dense_replace", "max_window_layers", "sliding_window_pattern", "num_attention_heads",
    "model", "vocab", "added_tokens", "content", "id", "model.layers.0.mlp.up_proj.weight",
]  # fmt: skip


class Pairs(list[Any]):
    """A JSON object as (key, value) pairs, because keys may appear twice."""


def parse(text: bytes) -> Any:
    return json.loads(text.decode(), object_pairs_hook=lambda pairs: Pairs([*map(list, pairs)]))


def dump(tree: Any) -> bytes:
    return _text(tree).encode("utf-8", "replace")


def _text(tree: Any) -> str:
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{_text(str(k))}:{_text(v)}" for k, v in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(_text, tree)) + "]"
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) > 10**4000:
        return "9" * 5000
    return json.dumps(tree)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """The tree with one change somewhere, made in place if possible."""
    places: list[tuple[Any, int | None]] = []
    stack = [tree]
    while stack and len(places) < 5000:
        node = stack.pop()
        if isinstance(node, Pairs):
            places += [(node, i) for i in range(len(node))]
            stack += [pair[1] for pair in node]
        elif isinstance(node, list):
            places += [(node, i) for i in range(len(node))]
            stack += node
    if not places or rng.random() < 0.02:
        return _value(rng, tree)
    node, i = rng.choice(places)
    assert i is not None
    kind = rng.randrange(7)
    if kind == 0:
        del node[i]
    elif kind == 1:
        node.insert(rng.randint(0, len(node)), node[i])
    elif kind == 2:
        j = rng.randrange(len(node))
        node[i], node[j] = node[j], node[i]
    elif isinstance(node, Pairs):
        if kind == 3:
            node[i] = [rng.choice([rng.choice(KEYS), _name(rng, node[i][0])]), node[i][1]]
        elif kind == 4:
            node.append([rng.choice(KEYS), _value(rng, node[i][1])])
        else:
            node[i] = [node[i][0], _value(rng, node[i][1])]
    else:
        node[i] = _value(rng, node[i])
    return tree


def _name(rng: random.Random, value: object) -> str:
    name = str(value)
    cut = rng.randint(0, len(name))
    middle = rng.choice(["\n", ".0.", "\x7f", "é", "\ud801", "."])
    return rng.choice(
        [name + "x", name[:cut], name[:cut] + middle + name[cut:], name * rng.choice([2, 50]), ""]
    )


def _value(rng: random.Random, old: Any) -> Any:
    kind = rng.randrange(10)
    if isinstance(old, int) and not isinstance(old, bool) and kind < 7:
        step = rng.choice([-1, 1, 8, -8, rng.choice(INTEGERS)])
        return rng.choice([old + step, old * 2, -old, rng.choice(INTEGERS)])
    if isinstance(old, str) and kind < 4:
        return _name(rng, old)
    if kind == 7:
        for _ in range(rng.choice([1, 2, 150, 1500])):
            old = [old]
        return old
    if kind == 8:
        return [old] * rng.choice([0, 1, 2, 70])
    if kind == 9:
        return Pairs([[rng.choice(KEYS), old]])
    return rng.choice([rng.choice(SCALARS), rng.choice(INTEGERS), "BF16", "F8_E4M3"])


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randint(0, len(raw))
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[at % len(raw)] = rng.randrange(256)
        elif kind == 1:
            del raw[at : at + rng.choice([1, 2, 8, 30])]
        elif kind == 2:
            raw[at:at] = rng.randbytes(rng.choice([1, 2, 8]))
        elif kind == 3:
            raw[at:at] = rng.choice(
                [b"[", b"]", b"{", b"}", b",", b'"', b"9" * 30, b"[" * 2000, b"\\u0000"]
            )
        else:
            end = rng.randint(at, min(len(raw), at + 60))
            raw[at:at] = raw[at:end]
    return bytes(raw)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with a few changes; now and then with changed bytes instead."""
    try:
        tree = parse(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        tree = mutate_tree(rng, tree)
    try:
        return dump(tree)
    except RecursionError:
        return data


def mutate_json_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of JSON with one line changed, or with lines moved, doubled or joined."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(12)
    if kind == 0:
        lines.insert(j, lines[i])
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        return mutate_bytes(rng, data)
    elif kind == 4:
        return b"".join(lines[: i + 1]) + b"\n".join(lines[i + 1 :])
    else:
        lines[i] = mutate_json(rng, lines[i])
    return b"\n".join(lines)


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a few changes to its tree, its length or its data."""
    n = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n > len(data) - 8 or rng.random() < 0.1:
        return mutate_bytes(rng, data)
    head, body = data[8 : 8 + n], data[8 + n :]
    kind = rng.randrange(10)
    if kind < 7:
        head = mutate_json(rng, head)
    elif kind == 7:
        body = body[: rng.randint(0, len(body))] + bytes(rng.choice([0, 0, 1, 8]))
    elif kind == 8:
        head += b" " * rng.choice([1, 8, 100])
    length = len(head)
    if kind == 9:
        length = rng.choice([0, length - 1, length + 1, length + len(body), *INTEGERS[-6:]]) % 2**64
    return length.to_bytes(8, "little") + head + body


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """YAML with lines moved, doubled or indented, and with words inserted that YAML interprets."""
    words = [
        b"&a ", b"*a", b"<<: ", b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ",
        b"!!binary ", b"!!set ", b"!!python/object:os.system ", b"? ", b"- ", b": ", b"{", b"}",
        b"[", b"]", b"~", b"0x" + b"f" * 90, b"1:59:59", b"1:" * 90, b".inf", b".nan",
        b"2001-99-99", b"null", b"yes", b"|\n", b">\n", b"%YAML 9.9\n", b"---\n", b"...\n",
        b"'", b'"', b'"\\ud800"', b"#", b"9" * 5000, b"merge: ties", b"layer: 1", b"weights: ",
        b"t: 0.5", b"density: ", b"scale: 2", b"take: ",
    ]  # fmt: skip
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        lines.insert(j, lines[i])
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        lines[i] = b" " * rng.randint(1, 4) + lines[i]
    elif kind == 3:
        lines[i] = lines[i].lstrip()
    elif kind <= 6:
        at = rng.choice([0, len(lines[i]), rng.randint(0, len(lines[i])), lines[i].find(b":") + 1])
        lines[i] = lines[i][:at] + rng.choice(words) + lines[i][at:]
    else:
        return mutate_bytes(rng, data)
    return b"\n".join(lines)


Mutator = Callable[[random.Random, bytes], bytes]
