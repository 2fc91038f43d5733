"""The configuration of a private cluster: two nodes on one machine, and short timeouts."""

from __future__ import annotations

import getpass
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = "testcluster"
PASSWORD = "only-on-this-machine"


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below the range used for outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found = [*found, port] if port not in found else found
    return found


@dataclass(frozen=True)
class Settings:
    """A cluster's folder, ports and resources.

    Attributes:
        folder: holds all files of the cluster; a short path, as UNIX sockets allow 108 characters.
        nodes: names of the virtual nodes.
        cores: of each node, as Slurm counts them; the machine may have fewer.
        gpus: dummy GPUs of each node.
        may_requeue: False for a site that refuses to requeue a job.
        ports: one each for slurmctld, slurmdbd, MariaDB and every node.
    """

    folder: Path
    nodes: tuple[str, ...] = ("n1", "n2")
    cores: int = 16
    gpus: int = 2
    may_requeue: bool = True
    ports: list[int] = field(default_factory=lambda: free_ports(5))

    @property
    def munge_socket(self) -> Path:
        return self.folder / "munge.sock"

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    def slurmdbd_text(self) -> str:
        return _lines(
            {
                "AuthType": "auth/munge",
                "AuthInfo": self.munge_socket,
                "DbdHost": "localhost",
                "DbdAddr": "127.0.0.1",
                "DbdPort": self.ports[1],
                "SlurmUser": getpass.getuser(),
                "StorageType": "accounting_storage/mysql",
                "StorageHost": "127.0.0.1",
                "StoragePort": self.ports[2],
                "StorageUser": "slurm",
                "StoragePass": PASSWORD,
                "StorageLoc": "accounting",
                "PidFile": self.folder / "slurmdbd.pid",
            }
        )

    def database_text(self) -> str:
        return (
            "CREATE DATABASE IF NOT EXISTS accounting;\n"
            f"CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL ON accounting.* TO 'slurm'@'127.0.0.1';\n"
        )

    def gres_text(self) -> str:
        return "".join(
            f"NodeName={node} Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n"
            for node in self.nodes
            if self.gpus
        )

    def submit_text(self) -> str:
        """A job_submit.lua of a site that forbids requeueing, whatever a script asks for."""
        return (
            "function slurm_job_submit(job, partitions, user)\n"
            "  job.requeue = 0\n"
            "  return slurm.SUCCESS\n"
            "end\n"
            "function slurm_job_modify(job, record, partitions, user)\n"
            "  return slurm.SUCCESS\n"
            "end\n"
        )

    def slurm_text(self) -> str:
        host = socket.gethostname().split(".")[0]
        user = getpass.getuser()
        values: dict[str, object] = {
            "ClusterName": CLUSTER,
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # cred_expire is how long a requeued job waits before it may start again (120 s)
            "AuthInfo": f"socket={self.munge_socket},cred_expire=5",
            "CredType": "cred/munge",
            "SlurmctldPort": self.ports[0],
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            # one per node: PMIx makes sockets there
            "TmpFS": self.folder / "tmp-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "ProctrackType": "proctrack/pgid",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "MpiDefault": "none",
            "SlurmdParameters": "config_overrides",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            # sacct and sacctmgr look for the munge socket here, not in AuthInfo
            "AccountingStoragePass": self.munge_socket,
            "AccountingStoragePort": self.ports[1],
            "AccountingStorageTRES": "gres/gpu",
            "JobAcctGatherType": "jobacct_gather/linux",
            "JobAcctGatherFrequency": "task=2",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            # a node that does not respond for this long is down
            "SlurmdTimeout": 12,
            "SlurmctldTimeout": 10,
            "MessageTimeout": 5,
            # from SIGTERM to SIGKILL
            "KillWait": 5,
            "UnkillableStepTimeout": 30,
            "MinJobAge": 300,
            "ReturnToService": 2,
            "JobRequeue": int(self.may_requeue),
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        if not self.may_requeue:
            values["JobSubmitPlugins"] = "lua"
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            f" CPUs={self.cores} Sockets=1 CoresPerSocket={self.cores} ThreadsPerCore=1"
            f" RealMemory=8000{gres}\n"
            for node, port in zip(self.nodes, self.ports[3:], strict=True)
        )
        common = "Nodes=ALL MaxTime=01:00:00 State=UP"
        return (
            _lines(values)
            + nodes
            + f"PartitionName=main {common} Default=YES PriorityTier=1 PreemptMode=REQUEUE\n"
            + f"PartitionName=high {common} PriorityTier=10 PreemptMode=OFF\n"
        )


def _lines(values: dict[str, object]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())
