"""An error that ends a worker ends the search with the same sentence and exit code."""

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
    """A worker's error as rank 0 receives it."""
    try:
        raise error
    except BaseException as caught:
        message = pickle.loads(pickle.dumps(Failed.by(caught)))
    found: GptailorError = message.error("rank 3 on n1", "logs/rank-003.log")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_gptailor_error_keeps_its_class_and_message(kind: type[GptailorError]) -> None:
    found = arrived(kind("the file is torn"))
    assert type(found) is kind
    assert str(found) == "rank 3 on n1: the file is torn"
    assert found.exit_code == kind.exit_code


def test_a_subclass_arrives_as_its_base_class() -> None:
    class Torn(ModelError):
        pass

    assert type(arrived(Torn("torn"))) is ModelError
    assert type(arrived(errors.Interrupted(15))) is StoppedEarly


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_exhausted_resources_are_not_a_bug(error: Exception) -> None:
    found = arrived(error)
    assert type(found) is ResourceError
    assert str(found).startswith("rank 3 on n1: ")
    assert not str(found).endswith(": ")


@pytest.mark.parametrize("error", [ZeroDivisionError("of this test"), SystemExit(3)])
def test_unexpected_errors_point_to_a_log(error: BaseException) -> None:
    found = arrived(error)
    assert type(found) is WorkerCrashed
    assert type(error).__name__ in str(found)
    assert "see logs/rank-003.log" in str(found)


def test_a_foreign_class_with_one_of_our_names_is_a_crash() -> None:
    foreign = type("ModelError", (Exception,), {})
    assert type(arrived(foreign("of a library"))) is WorkerCrashed


def test_an_unknown_kind_is_a_crash() -> None:
    assert type(Failed("Unheard", "of").error("rank 1", "log")) is WorkerCrashed
