"""Checks and times merging and loading on a GPU, with random weights.

    python benchmarks/gpu.py [--quick] [--dir DIR]

Prints a table for benchmarks/README.md. Bandwidths count the bytes that must be read and written
once (sources, base, result), whatever a method actually moves. The exit code is 1 if a result is
wrong, 2 if there is no GPU. DIR holds the file that is loaded (4 GiB, 1 GiB with --quick).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptailor import _C
from gptailor.merging import reference, registry

# method, sources, base?, parameters, goal as a fraction of a copy's bandwidth
METHODS: list[tuple[str, int, bool, dict[str, Any], float | None]] = [
    ("linear", 3, False, {}, 0.9),
    ("task_arithmetic", 3, True, {}, 0.9),
    ("ram", 3, True, {}, 0.9),
    ("nearswap", 1, True, {"t": 0.001}, 0.9),
    ("ties", 3, True, {"density": 1.0}, 0.9),
    ("ties", 3, True, {"density": 0.5}, 0.5),
    ("dare_linear", 3, True, {"density": 0.5}, 0.5),
    ("dare_ties", 3, True, {"density": 0.5}, 0.5),
    ("breadcrumbs", 3, True, {"density": 0.9, "gamma": 0.01}, 0.5),
    ("breadcrumbs_ties", 3, True, {"density": 0.9, "gamma": 0.01}, 0.5),
    ("slerp", 2, False, {"t": 0.3}, None),
    ("nuslerp", 2, False, {}, None),
    ("multislerp", 3, False, {}, None),
    ("karcher", 3, False, {}, None),
    ("model_stock", 3, True, {}, None),
]
# One layer of a 7B Llama: (rows, columns) of its tensors.
HIDDEN, INNER = 4096, 11008
LAYER = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)] + [(1, HIDDEN)] * 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


class Bench:
    """Times work on one device, and collects the rows of the table.

    Args:
        device: the GPU.
        quick: fewer repetitions on smaller inputs.
        folder: for files.
    """

    def __init__(self, device: torch.device, quick: bool, folder: Path) -> None:
        self.device = device
        self.quick = quick
        self.folder = folder
        self.rows: list[tuple[str, str, str]] = []
        self.wrong: list[str] = []
        self.repeats = 5 if quick else 20

    def row(self, what: str, figure: str, goal: str = "") -> None:
        self.rows.append((what, figure, goal))
        print(f"{what:52} {figure:40} {goal}", file=sys.stderr)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Wall-clock time until the device is done, for each repetition after the first."""
        taken = []
        for number in range((repeats or self.repeats) + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number:
                taken.append(time.perf_counter() - began)
        return taken

    def stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    # Merging

    def copy_bandwidth(self, n_bytes: int) -> float:
        """Bytes per second, read plus written."""
        a = torch.ones(n_bytes, dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return 2 * n_bytes / statistics.median(self.seconds(lambda: b.copy_(a)))

    def models(
        self, shapes: Sequence[tuple[int, int]], n: int, seed: int
    ) -> list[list[torch.Tensor]]:
        """A base and n finetunes close to it, in bfloat16."""
        g = torch.Generator(self.device).manual_seed(seed)

        def normal(shape: Sequence[int], scale: float) -> torch.Tensor:
            kind = torch.bfloat16
            return torch.empty(shape, dtype=kind, device=self.device).normal_(0, scale, generator=g)

        base = [normal(shape, 0.02) for shape in shapes]
        return [base, *([b + normal(b.shape, 0.002) for b in base] for _ in range(n))]

    def merge(
        self, method: str, models: list[list[torch.Tensor]], n: int, with_base: bool, **options: Any
    ) -> tuple[Callable[[], None], list[torch.Tensor]]:
        outs = [torch.empty_like(t) for t in models[0]]
        view = _C.DeviceTensor.from_dlpack
        handles = [[view(t) for t in model] for model in models]
        targets = [view(t) for t in outs]
        sources = [list(tensors) for tensors in zip(*handles[1 : n + 1], strict=True)]
        weights = [1.0] if n == 1 else np.linspace(0.3, 0.7, n).tolist()

        def run() -> None:
            _C.merge_cuda(
                method,
                targets,
                sources,
                handles[0] if with_base else None,
                weights=weights,
                keys=list(range(len(outs))),
                stream=self.stream(),
                **options,
            )

        return run, outs

    def check(self, method: str, n: int, with_base: bool, parameters: dict[str, Any]) -> float:
        """The largest error relative to float64, in units of the error of one bfloat16 rounding."""
        shapes = [(1, 5), (3, 67), (64, 130), (257, 300)]
        models = self.models(shapes, n, seed=1)
        run, outs = self.merge(method, models, n, with_base, parameters=parameters)
        run()
        self.wait()
        worst = 0.0
        for key, out in enumerate(outs):
            x = [model[key].cpu().float().numpy() for model in models[1 : n + 1]]
            base = models[0][key].cpu().float().numpy() if with_base else None
            weights = np.linspace(0.3, 0.7, n).tolist() if n > 1 else [1.0]
            told = weights if registry.METHODS[method].weighted else None
            got = out.cpu().float().numpy()
            errors = []
            for kind in (np.float64, np.float32):  # which elements stay may depend on rounding
                exact = reference.merge(
                    method, x, base, weights=told, parameters=parameters, key=key, dtype=kind
                ).astype(np.float64)
                allowed = np.abs(exact) * 2.0**-8 + np.abs(np.stack(x)).sum(axis=0) * 2.0**-19
                errors.append(np.abs(got.reshape(exact.shape) - exact) / np.maximum(allowed, 1e-30))
            worst = max(worst, float(np.minimum(*errors).max()))
        return worst

    def merging(self) -> None:
        size = 1 << (28 if self.quick else 31)
        copy = self.copy_bandwidth(size)
        self.row("copy on the device", f"{copy / 1e9:.0f} GB/s read + written")
        models = self.models(LAYER * (1 if self.quick else 4), 3, seed=0)
        for method, n, with_base, parameters, goal in METHODS:
            error = self.check(method, n, with_base, parameters)
            name = method + "".join(f" {k}={v}" for k, v in parameters.items())
            if not error <= 1.0:
                self.wrong.append(f"{name}: {error:.2f} roundings away from the float64 reference")
            run, outs = self.merge(method, models, n, with_base, parameters=parameters)
            moved = sum(t.nbytes for t in outs) * (n + with_base + 1)
            speed = moved / statistics.median(self.seconds(run))
            figure = f"{speed / 1e9:.0f} GB/s, {speed / copy:.0%} of a copy; error {error:.2f}"
            verdict = "" if goal is None else _verdict(f"≥ {goal:.0%}", speed / copy >= goal)
            self.row(f"`{name}`, {n} sources", figure, verdict)

    # From a recipe to a model

    def recipes(self) -> None:
        from gptailor.evaluation.device_weights import DeviceWeights, GroupKey
        from gptailor.evaluation.resident import ResidentModel
        from gptailor.models.family import Family
        from gptailor.recipe import Merge, Recipe, Take

        layers = 4 if self.quick else 32
        folder = self.folder / "family"
        write_family(folder, layers)
        models = {name: str(folder) for name in ("base", "a", "b", "c")}
        family = Family(models, "base")
        backend = RandomBackend(self.device)
        resident = ResidentModel(
            family, device=str(self.device), cache_bytes=0, candidate_bytes=1 << 62, backend=backend
        )
        names = list(models)
        weights: DeviceWeights = resident.pools[0].weights
        weights.get([GroupKey(name, src) for name in names for src in range(layers)])

        def recipe(entries: Sequence[Any]) -> Recipe:
            return Recipe(models, "base", tuple(entries), "base", "base", "bfloat16")

        selected = [
            recipe([Take(names[(i * 7 + k) % 4], i) for i in range(layers) if (i + k) % 5])
            for k in range(self.repeats + 1)
        ]
        merged = [
            recipe(
                [
                    Merge("task_arithmetic", i, tuple((n, 0.3 + k / 1000) for n in names[1:]),
                          (("lambda", 1.0), ("normalize", 0.0)))
                    for i in range(layers)
                ]
            )
            for k in range(self.repeats + 1)
        ]  # fmt: skip
        for one in (*selected, *merged[:1], *selected):  # creates modules and warms the pool
            one.canonical()
            resident.assemble(one)
        loads = backend.loads
        todo = iter(selected)
        taken = self.seconds(lambda: resident.assemble(next(todo)), len(selected) - 1)
        resident.check_pointers(selected[-1])
        if backend.loads != loads:
            self.wrong.append("a recipe that only selects layers moved bytes")
        shape = f"7B-shaped, {layers} layers"
        middle = statistics.median(taken) * 1e3
        goal = "≤ 1 ms" if layers == 32 else ""
        self.row(
            f"recipe ready, layers selected ({shape})",
            f"{_spread(taken)} ms, no bytes moved",
            _verdict(goal, middle <= 1.0) if goal else "",
        )
        for one in merged:
            one.canonical()
        todo = iter(merged)
        taken = self.seconds(lambda: resident.assemble(next(todo)), len(merged) - 1)
        middle = statistics.median(taken) * 1e3
        goal = "≤ 20 ms" if layers == 32 else ""
        self.row(
            f"recipe ready, all layers merged from base + 3 ({shape})",
            f"{_spread(taken)} ms",
            _verdict(goal, middle <= 20.0) if goal else "",
        )

    # Loading

    def loading(self) -> None:
        from safetensors.torch import load_file

        path = self.folder / "weights.safetensors"
        n_bytes = write_random(path, (1 if self.quick else 4) << 30)
        pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        there = torch.empty_like(pinned, device=self.device)
        bus = statistics.median(self.seconds(lambda: there.copy_(pinned, non_blocking=True)))
        limit = pinned.nbytes / bus
        self.row("PCIe: copy from page-locked memory", f"{limit / 1e9:.1f} GB/s")
        block = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
        index = (self.device.index or 0) if self.device.type == "cuda" else None
        offset = path.stat().st_size - n_bytes
        first: dict[str, float] = {}

        def ours(way: str, **options: Any) -> Callable[[], None]:
            loader = _C.DeviceLoader(index, way=way, **options)
            request = [(path, offset, block)]
            return lambda: loader.load(request, stream=self.stream())

        ways: list[tuple[str, Callable[[], Callable[[], object]]]] = [
            ("safetensors load_file", lambda: lambda: load_file(path, device=str(self.device))),
            ("DeviceLoader pread", lambda: ours("pread")),
            ("DeviceLoader direct", lambda: ours("direct")),
            ("DeviceLoader pinned, first time", lambda: ours("pinned")),
            ("DeviceLoader auto, first time", lambda: ours("auto", pin_bytes=1 << 40)),
        ]
        for cache in ("cold", "warm"):
            for name, make in ways:
                taken = []
                for _ in range(2 if self.quick else 4):
                    work = make()
                    if cache == "cold":
                        forget(path)
                    else:
                        remember(path)
                    self.wait()
                    began = time.perf_counter()
                    try:
                        result = work()
                        self.wait()
                    except RuntimeError as error:
                        self.row(f"load, {cache} page cache: {name}", str(error))
                        break
                    taken.append(time.perf_counter() - began)
                    del result, work
                if taken:
                    self._loaded(name, cache, n_bytes / statistics.median(taken), limit, first)
        with contextlib.suppress(RuntimeError):
            work = ours("pinned")
            speed = n_bytes / statistics.median(self.seconds(work, 3))
            self._loaded("DeviceLoader pinned, again", "warm", speed, limit, first)
        file = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        if not torch.equal(block.cpu(), file[offset:]):
            self.wrong.append("the loaded bytes are not the file's")

    def _loaded(
        self, name: str, cache: str, speed: float, limit: float, first: dict[str, float]
    ) -> None:
        reference_speed = first.setdefault(cache, speed)
        wanted = 2.0 if cache == "cold" else 1.5
        ratio = speed / reference_speed
        verdict = ""
        if name.startswith("DeviceLoader"):
            goal = f"≥ {wanted:g} × safetensors" + (" or 90% of PCIe" if cache == "warm" else "")
            verdict = _verdict(goal, ratio >= wanted or (cache == "warm" and speed > 0.9 * limit))
        figure = f"{speed / 1e9:.1f} GB/s, {ratio:.2f} × safetensors"
        self.row(f"load, {cache} page cache: {name}", figure, verdict)


class RandomBackend:
    """Replaces a `LoadingBackend` by random weights, because not every disk has enough space."""

    is_mapped = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loads = 0

    def load(self, family: Any, model: str, infos: Sequence[Any]) -> list[torch.Tensor]:
        self.loads += 1
        return [
            torch.empty(info.shape, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)
            for info in infos
        ]


def write_family(folder: Path, layers: int) -> None:
    """Writes a 7B-shaped model as a sparse file: a header, and zeros that take no space."""
    folder.mkdir(exist_ok=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    names = ["self_attn." + p for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names += ["input_layernorm", "post_attention_layernorm"]
    shapes: list[tuple[str, list[int]]] = [("model.embed_tokens.weight", [32000, HIDDEN])]
    for i in range(layers):
        for name, shape in zip(names, LAYER, strict=True):
            dims = [HIDDEN] if shape[0] == 1 else list(shape)
            shapes.append((f"model.layers.{i}.{name}.weight", dims))
    shapes += [("model.norm.weight", [HIDDEN]), ("lm_head.weight", [32000, HIDDEN])]
    header, at = {}, 0
    for name, dims in shapes:
        end = at + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)


def write_random(path: Path, n_bytes: int) -> int:
    """Writes a file of 64 MiB tensors; returns the bytes of all tensors."""
    part = 1 << 26
    header = {
        f"t{i}": {
            "dtype": "BF16", "shape": [part // 2], "data_offsets": [i * part, (i + 1) * part]
        }
        for i in range(n_bytes // part)
    }  # fmt: skip
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    block = np.random.default_rng(0).integers(0, 256, part, np.uint8).tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _ in header:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return len(header) * part


def forget(path: Path) -> None:
    """Asks the kernel to drop the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def remember(path: Path) -> None:
    """Reads the file, so that it is in the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _verdict(goal: str, reached: bool) -> str:
    return f"{goal} {'reached' if reached else 'missed'}"


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (f(seconds) * 1e3 for f in (min, statistics.median, max))
    return f"{low:.2f}, **{middle:.2f}**, {high:.2f}"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def table(bench: Bench) -> Iterator[str]:
    root = Path(__file__).resolve().parents[1]
    commit = _first_line(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "no GPU"
    command = "python benchmarks/gpu.py" + (" --quick" if bench.quick else "")
    yield (
        f"`{command}`, {datetime.date.today():%Y-%m-%d}, {name}, driver {driver}, CUDA "
        f"{_C.build_info()['cuda_version']}, torch {torch.__version__}, commit {commit}."
    )
    yield ""
    yield "| | figure | goal |"
    yield "|---|---|---|"
    for row in bench.rows:
        yield "| " + " | ".join(row) + " |"


def run(device: torch.device, quick: bool, folder: str | None) -> int:
    with tempfile.TemporaryDirectory(prefix="gptailor-gpu-", dir=folder) as temporary:
        bench = Bench(device, quick, Path(temporary))
        bench.merging()
        bench.recipes()
        bench.loading()
    print("\n".join(table(bench)))
    for line in bench.wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if bench.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a minute, smaller inputs")
    parser.add_argument("--dir", help="folder for the file to load (default: a temporary one)")
    arguments = parser.parse_args()
    if _C.cuda_device_count() == 0 or not torch.cuda.is_available():
        built = "" if _C.build_info()["cuda"] else " (and this gptailor was built without CUDA)"
        print(f"There is no usable GPU here{built}: nothing to measure.", file=sys.stderr)
        return 2
    return run(torch.device("cuda", torch.cuda.current_device()), arguments.quick, arguments.dir)


if __name__ == "__main__":
    sys.exit(main())
