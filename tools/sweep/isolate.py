"""Tries one family at a time, each in its own process with limits on time and memory."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tools.sweep.cases import Case
from tools.sweep.check import Row, Trial
from tools.sweep.recipes import cuts
from tools.sweep.tiny import build

TIME_S = 60.0
"""Seconds of processor time for one family."""
_WALL = 10.0
"""How many times longer a family may take in wall-clock time, on a busy machine."""
MEMORY_GIB = 6.0


def sweep_case(case: Case, recipes: Sequence[str] = ()) -> Iterator[Row]:
    """Tries one family, in this process.

    Args:
        case: the family.
        recipes: names of the recipes to try; all if empty.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        try:
            models = build(case, Path(folder))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            text = (str(error).strip().splitlines() or [""])[0][:160]
            yield Row(case.name, "-", "no model", f"{type(error).__name__} at {place}: {text}")
            return
        trial = Trial(case, models, Path(folder))
        failed = trial.open()
        if failed is not None:
            yield failed
            return
        for cut in cuts(trial.family.num_layers):
            if not recipes or cut.name in recipes:
                yield trial.try_cut(cut)
        if not recipes or "arms" in recipes:
            yield trial.try_arms()


def sweep_isolated(case: Case, recipes: Sequence[str] = (), time_s: float = TIME_S) -> list[Row]:
    """Tries one family in a forked process; a crash counts as a bug."""
    todo = list(recipes or case.recipes) or [*(cut.name for cut in cuts(4)), "arms"]
    rows: list[Row] = []
    while todo:
        found, ended = _forked(case, todo, time_s)
        rows += found
        done = {row.recipe for row in found}
        if ended == "" or (found and found[-1].recipe in ("-", "open")):
            break
        died_at = next((name for name in todo if name not in done), None)
        if died_at is None:
            break
        rows.append(Row(case.name, died_at, "bug", ended))
        todo = todo[todo.index(died_at) + 1 :]
    return rows


def _forked(case: Case, recipes: Sequence[str], time_s: float) -> tuple[list[Row], str]:
    """The rows until the process ended, and how it ended if not normally."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(case, recipes, time_s, reader, writer)
    os.close(writer)
    data, timed_out = b"", False
    until = time.monotonic() + _WALL * time_s
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + 10
            continue
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        data += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    rows = [Row(**{**json.loads(line), "notes": tuple(json.loads(line)["notes"])})
            for line in data.decode().splitlines()]  # fmt: skip
    if timed_out:
        return rows, f"timed out after {_WALL * time_s:.0f} s"
    if os.WIFSIGNALED(status):
        return rows, f"died by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    return rows, f"ended with exit code {code}" if code else ""


def _child(case: Case, recipes: Sequence[str], time_s: float, reader: int, writer: int) -> None:
    """The forked process: writes rows as lines of JSON; never returns."""
    code = 1
    try:
        os.close(reader)
        sink = os.open(os.devnull, os.O_WRONLY)
        if not os.environ.get("SWEEP_DEBUG"):
            os.dup2(sink, 1)
            os.dup2(sink, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time_s), int(time_s) + 5))
        limit = int(MEMORY_GIB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for row in sweep_case(case, recipes):
            os.write(writer, (json.dumps(asdict(row)) + "\n").encode())
        code = 0
    finally:
        if code and os.environ.get("SWEEP_DEBUG"):
            traceback.print_exc()
        os._exit(code)


def preload() -> None:
    """Imports the modules that all forked processes need."""
    import lm_eval.models.huggingface  # noqa: F401
    import torch
    import transformers

    import gptailor.evaluation.lm
    import gptailor.evaluation.resident
    import gptailor.verbs  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
