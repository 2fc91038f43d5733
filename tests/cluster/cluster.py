"""A private Slurm cluster: two virtual nodes on this machine, and faults to inject."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.processes import (
    Daemon,
    answers,
    environment,
    find,
    kill_all,
    parent,
    program,
    wait_until,
)
from tests.cluster.programs import PATH
from tests.cluster.settings import CLUSTER, Settings

ROOT = Path(__file__).resolve().parents[2]
NODE_MARK = "SLURMD_NODENAME"
"""Slurm sets it in tasks; we set it for slurmd and its step daemons."""
ASK_EVERY_S = 0.5
"""Interval for polling jobs: each poll starts programs, and the searches need the cores."""
UNFINISHED = {"", "PENDING", "RUNNING", "REQUEUED", "RESIZING", "SUSPENDED", "COMPLETING"}


class Cluster:
    """munged, MariaDB, slurmdbd, slurmctld and one slurmd for each virtual node.

    Nothing outside one temporary folder is touched, so several can run side by side. Both nodes are
    this machine and see the same files.

    Attributes:
        folder: configuration, logs and state.
        env: the environment with which srun, sbatch, sacct and gptailor find this cluster.
    """

    def __init__(self, *, may_requeue: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        gpus = 2 if self._make_gpus(2) else 0
        self.settings = Settings(self.folder, gpus=gpus, may_requeue=may_requeue)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI", "OMPI_"))},
            "PATH": f"{Path(sys.executable).parent}:{PATH}",  # gptailor is installed next to python
            "SLURM_CONF": str(self.settings.slurm_conf),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # both nodes are one host, so Open MPI would try shared memory between them
            "OMPI_MCA_btl": "self,tcp",
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_osc": "^ucx",
            "OMPI_MCA_hwloc_base_binding_policy": "none",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self._daemons: list[Daemon] = []
        self._slurmd: dict[str, Daemon] = {}

    # start and stop

    def start(self) -> None:
        """Returns when both nodes are idle; raises with a daemon's log if it does not come up."""
        settings, folder = self.settings, self.folder
        own = [f"{kind}-{node}" for kind in ("spool", "tmp") for node in settings.nodes]
        for name in ("database", "tmp-database", "state", *own):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        munged = self._daemon(
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--socket={settings.munge_socket}"),
            *(f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed"),
            *(f"--log-file={folder}/munged.log", "--num-threads=4"),
        )
        mariadb = self._start_database()
        (folder / "slurmdbd.conf").touch(0o600)
        (folder / "slurmdbd.conf").write_text(settings.slurmdbd_text())
        settings.slurm_conf.write_text(settings.slurm_text())
        (folder / "gres.conf").write_text(settings.gres_text())
        (folder / "job_submit.lua").write_text(settings.submit_text())
        munged.wait_until(settings.munge_socket.exists)
        mariadb.wait_until((folder / "mariadb.sock").exists)
        # -D: in the foreground, with the log on stderr
        dbd = self._daemon("slurmdbd", "-D")
        dbd.wait_until(lambda: answers("sacctmgr", "-n", "list", "cluster", env=self.env))
        self.run("sacctmgr", "-i", "add", "cluster", CLUSTER)
        controller = self._daemon("slurmctld", "-D")
        for node in settings.nodes:
            self._slurmd[node] = self._daemon(
                f"slurmd-{node}", "-D", "-N", node, env={NODE_MARK: node}
            )
        controller.wait_until(lambda: answers("scontrol", "ping", env=self.env))
        for node in settings.nodes:
            self._wait_for_node(node)

    def stop(self) -> None:
        """Kills every daemon and every process of every job, and removes the folder."""
        try:
            for daemon in [*self._slurmd.values(), *self._daemons]:
                daemon.kill()  # no clean shutdown: none of its state is needed again
            kill_all(**self._mine)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def reset(self) -> None:
        """After a test: no jobs, all nodes up."""
        for job in self.jobs():
            self.run("scancel", job, check=False)
        for node in self.settings.nodes:
            self.restart_node(node)
        try:
            wait_until(lambda: not self.jobs(), 30, "no jobs left")
        except TimeoutError:
            for job in self.jobs():
                for pid in self.processes(job):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self.jobs(), 30, "no jobs left")

    # what users do

    def run(
        self, *command: str | os.PathLike[str], check: bool = True, timeout_s: float = 60
    ) -> str:
        """Output of a command in this cluster's environment, including stderr."""
        done = subprocess.run(
            [str(word) for word in command],
            check=False,
            cwd=self.folder,  # where sbatch leaves its logs
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def submit(self, *arguments: str | os.PathLike[str]) -> str:
        """`sbatch` with these arguments; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments).split(";")[0].split()[-1]

    def wait_past(self, job: str, state: str, timeout_s: float = 60) -> None:
        """Waits until sacct, which lags behind, has seen a job in that state."""
        wait_until(
            lambda: state in [past for past, _ in self.sacct(job)],
            timeout_s,
            f"{job}: {state}",
            ASK_EVERY_S,
        )

    def cancel(self, job: str) -> None:
        """`scancel`."""
        self.run("scancel", job)

    def jobs(self) -> list[str]:
        """Ids of all jobs that are waiting, running or ending."""
        return sorted(set(self.run("squeue", "-h", "-a", "-o", "%A").split()))

    def squeue(self, job: str) -> tuple[str, str]:
        """State and reason of a queued job, for example PENDING and BeginTime."""
        text = self.run("squeue", "-h", "-j", job, "-o", "%T|%r", check=False)
        state, _, reason = text.strip().partition("|")
        return (state, reason) if reason else ("", "")

    def sacct(self, job: str) -> list[tuple[str, int]]:
        """State ("CANCELLED", not "CANCELLED by 0") and exit code of each time the job ran."""
        text = self.run("sacct", "-nXPDj", job, "-o", "state,exitcode")
        rows = [line.split("|") for line in text.splitlines() if "|" in line]
        return [(state.split()[0], int(code.split(":")[0])) for state, code in rows]

    def wait(self, job: str, states: Collection[str] = (), timeout_s: float = 200) -> str:
        """Waits for one of the states, or for the end of the job if none is named."""

        def now() -> str:
            state, _ = self.squeue(job)
            return state if state or not self.sacct(job) else self.sacct(job)[-1][0]

        def reached() -> bool:
            state = now()
            return (
                state in states if states else state not in UNFINISHED and not self.squeue(job)[0]
            )

        try:
            what = f"job {job} {' or '.join(states) or 'ends'}"
            wait_until(reached, timeout_s, what, ASK_EVERY_S)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.sacct(job)}, {self.squeue(job)}") from None
        return now()

    # faults

    def processes(self, job: str) -> list[int]:
        """Processes of a job on all nodes: batch shell, srun, ranks and their children."""
        if "_" in job:  # an element of an array also has its own number
            job = self.run("squeue", "-h", "-j", job, "-o", "%A").strip()
        return find(SLURM_JOB_ID=job, **self._mine)

    def ranks(self, job: str) -> dict[int, int]:
        """Process ids of the running MPI ranks, by rank."""
        found = {}
        for pid in self.processes(job):
            here = environment(pid)
            # a batch shell and its srun also have SLURM_PROCID 0
            if "SLURM_STEP_ID" in here and program(parent(pid)) == "slurmstepd":
                found[int(here["SLURM_PROCID"])] = pid
        return found

    def kill_rank(self, job: str, rank: int) -> None:
        """SIGKILL, like the kernel's when memory is exhausted."""
        os.kill(self.ranks(job)[rank], signal.SIGKILL)

    def signal_ranks(self, job: str, number: int) -> None:
        """Like `--signal` before the time limit: all ranks get it, the batch shell does not."""
        self.run("scancel", f"--signal={number}", job)

    def kill_node(self, node: str) -> None:
        """Like a power cut: slurmd, step daemons and all tasks are gone at once."""
        self._slurmd[node].kill()
        kill_all(**{NODE_MARK: node}, **self._mine)

    def restart_node(self, node: str) -> None:
        """Power is back; does nothing to a node that is up."""
        if not self._slurmd[node].alive:
            self._slurmd[node].start()
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self._wait_for_node(node)

    def node_state(self, node: str) -> str:
        """For example "idle", "mixed", "down"; with a star if the node does not respond."""
        return self.run("sinfo", "-h", "-N", "-p", "main", "-n", node, "-o", "%T").strip()

    # parts

    @property
    def _mine(self) -> dict[str, str]:
        """Environment that only this cluster's processes were started with."""
        return {"SLURM_CONF": self.env["SLURM_CONF"]}

    def _daemon(self, name: str, *options: str, env: Mapping[str, str] | None = None) -> Daemon:
        program = name.partition("-")[0]
        log = self.folder / f"{name}.log"
        daemon = Daemon([program, *options], {**self.env, **(env or {})}, log)
        daemon.start()
        self._daemons.append(daemon)
        return daemon

    def _start_database(self) -> Daemon:
        folder = self.folder
        common = ("--no-defaults", f"--datadir={folder}/database", f"--user={getpass.getuser()}")
        # in a common folder, two installations at once delete each other's files
        install = ("env", f"TMPDIR={folder / 'tmp-database'}", "mariadb-install-db")
        self.run(*install, *common, "--skip-test-db", "--skip-name-resolve")
        (folder / "database.sql").write_text(self.settings.database_text())
        return self._daemon(
            "mariadbd",
            *(*common, f"--socket={folder}/mariadb.sock", f"--pid-file={folder}/mariadbd.pid"),
            *("--bind-address=127.0.0.1", f"--port={self.settings.ports[2]}"),
            *(f"--init-file={folder}/database.sql", "--skip-name-resolve"),
            # what slurmdbd asks for, and no durability for a throw-away database
            *("--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"),
            *("--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0"),
            *("--sync-binlog=0", "--skip-log-bin", "--performance-schema=OFF"),
        )

    def _make_gpus(self, count: int) -> bool:
        """Dummy devices, as Slurm does not accept plain files as GPUs. Only root can make them."""
        try:
            for index in range(count):
                mode = stat.S_IFCHR | 0o666
                os.mknod(self.folder / f"gpu{index}", mode, os.makedev(1, 3))
        except PermissionError:
            return False
        return True

    def _wait_for_node(self, node: str) -> None:
        up = ("idle", "mixed", "allocated", "completing")
        self._slurmd[node].wait_until(lambda: self.node_state(node) in up, 60)


@contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Starts a cluster, and stops it whatever happens."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
