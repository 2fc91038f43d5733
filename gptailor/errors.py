"""The errors that a user can meet, each with the exit code that a script can act on.

Every message is one sentence: what happened, where (file, tensor, key), what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GptailorError(Exception):
    """Root of all errors that gptailor raises on purpose; `exit_code` ends the command line."""

    exit_code = 1


class UsageError(GptailorError, ValueError):
    """The command line, a configuration or a recipe asks for something that cannot be done."""

    exit_code = 2


class ModelError(GptailorError):
    """A model or tokenizer is unusable as it lies on disk."""

    exit_code = 3


class ResourceError(GptailorError):
    """Memory or disk is exhausted."""

    exit_code = 4


class StoppedEarly(GptailorError):
    """The work was ended before it was complete, and `--resume` continues it."""

    exit_code = 5


def unknown(kind: str, name: object, known: Iterable[object], where: str = "") -> UsageError:
    """A `UsageError` for a name that is not known, with the nearest right one.

    Args:
        kind: what the name should have been, for example "merge method".
        name: what was written.
        known: all names that would have been right.
        where: the place, for example "layers[3]"; empty when the kind says enough.
    """
    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    place = f" in {where}" if where else ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {str(name)!r}{place}: {hint}Known: {shown or 'none'}.")
