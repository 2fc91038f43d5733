"""The messages between the ranks of a search: one class for each, with data only.

In the order of a search: each rank sends `Hello`; rank 0 asks for `Clock`, sends `Orders` and gets
`Joined` (and `Contents` if the model files look different), then sends `Load` and gets `Ready`;
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
    """A rank introduces itself.

    Attributes:
        rank: its MPI rank.
        pid: its process id.
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
    """Rank 0 asks for the time on the rank's node."""


@dataclass(frozen=True)
class Clock:
    """Unix time in seconds by the clock of the rank's node."""

    now_s: float


@dataclass(frozen=True)
class Orders:
    """What a worker needs to know to join a search.

    Attributes:
        config: the search, as rank 0 has read it.
        run_folder: absolute path.
        token: a file in the run folder that the worker must be able to see.
        first_node: the node of rank 0.
        placement: which cores and GPUs of the node to use.
        log_json: write logs as JSON lines, too.
        io: how weights are read; None for the setting of the node's environment.
        stage: a folder on the node's own disk for copies of the candidates; None as for `io`.
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
    """A worker has joined the run.

    Attributes:
        digests: model → digest of the names, sizes and times of its files.
        ability: what the node can do.
    """

    digests: Mapping[str, str]
    ability: Ability


@dataclass(frozen=True)
class AskContents:
    """Rank 0 asks for digests of the weights, because the files' times differ."""


@dataclass(frozen=True)
class Contents:
    """Model → digest of samples of its weights."""

    digests: Mapping[str, str]


@dataclass(frozen=True)
class Load:
    """Rank 0 asks to load candidates and tasks, to compute in this dtype."""

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
    """The result of the job."""

    result: Outcome | Similarity


@dataclass(frozen=True)
class Words:
    """A worker's progress message: "loading the base", "48 of 128 contexts"."""

    text: str


@dataclass(frozen=True)
class Leave:
    """Rank 0 asks a worker to leave once it is idle."""


@dataclass
class Times:
    """How a worker spent its time, in seconds.

    Attributes:
        busy_s: in jobs.
        idle_s: between a result and the next job.
        gaps: the number of such idle times.
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
"""Errors that are sent by class name; a subclass is sent as its nearest base class here."""


@dataclass(frozen=True)
class Failed:
    """The error that ended a worker, and ends the search.

    Attributes:
        kind: a key of `ERRORS`.
        text: the error message.
        trace: the traceback of an unexpected error; else empty.
    """

    kind: str
    text: str
    trace: str = ""

    @classmethod
    def by(cls, error: BaseException) -> Failed:
        """The message for the error that is being handled."""
        if exit_code_of(error) == ResourceError.exit_code:  # MemoryError and a full disk, too
            return cls(ResourceError.__name__, str(error) or "out of memory")
        for kind in type(error).__mro__:
            if ERRORS.get(kind.__name__) is kind:
                return cls(kind.__name__, str(error))
        return cls(WorkerCrashed.__name__, str(error), traceback.format_exc())

    def error(self, name: str, log: str) -> GptailorError:
        """The error on rank 0.

        Args:
            name: of the rank, for people.
            log: path of its log.
        """
        if self.trace:
            last = self.trace.strip().splitlines()[-1]
            return WorkerCrashed(f"{name} ended with {last} (a bug in gptailor; see {log}).")
        return ERRORS.get(self.kind, WorkerCrashed)(f"{name}: {self.text}")


Request = AskClock | Orders | AskContents | Load | StartJob | Leave
"""Messages that rank 0 sends."""

Answer = Hello | Clock | Joined | Contents | Ready | Done | Words | Failed | Left
"""Messages that the other ranks send."""

Message = Request | Answer
