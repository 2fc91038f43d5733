"""The executor of an MPI program: rank 0 gives jobs to the other ranks, each an `MpiWorker`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from gptailor.errors import UsageError
from gptailor.evaluation.forward_dtype import Ability
from gptailor.evaluation.outcome import Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import Finished, Job, WorkloadInfo, job_name
from gptailor.execution.mpi.channel import LONGEST_S, SHORTEST_S
from gptailor.execution.mpi.crew import Crew, Member
from gptailor.execution.mpi.messages import Done, Hello, Ready, StartJob, Words


class MpiExecutor:
    """The ranks from 1 on as the workers 0, 1, …; to be made after `Crew.join`."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._members = [crew.members[rank] for rank in sorted(crew.members)]
        self.num_workers = len(self._members)
        self._info: WorkloadInfo | None = None
        self._free: set[int] = set()
        self._num_ready = 0
        self._first_ready: Hello | None = None

    @property
    def members(self) -> Sequence[Member]:
        """The workers and what they are doing, in order."""
        return self._members

    def abilities(self) -> Sequence[Ability]:
        """What the workers' nodes can do."""
        return [member.ability for member in self._members if member.ability is not None]

    def load(self, dtype: str) -> None:
        """Makes the ranks load candidates and tasks; each sends `Ready` when it is done."""
        self._crew.load(dtype)

    def workload(self) -> WorkloadInfo:
        """What will be evaluated; waits until the first worker has it in memory."""
        while self._info is None:
            if self._crew.stop.is_set():
                raise self._crew.stop.error()
            if self._take() is None and self._info is None:
                time.sleep(LONGEST_S)
        return self._info

    def free(self) -> Sequence[int]:
        """The workers that are ready and have no job."""
        return sorted(self._free)

    def start(self, worker: int, job: Job) -> None:
        """Sends a job; the transfer proceeds while waiting for results."""
        member = self._members[worker]
        self._free.remove(worker)
        member.job, member.since = job, self.now()
        self._crew.channel.send(worker + 1, StartJob(job))
        self._crew.log.event("job", worker=worker + 1, job=job_name(job))

    def finished(self, timeout_s: float) -> list[Finished]:
        """The jobs that ended; polls with short sleeps."""
        deadline, pause = time.monotonic() + timeout_s, SHORTEST_S
        while True:
            num_ready, found = self._num_ready, []
            while (result := self._take()) is not None:
                if isinstance(result, Finished):
                    found.append(result)
            if found or self._num_ready > num_ready or time.monotonic() >= deadline:
                return found
            time.sleep(max(min(pause, deadline - time.monotonic()), 0))
            pause = min(1.2 * pause, LONGEST_S)

    def words(self) -> Mapping[int, str]:
        """The workers' progress messages."""
        found = ((worker, member.words) for worker, member in enumerate(self._members))
        return {worker: text for worker, text in found if text}

    def now(self) -> float:
        """Seconds of the machine's monotonic clock."""
        return time.monotonic()

    def close(self) -> None:
        """Tells the workers to leave; `Crew` waits for them."""
        self._crew.tell_end()

    def _take(self) -> Finished | bool | None:
        """Handles one message; returns a result, True for any other message, None without one."""
        found = self._crew.receive()
        if found is None:
            return None
        rank, message = found
        worker = rank - 1
        match message:
            case Words(text):
                self._members[worker].words = text
                return True
            case Ready(workload, device):
                self._take_ready(worker, workload, device)
                return True
            case Done(result):
                return self._take_result(worker, result)
        raise AssertionError(f"{message} from rank {rank}")

    def _take_result(self, worker: int, result: Outcome | Similarity) -> Finished:
        member = self._members[worker]
        member.words = ""
        assert member.job is not None
        job, member.job, seconds = member.job, None, self.now() - member.since
        member.since = self.now()
        self._free.add(worker)
        fields = {"status": result.status} if isinstance(result, Outcome) else {}
        self._crew.log.event(
            "result", worker=worker + 1, job=job_name(job), seconds=seconds, **fields
        )
        return Finished(worker, job, result)

    def _take_ready(self, worker: int, info: WorkloadInfo, device: str) -> None:
        member = self._members[worker]
        member.words = ""
        if self._info is None or self._first_ready is None:
            self._info, self._first_ready = info, member.hello
        elif info != self._info:
            raise UsageError(
                f"The documents differ: digest {self._info.digest} for {self._first_ready.name}, "
                f"{info.digest} for {member.hello.name}; give all nodes the same tasks."
            )
        member.device, member.since = device, self.now()
        self._free.add(worker)
        self._num_ready += 1
        self._crew.log.event(
            "ready", f"{member.hello.name} is ready on {device}.", worker=worker + 1, device=device
        )
