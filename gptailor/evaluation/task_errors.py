"""Error messages for tasks whose data can't be loaded or whose own code fails."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from pathlib import Path

from gptailor.errors import TaskError, UsageError, plain

_NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}
_OFFLINE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError", "gaierror"}
_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_SPEAKS = (OSError, ValueError, RuntimeError, ImportError, UsageError)
"""Errors whose messages are clear without their names."""


def not_loaded(task: str, error: BaseException) -> UsageError:
    """The error for a task that can't be loaded: a missing file, a name, the network, or its code.

    Args:
        task: lm-eval's name.
        error: the error that lm-eval or datasets raised.
    """
    for cause in _causes(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        text = _message(cause)
        path = _path_in(text)
        if "DatasetNotFoundError" in names:
            return _sentence(
                task,
                f"{text}. Correct the task's dataset_path, or log in to the hub if the data are "
                "private.",
            )
        is_file = isinstance(cause, FileNotFoundError)
        if path or (is_file and "://" not in text):
            missing = f"{path} does not exist" if path else text
            return _sentence(
                task,
                f"{missing}. Put the data there, or correct the task (a relative path starts at "
                f"{Path.cwd()}).",
            )
        if isinstance(cause, StopIteration) and not _where(cause):
            return _sentence(task, "no file matches its data_files. Correct the task.")
        if is_file or _is_network(cause, names):
            offline = [name for name in _VARIABLES if os.environ.get(name)]
            why = f"{offline[0]} is set" if offline else "it can't be downloaded"
            return _sentence(
                task,
                f"{text}. It is not in the cache, and {why}: fetch it with `gptailor prefetch` "
                "where there is a network, or correct its name.",
            )
        if "DatasetGenerationError" in names:
            return _sentence(task, f"its data can't be read: {_message(_causes(error)[-1])}.")
        if isinstance(cause, KeyError) and _last_file(cause).endswith("/dataset_dict.py"):
            return _sentence(task, f"its data have no split {text.partition(' ')[2]}.")
        if isinstance(cause, KeyError) and cause.args == (None,):  # a default that doesn't exist
            metric = _last_local(cause, "metric_name")
            return _sentence(
                task,
                f"lm-eval has no metric {plain(str(metric))!r}. Correct the task's metric_list; a "
                "metric of the task's own needs an aggregation there.",
            )
    last = _causes(error)[-1]
    return _sentence(task, f"{_message(last)}{_where(last)}.")


def code_failed(task: str, doing: str, error: Exception) -> TaskError:
    """The error for a task whose own code or template raised.

    Args:
        task: lm-eval's name.
        doing: what the task had to do, like "judge an answer".
        error: what it raised.
    """
    return TaskError(f"The task {task} can't {doing}: {_message(error)}{_where(error)}.")


def _sentence(task: str, text: str) -> UsageError:
    return UsageError(f"The task {task} can't be loaded: {text}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__
    return found


def _message(error: BaseException) -> str:
    """The first line of a message, with the error's name where that helps."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    text = re.sub(r"^\[Errno \d+\] ", "", plain(lines[0])).rstrip(".!")
    return text if isinstance(error, _SPEAKS) else f"{name}: {text}"


def _path_in(text: str) -> str:
    """A path of a local folder that datasets looked for on the hub; empty if there is none."""
    found = re.search(r"(?:Couldn't reach|maximum length is 96:) '((?:\.{0,2}/|~)[^']*)'", text)
    return found[1] if found else ""


def _is_network(error: BaseException, names: set[str]) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or names & _OFFLINE:
        return True
    is_answer = any("HTTPStatus" in name or "HTTPError" in name for name in names)
    return type(error).__module__.partition(".")[0] in _NETWORK and not is_answer


def _where(error: BaseException) -> str:
    """The place in the user's own file that raised; empty if a library raised."""
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")}
    file = _last_file(error)
    if not file or file.startswith(("<", *libraries)):
        return ""
    return f" ({file}, line {traceback.extract_tb(error.__traceback__)[-1].lineno})"


def _last_local(error: BaseException, name: str) -> object:
    """A local variable of the function that raised; None if there is none of that name."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_locals.get(name) if frames else None


def _last_file(error: BaseException) -> str:
    """The file whose code raised; empty for an error that was never raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""
