"""Write what mergekit computes on small tensors, for the tests of `gptailor.merging.reference`.

A development tool, run by hand when mergekit changes; nothing else needs mergekit:

    python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install mergekit
    PYTHONPATH=. /tmp/mergekit/bin/python tools/mergekit_golden.py tests/golden/mergekit_methods.npz

It calls mergekit's public `merge_tensors` (0.1.5 or newer) in float32. The masks of dare and della
are ours: while mergekit runs, `torch.bernoulli` draws from `reference.philox`, with the
probabilities that mergekit asks for. How often mergekit's own masks keep an element is recorded
separately.

The file has `values`, all numbers of all tensors concatenated, float32, and `index`, JSON with
mergekit's and torch's versions, `tensors` (name → offset, shape) and `cases`. A case has a method,
sources, base, weights and parameters by our registry's names, and a result or the type of the
exception.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mergekit.merge_methods as mm
import numpy as np
import torch
from mergekit.sparsify import bernoulli, della_magprune

from gptailor.merging.reference import philox
from gptailor.merging.registry import METHODS

KEY = 20250620
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
PER_SOURCE = ("density", "gamma", "epsilon")
FLAGS = {
    "normalize", "rescale", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights",
    "filter_wise",
}  # fmt: skip


def tensor_sets() -> dict[str, np.ndarray[Any, Any]]:
    """Name → float32 (1 + S, ...): the base, then S sources."""
    rng = np.random.default_rng(20250620)

    def family(shape: tuple[int, ...], n: int, base: float, delta: float) -> Any:
        b = base * rng.standard_normal(shape)
        return np.stack([b, *(b + delta * rng.standard_normal((n, *shape)))])

    v = rng.standard_normal((6, 8))
    zero = np.zeros_like(v)
    plain = family((6, 8), 1, 1.0, 0.3)
    grid = rng.integers(-2, 3, (4, 6, 8)) * 0.25
    grid[1:] += grid[0]
    sets = {
        "plain": family((12, 20), 4, 1.0, 0.3),
        "vector": family((37,), 3, 1.0, 0.3),
        "small": family((12, 20), 3, 0.02, 2e-4),
        "equal": np.stack([plain[0], plain[1], plain[1], plain[1]]),
        "zero": np.stack([plain[0]] * 4),
        "collinear": np.stack([zero, v, 2 * v, 0.5 * v]),
        "antiparallel": np.stack([zero, v, -v, 3 * v]),
        "uneven": np.stack([zero, v, -3 * v, 2 * v]),
        "one": family((1,), 3, 1.0, 0.3),
        "column": family((7, 1), 3, 1.0, 0.3),
        "cube": family((2, 3, 4), 3, 1.0, 0.3),
        "grid": grid,
    }
    return {name: np.asarray(t, np.float32) for name, t in sets.items()}


def variants(method: str) -> list[dict[str, Any]]:
    """Parameter sets for the tensor sets `plain` and `vector`; `_w` are weights."""
    lam = [{"lambda": 0.6}, {"normalize": 1}, {"normalize": 0}, {"_w": [0.9, -0.4, 0.3]}]
    density = [{"density": d} for d in (0.2, 0.5, 0.83)]
    density += [{"density": [0.3, 1.0, 0.6]}, {"density": 0.5, "rescale": 0}]
    density += [{"density": 0.5, "rescale": 1, "normalize": 1, "lambda": 0.7}]
    table: dict[str, list[dict[str, Any]]] = {
        "linear": [{"normalize": 0}, {"_w": [1.0, -0.2, 0.3]}, {"_w": [0.5, -0.75, 0.25]}],
        "slerp": [{"t": t} for t in (0.0, 0.25, 0.5, 0.9, 1.0)],
        "nuslerp": [
            {"nuslerp_flatten": f, "nuslerp_row_wise": r, "task_vectors": b, "_w": [0.7, w]}
            for f, r, b, w in ((1, 0, 0, 0.2), (0, 0, 0, 0.3), (0, 1, 0, 0.3), (0, 0, 1, 0.4),
                               (0, 1, 1, 0.5), (1, 0, 1, 0.6), (1, 0, 0, -0.7))
        ],
        "multislerp": [
            {"task_vectors": 1}, {"normalize_weights": 0}, {"_w": [1.0, 0.0, 0.0]},
            {"_w": [0.5, -0.75, 0.25]},
            {"task_vectors": 1, "_w": [0.1, 0.8, 0.3], "eps": 1e-3},
        ],
        "karcher": [{"max_iter": 1}, {"max_iter": 3, "tol": 1e-3}, {"max_iter": 50}],
        "task_arithmetic": lam,
        "ties": [*lam, *density, {"density": 0.0}],
        "dare_linear": [*density, {"density": 0.4, "seed": 3}, *lam],
        "dare_ties": [*density, {"density": 0.4, "seed": 3}],
        "della": [{"density": 0.5}, {"density": [0.4, 1.0, 0.6], "epsilon": [0.1, 0.2, 0.3]},
                  {"density": 0.0}, {"density": 0.5, "rescale": 0, "normalize": 0},
                  {"density": 0.9}],
        "della_linear": [{"density": 0.5}, {"density": 0.5, "epsilon": 0.4, "seed": 9}],
        "breadcrumbs": [*density, {"density": 0.5, "gamma": 0.2}, {"density": 0.9, "gamma": 0.3},
                        {"density": 0.5, "gamma": 0.0}],
        "breadcrumbs_ties": [*density, {"density": 0.5, "gamma": [0.0, 0.1, 0.2]}],
        "sce": [{"select_topk": k} for k in (0.0, 0.1, 0.5, 0.77)],
        "ram": [{"epsilon": 0.2}, {"epsilon": 0.6}],
        "model_stock": [{"filter_wise": 1}],
        "nearswap": [{"t": t} for t in (1e-4, 0.05, 1.0)],
    }  # fmt: skip
    return table.get(method, [])


DEFAULTS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4}, "nearswap": {"t": 0.1}, "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "della": {"density": 0.5},
    "della_linear": {"density": 0.5}, "breadcrumbs": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5}, "sce": {"select_topk": 0.5},
}  # fmt: skip


def cases() -> Iterator[dict[str, Any]]:
    """Every case without its result."""
    known = {m.spec.name for m in mm.registered_methods()}
    for method, declared in METHODS.items():
        if method not in known:
            continue
        for name, tensors in tensor_sets().items():
            chosen = [DEFAULTS.get(method, {})]
            if name in ("plain", "vector"):
                chosen += variants(method)
            elif method in ("nuslerp", "model_stock", "multislerp"):
                chosen += variants(method)[:4]
            n_sources = min(declared.max_sources, len(tensors) - 1, 3)
            for parameters in chosen:
                weights = None
                if declared.weighted:
                    weights = parameters.get("_w", [0.5, 0.3, 0.4])[:n_sources]
                yield {
                    "method": method,
                    "tensors": name,
                    "n_sources": n_sources,
                    "base": declared.takes_base(parameters),
                    "weights": weights,
                    "parameters": {k: v for k, v in parameters.items() if k != "_w"},
                }


@contextmanager
def our_masks(method: str, n_sources: int, parameters: dict[str, Any]) -> Iterator[None]:
    """Makes `torch.bernoulli` return the masks of Philox, for the sources in turn."""
    density = parameters.get("density", 1.0)
    each = density if isinstance(density, list) else [density] * n_sources
    least = 0.0 if method.startswith("della") else -1.0  # della draws nothing for a density of 0
    drawn = iter([i for i, d in enumerate(each) if least < d < 1])
    original = torch.bernoulli

    def bernoulli(p: torch.Tensor) -> torch.Tensor:
        if torch.isnan(p).any():
            raise ValueError("not a probability")
        u = philox.words(int(parameters.get("seed", 0)), KEY, next(drawn), p.numel())
        mask = philox.below(u.reshape(tuple(p.shape)), p.double().numpy())
        return torch.from_numpy(mask).to(p.dtype)

    torch.bernoulli = bernoulli  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.bernoulli = original


def result(case: dict[str, Any], tensors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The result of mergekit for a case."""
    method, n_sources = case["method"], case["n_sources"]
    names = [f"source{i}" for i in range(n_sources)]
    inputs = [torch.from_numpy(t.copy()) for t in tensors[1 : 1 + n_sources]]
    ids, base_index = list(names), None
    if case["base"]:
        ids, inputs, base_index = ["base", *ids], [torch.from_numpy(tensors[0].copy()), *inputs], 0
    elif method == "slerp":
        base_index = 0
    values: dict[str, Any] = {}
    for key, value in case["parameters"].items():
        if key in ("seed", "task_vectors"):
            continue
        if key in PER_SOURCE and method != "ram":
            each = value if isinstance(value, list) else [value] * n_sources
            values[key] = dict(zip(names, each, strict=True))
        else:
            values[key] = bool(value) if key in FLAGS else value
    if case["weights"] is not None:
        values["weight"] = dict(zip(names, case["weights"], strict=True))
    with our_masks(method, n_sources, case["parameters"]):
        merged = mm.merge_tensors(
            inputs, method, parameters=values, ids=ids, base_index=base_index, dtype=torch.float32
        )
    return merged.numpy()


def keep_counts(density: float, epsilon: float | None, n: int, rounds: int) -> list[int]:
    """How often mergekit's own masks keep an element, by rank, in `rounds` rows of n."""
    torch.manual_seed(1)
    rows = torch.arange(1.0, n + 1).repeat(rounds, 1)
    if epsilon is None:
        sparse = bernoulli(rows, density)
    else:
        sparse = della_magprune(rows, density, epsilon, rescale_norm=None)
    return [int(c) for c in (sparse != 0).sum(dim=0)]


def main(path: str) -> None:
    """Write the file."""
    warnings.simplefilter("ignore")
    store: list[np.ndarray[Any, Any]] = []

    def put(array: np.ndarray[Any, Any]) -> list[Any]:
        offset = sum(a.size for a in store)
        store.append(np.asarray(array, np.float32).ravel())
        return [offset, list(array.shape)]

    sets = tensor_sets()
    index: dict[str, Any] = {
        "mergekit": version("mergekit"), "torch": torch.__version__, "key": KEY,
        "tensors": {name: put(t) for name, t in sets.items()},
    }  # fmt: skip
    done, same = [], {}
    for case in cases():
        try:
            values = result(case, sets[case["tensors"]])
        except Exception as error:
            done.append({**case, "error": type(error).__name__})
            continue
        if (data := values.tobytes()) not in same:
            same[data] = put(values)
        done.append({**case, "result": same[data]})
    index["cases"] = done
    index["keep_counts"] = [
        {"density": d, "epsilon": e, "rounds": 4000, "counts": keep_counts(d, e, 16, 4000)}
        for d, e in ((0.4, 0.3), (0.6, 0.15), (0.3, None))
    ]
    np.savez_compressed(
        path,
        values=np.concatenate(store),
        index=np.frombuffer(json.dumps(index).encode(), np.uint8),
    )
    n_errors = sum("error" in case for case in done)
    size = Path(path).stat().st_size
    print(
        f"{len(done)} cases, {n_errors} of them errors, {size} bytes; mergekit {index['mergekit']}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
