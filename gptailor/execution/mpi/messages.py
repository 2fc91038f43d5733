"""What the ranks of a search say to each other: one class for each message, data only.

In the order of a search: each rank sends `Hello`, rank 0 asks for `Clock`, sends `Orders` and gets
`Joined` (and `Contents`, where the model files look different), then sends `Load` and gets `Ready`;
`StartJob` is answered by `Done`, `Leave` by `Left`. `Words` and `Failed` may come at any time.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptailor.errors import (
    GptailorError,
    ModelError,
    Requeue,
    ResourceError,
    StoppedEarly,
    TaskError,
    UsageError,
    WorkerCrashed,
    exit_code_of,
)
from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.outcome import Outcome
from gptailor.execution.executor import Job, WorkloadInfo
from gptailor.execution.node.placement import Place, Placement

if TYPE_CHECKING:
    from gptailor.config import Config
    from gptailor.evaluation.similarity import Similarity


@dataclass(frozen=True)
class Hello:
    """What a rank says of itself.

    Attributes:
        rank: in MPI's sense.
        pid: its process.
        place: its node, cores and GPUs.
        versions: of gptailor and of the libraries.
        code: digest of the installed package.
        package: the folder of the package.
    """

    rank: int
    pid: int
    place: Place
    versions: Mapping[str, str]
    code: str
    package: str

    @property
    def name(self) -> str:
        """ "rank 3 on node7"."""
        return f"rank {self.rank} on {self.place.node}"


@dataclass(frozen=True)
class AskClock:
    """Rank 0 wants to know what time it is there."""


@dataclass(frozen=True)
class Clock:
    """Unix time in seconds, as the rank's node has it."""

    now_s: float


@dataclass(frozen=True)
class Orders:
    """What a worker needs to know to take part.

    Attributes:
        config: the search, as rank 0 has read it.
        run_folder: absolute.
        token: a file in the run folder that must be seen.
        first_node: where rank 0 runs.
        placement: what to use of the node.
        log_json: whether logs are written as JSON lines, too.
        io: how weights are read; None for what the node's environment says.
        stage: a folder of the node's own disk for copies of the candidates; None likewise.
    """

    config: Config
    run_folder: str
    token: str
    first_node: str
    placement: Placement
    log_json: bool
    io: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Joined:
    """A worker has taken its place in the run.

    Attributes:
        digests: model → digest of the names, sizes and times of its files.
        ability: what the node can do.
    """

    digests: Mapping[str, str]
    ability: Ability


@dataclass(frozen=True)
class AskContents:
    """Rank 0 wants digests of the weights, as files have other times."""


@dataclass(frozen=True)
class Contents:
    """Model → digest of samples of its weights."""

    digests: Mapping[str, str]


@dataclass(frozen=True)
class Load:
    """Candidates and tasks shall be loaded, to compute in this type."""

    dtype: str


@dataclass(frozen=True)
class Ready:
    """A worker has everything in memory.

    Attributes:
        workload: what will be evaluated.
        device: what it computes on, for people.
    """

    workload: WorkloadInfo
    device: str


@dataclass(frozen=True)
class StartJob:
    """A job to do now."""

    job: Job


@dataclass(frozen=True)
class Done:
    """What came of the job."""

    result: Outcome | Similarity


@dataclass(frozen=True)
class Words:
    """What a worker says of its work: "loading the base", "48 of 128 contexts"."""

    text: str


@dataclass(frozen=True)
class Leave:
    """A worker shall leave when it has nothing to do."""


@dataclass
class Times:
    """Where a worker's time went, in seconds.

    Attributes:
        busy_s: in jobs.
        idle_s: between a result and the next job.
        gaps: how many of these times there were.
    """

    busy_s: float = 0.0
    idle_s: float = 0.0
    gaps: int = 0


@dataclass(frozen=True)
class Left:
    """A worker's last message."""

    times: Times


ERRORS: Mapping[str, type[GptailorError]] = {
    kind.__name__: kind
    for kind in (
        GptailorError,
        UsageError,
        TaskError,
        ModelError,
        ResourceError,
        StoppedEarly,
        Requeue,
        WorkerCrashed,
    )
}
"""Errors that travel, each with its exit code; a subclass travels as the nearest of them."""


@dataclass(frozen=True)
class Failed:
    """What ended a worker, and ends the search.

    Attributes:
        kind: a key of `ERRORS`.
        text: the sentence.
        trace: the traceback of what nobody expected; else empty.
    """

    kind: str
    text: str
    trace: str = ""

    @classmethod
    def by(cls, error: BaseException) -> Failed:
        """The message for an error that is being handled."""
        if exit_code_of(error) == ResourceError.exit_code:  # MemoryError and a full disk, too
            return cls(ResourceError.__name__, str(error) or "out of memory")
        for kind in type(error).__mro__:
            if ERRORS.get(kind.__name__) is kind:
                return cls(kind.__name__, str(error))
        return cls(WorkerCrashed.__name__, str(error), traceback.format_exc())

    def error(self, name: str, log: str) -> GptailorError:
        """The error on rank 0.

        Args:
            name: whose it is, for people.
            log: where its log is.
        """
        if self.trace:
            last = self.trace.strip().splitlines()[-1]
            return WorkerCrashed(f"{name} ended with {last} (a bug of ours; see {log}).")
        return ERRORS.get(self.kind, WorkerCrashed)(f"{name}: {self.text}")


Request = AskClock | Orders | AskContents | Load | StartJob | Leave
"""What rank 0 sends."""

Answer = Hello | Clock | Joined | Contents | Ready | Done | Words | Failed | Left
"""What the others send."""

Message = Request | Answer
