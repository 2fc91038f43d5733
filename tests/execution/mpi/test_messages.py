"""What ends a worker ends the search: with the same sentence, and the same exit code."""

from __future__ import annotations

import errno
import pickle

import pytest

from gptailor import errors
from gptailor.errors import GptailorError, ModelError, ResourceError, StoppedEarly, WorkerCrashed
from gptailor.execution.mpi.messages import Failed

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GptailorError) and kind is not errors.Interrupted
]


def arrived(error: BaseException) -> GptailorError:
    """An error of a worker, as rank 0 has it."""
    try:
        raise error
    except BaseException as caught:
        message = pickle.loads(pickle.dumps(Failed.by(caught)))
    found: GptailorError = message.error("rank 3 on n1", "logs/rank-003.log")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_rank_is_ours(kind: type[GptailorError]) -> None:
    found = arrived(kind("the file is torn"))
    assert type(found) is kind
    assert str(found) == "rank 3 on n1: the file is torn"
    assert found.exit_code == kind.exit_code


def test_a_subclass_travels_as_what_it_is_a_kind_of() -> None:
    class Torn(ModelError):
        pass

    assert type(arrived(Torn("torn"))) is ModelError
    assert type(arrived(errors.Interrupted(15))) is StoppedEarly


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_is_exhausted_is_no_bug(error: Exception) -> None:
    found = arrived(error)
    assert type(found) is ResourceError
    assert str(found).startswith("rank 3 on n1: ")
    assert not str(found).endswith(": ")


@pytest.mark.parametrize("error", [ZeroDivisionError("of this test"), SystemExit(3)])
def test_what_nobody_expected_has_a_traceback(error: BaseException) -> None:
    found = arrived(error)
    assert type(found) is WorkerCrashed
    assert type(error).__name__ in str(found)
    assert "see logs/rank-003.log" in str(found)


def test_a_foreign_class_with_the_name_of_one_of_ours_is_foreign() -> None:
    foreign = type("ModelError", (Exception,), {})
    assert type(arrived(foreign("of a library"))) is WorkerCrashed


def test_an_unknown_kind_is_a_crash() -> None:
    assert type(Failed("Unheard", "of").error("rank 1", "log")) is WorkerCrashed
