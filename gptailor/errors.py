"""The errors that a user can see, each with an exit code that a script can act on.

Every message is one sentence: what happened, where (file, tensor, key), what to do. Names and
values in it may come from untrusted files, so the base class turns it into one printable line.
"""

from __future__ import annotations

import difflib
import errno
import re
import signal
from collections.abc import Iterable

from gptailor import exit_codes

_MAX_SHOWN = 100
"""Longer names are cut in messages."""
_MAX_MESSAGE = 2000


class GptailorError(Exception):
    """Base of all errors that gptailor raises on purpose; the process ends with `exit_code`."""

    exit_code = exit_codes.BUG

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message, _MAX_MESSAGE))


class UsageError(GptailorError, ValueError):
    """The command line, a configuration or a recipe asks for something that cannot be done."""

    exit_code = exit_codes.USAGE


class TaskError(UsageError):
    """A task's own code failed while it made requests or scored answers."""


class ModelError(GptailorError):
    """A model or tokenizer on disk is unusable."""

    exit_code = exit_codes.MODEL


class ResourceError(GptailorError):
    """Memory or disk is exhausted."""

    exit_code = exit_codes.RESOURCE


class StoppedEarly(GptailorError):
    """The work stopped before it was complete; `--resume` continues it."""

    exit_code = exit_codes.STOPPED_EARLY


class WorkerCrashed(GptailorError):
    """A worker hit an unexpected error; its traceback has already been shown."""


class Requeue(StoppedEarly):
    """The job's time is up: it asks to be requeued and then continues."""

    exit_code = exit_codes.REQUEUE


class Interrupted(StoppedEarly):
    """A signal ended the work after a clean save; the exit code is the shell's for that signal."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"Stopped by {name}: everything that was evaluated is kept.")
        self.exit_code = exit_codes.of_signal(signum)


class Terminated(BaseException):
    """SIGTERM arrived while no handler for a clean shutdown was installed."""


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of the command line after an error; 0 without one."""
    if error is None:
        return exit_codes.DONE
    if isinstance(error, GptailorError):
        return error.exit_code
    if isinstance(error, MemoryError) or is_disk_full(error):
        return ResourceError.exit_code
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.of_signal(signal.SIGINT)
    if isinstance(error, Terminated):
        return exit_codes.of_signal(signal.SIGTERM)
    return exit_codes.BUG


def is_disk_full(error: BaseException) -> bool:
    """True for a full disk and for an exhausted quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def plain(text: str, limit: int = 300) -> str:
    """Makes untrusted text safe for a message: one line, printable, at most `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    text = re.sub(r"\s*[\n\r\t\v\f]\s*", " ", text)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(n_bytes: float) -> str:
    """Formats a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def sizes(one: float, other: float) -> tuple[str, str]:
    """Formats two different numbers of bytes so that they also look different."""
    texts = size(one), size(other)
    return texts if texts[0] != texts[1] else (f"{one:,.0f} bytes", f"{other:,.0f} bytes")


def unknown(kind: str, name: object, known: Iterable[object], where: str = "") -> UsageError:
    """Returns a `UsageError` for an unknown name; it suggests the nearest known one.

    Args:
        kind: what the name should have been, for example "merge method".
        name: what was written.
        known: all valid names.
        where: the place, for example "layers[3]"; empty if `kind` says enough.
    """
    wrong = str(name)
    names = [plain(str(k), _MAX_SHOWN) for k in known]
    # difflib takes quadratic time: names too long to be a typo are not compared
    near = []
    if len(wrong) <= _MAX_SHOWN:
        near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    place = f" in {where}" if where else ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    wrong = wrong if len(wrong) <= _MAX_SHOWN else wrong[:_MAX_SHOWN] + "…"
    return UsageError(f"unknown {kind} {wrong!r}{place}: {hint}Known: {shown or 'none'}.")
