"""What ends a worker ends the search: with the same sentence, and the same exit code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptailor import errors
from gptailor.errors import GptailorError, StoppedEarly
from gptailor.execution.mpi.crew import Crew

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GptailorError) and kind is not errors.Interrupted
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_rank_is_ours(kind: type[GptailorError]) -> None:
    said: list[str] = []
    crew = SimpleNamespace(members={}, log=SimpleNamespace(say=said.append))
    with pytest.raises(kind, match=r"^rank 3: the file is torn") as caught:
        Crew._raise(cast(Any, crew), 3, kind.__name__, "the file is torn", "")
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code
    assert said == ["rank 3: the file is torn"]


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "OSError", "plain"])
def test_what_is_none_of_ours_can_be_resumed(kind: str) -> None:
    crew = SimpleNamespace(members={}, log=SimpleNamespace(say=lambda text: None))
    with pytest.raises(StoppedEarly):
        Crew._raise(cast(Any, crew), 1, kind, "gone", "")
