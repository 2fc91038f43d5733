"""Times a passthrough `gptailor stitch` where the file system can share blocks (XFS, Btrfs).

Makes an image, mounts it (this needs root, and xfsprogs or btrfs-progs), writes a base and three
variants of a 1.1B-parameter Llama shape into it (2.2 GB each), and alternates between
`cp --reflink=never` of as many bytes and the stitch, as whole processes.

    python benchmarks/reflink.py [--kind xfs] [--work FOLDER] [--rounds 5]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stitch import write_model, write_recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="xfs", choices=("xfs", "btrfs"))
    parser.add_argument("--work", type=Path, help="a folder with 14 GB of free space")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gptailor-bench-", dir=arguments.work))
    image, root = work / "image", work / "disk"
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 30)
    try:
        subprocess.run([f"mkfs.{arguments.kind}", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(root)], check=True)
        try:
            measure(root, arguments.kind, arguments.rounds)
        finally:
            subprocess.run(["umount", str(root)], check=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(root: Path, kind: str, rounds: int) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(root / name, 22, seed)
    write_recipes(root, 22)
    source, out, copied = root / "base" / "model.safetensors", root / "out", root / "copy"
    stitch = [sys.executable, "-m", "gptailor.cli", "stitch", str(root / "passthrough.yaml")]
    stitch += [str(out), "--no-verify"]
    commands = {
        "cp --reflink=never": ["cp", "--reflink=never", str(source), str(copied)],
        "passthrough, --no-sync": [*stitch, "--no-sync"],
        "cp, sync": ["sh", "-c", f"cp --reflink=never {source} {copied} && sync {copied}"],
        "passthrough, sync": stitch,
    }
    figures: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            copied.unlink(missing_ok=True)
            subprocess.run(["sync", "-f", str(root)], check=True)
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number:  # the first round only fills the page cache
                figures[name].append(time.perf_counter() - began)
    files = len(list(out.glob("*.safetensors")))
    print(f"{kind}: 2.2 GB, {rounds} rounds, {files} weight files")
    references = dict(zip(commands, ("cp --reflink=never", None, "cp, sync", None), strict=True))
    reference = ""
    for name, values in figures.items():
        reference = references[name] or reference
        ratios = [a / b for a, b in zip(values, figures[reference], strict=True)]
        columns = [
            "  ".join(f"{f(v):7.3f}" for f in (min, statistics.median, max))
            for v in (values, ratios)
        ]
        print(f"{name:24} seconds {columns[0]}   ratio {columns[1]}")


if __name__ == "__main__":
    main()
