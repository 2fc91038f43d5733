"""Times every merge method of the engine on tensors in memory, alternating with a plain copy.

The inputs are a base and three finetunes of one matrix in bfloat16, whose differences are as coarse
as bfloat16 makes them. For each method it prints the processor time in nanoseconds per element of a
source (so that other work on the machine matters little), the part of it spent analysing the whole
tensors first, the bytes per second that must move at least, and the ratio of wall-clock times to
copying the output, taken within a round: minimum, median and maximum of the rounds.

    python benchmarks/merge.py [--threads 0] [--rounds 7] [--rows N] [--columns N] [METHOD ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from gptailor import _C

CASES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("linear", 3, False, {}),
    ("task_arithmetic", 3, True, {}),
    ("slerp", 2, False, {"t": 0.5}),
    ("nuslerp", 2, False, {"nuslerp_flatten": 0}),
    ("multislerp", 3, False, {}),
    ("karcher", 3, False, {}),
    ("model_stock", 3, True, {}),
    ("ties", 3, True, {"density": 0.5}),
    ("dare_linear", 3, True, {"density": 0.5}),
    ("dare_ties", 3, True, {"density": 0.5}),
    ("della", 3, True, {"density": 0.5}),
    ("breadcrumbs", 3, True, {"density": 0.9}),
    ("sce", 3, True, {"select_topk": 0.5}),
    ("ram", 3, True, {}),
    ("nearswap", 1, True, {"t": 0.001}),
    ("arcee_fusion", 1, True, {}),
    ("widen", 3, True, {}),
]


def tensor(values: np.ndarray, shape: tuple[int, int]) -> _C.Tensor:
    """float32 values as bfloat16 (truncated) in the engine's memory."""
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    buffer = _C.Buffer(bits.nbytes)
    memoryview(buffer)[:] = bits.tobytes()
    return buffer.tensor(0, shape, "BF16")


def span(values: list[float]) -> str:
    return "  ".join(f"{f(values):7.2f}" for f in (min, statistics.median, max))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.columns)
    n = arguments.rows * arguments.columns
    rng = np.random.default_rng(0)
    base_values = rng.standard_normal(n, np.float32) * np.float32(0.02)
    base = tensor(base_values, shape)
    sources = [
        tensor(base_values + rng.standard_normal(n, np.float32) * np.float32(0.001), shape)
        for _ in range(3)
    ]
    out = _C.Buffer(2 * n)
    memoryview(out)[:] = bytes(2 * n)

    def timed(method: str, n_sources: int, with_base: bool, o: dict[str, Any]) -> list[float]:
        began, cpu = time.perf_counter(), time.process_time()
        merge = _C.Merge(
            method,
            sources[:n_sources],
            base if with_base else None,
            out_dtype="BF16",
            parameters=o,
            threads=arguments.threads,
        )
        prepared = time.process_time()
        merge.run(0, n, out)
        ended = time.process_time()
        return [time.perf_counter() - began, ended - cpu, prepared - cpu]

    print(f"{_C.build_info()['simd']}, {shape[0]} x {shape[1]} bfloat16, {arguments.rounds} rounds")
    print(
        f"{'':16}{'ns per source element':>27}  {'before':>7}  {'GB/s':>6}  {'ratio to a copy':>25}"
    )
    for method, n_sources, with_base, o in CASES:
        if arguments.methods and method not in arguments.methods:
            continue
        nanoseconds, first, ratios = [], [], []
        for number in range(arguments.rounds + 1):
            copy = timed("linear", 1, False, {"normalize": 0})[0]
            wall, cpu, before = timed(method, n_sources, with_base, o)
            if number:  # the first round only touches the memory
                nanoseconds.append(cpu / n / n_sources * 1e9)
                first.append(before / n / n_sources * 1e9)
                ratios.append(wall / copy)
        n_bytes = 2 * (n_sources + with_base + 1)
        rate = n_bytes / (statistics.median(nanoseconds) * n_sources)
        print(
            f"{method:16}{span(nanoseconds):>27}  {statistics.median(first):7.2f}  {rate:6.1f}  "
            f"{span(ratios):>25}"
        )


if __name__ == "__main__":
    main()
