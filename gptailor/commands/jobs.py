"""The command lines of the verbs for Slurm jobs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from gptailor import exit_codes
from gptailor.commands.command import Command, at_least_one, say

if TYPE_CHECKING:
    from gptailor.verbs.jobs import Launched


def _launch(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    launched = verbs.launch(
        arguments.config,
        note=say,
        overrides=arguments.overrides,
        time=arguments.time,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        workers_per_node=arguments.workers_per_node,
        gpus_per_worker=arguments.gpus_per_worker,
        cpus_per_worker=arguments.cpus_per_worker,
        mem=arguments.mem,
        partition=arguments.partition,
        account=arguments.account,
        constraint=arguments.constraint,
        qos=arguments.qos,
        setup=arguments.setup,
        slurm=arguments.slurm,
        islands=arguments.islands,
        mpi=arguments.mpi,
        signal_before_s=arguments.signal_before,
        max_requeues=arguments.max_requeues,
        io=arguments.io,
        stage=arguments.stage,
        log_json=arguments.log_json,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        print(
            json.dumps(
                {
                    "run_folder": str(launched.run_folder),
                    "jobs": list(launched.job_ids),
                    "islands": list(launched.islands),
                    "ranks": launched.num_ranks,
                    "script": launched.script,
                }
            )
        )
    elif arguments.dry_run:
        print(launched.script, end="")
    else:
        _show_launched(launched, arguments.nodes)
    return 0


def _show_launched(launched: Launched, nodes: int) -> None:
    ids, run = launched.job_ids, launched.run_folder
    each = f"{launched.num_ranks} ranks on {nodes} {'node' if nodes == 1 else 'nodes'}"
    if launched.islands:
        names = ", ".join(
            f"{job_id} (island {island})"
            for job_id, island in zip(ids, launched.islands, strict=True)
        )
        print(f"Submitted {'jobs' if len(ids) > 1 else 'job'} {names}, each {each}.")
    else:
        print(f"Submitted job {ids[0]}: {each}.")
    print(f"Logs: {run}/logs/. Next steps:")
    print(f"  gptailor status {run}")
    print(f"  gptailor report {run}")
    print(f"  gptailor cancel {run}")


def _status(arguments: argparse.Namespace) -> int:
    from gptailor import verbs
    from gptailor.commands.status_text import status_json, status_text

    status = verbs.status(arguments.run_folder)
    print(json.dumps(status_json(status)) if arguments.json else status_text(status))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    done = verbs.cancel(arguments.run_folder, wait_s=arguments.wait, note=say)
    if arguments.json:
        elsewhere = [{"job": job, "host": host} for job, host in done.elsewhere]
        print(json.dumps({"ended": done.ended, "left": done.left, "elsewhere": elsewhere}))
    else:
        if done.ended:
            print(f"Ended: {', '.join(done.ended)}. `gptailor search … --resume` continues.")
        if done.left:
            print(f"Asked to end, but still running: {', '.join(done.left)}.")
        for job, host in done.elsewhere:
            print(f"{job} was started by hand on {host}: run `gptailor cancel` there.")
        if not (done.ended or done.left or done.elsewhere):
            print(f"No job of {arguments.run_folder} is running.")
    return exit_codes.STOPPED_EARLY if done.left or done.elsewhere else exit_codes.DONE


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    add = parser.add_argument
    add("--nodes", type=at_least_one, default=1, help="nodes per job (1)")
    add("--gpus-per-node", type=_at_least_zero, default=0, help="0 for a search on CPUs (0)")
    add("--time", required=True, help="time limit of a job: 90, 1:30:00, 2-00:00:00")
    add("--workers-per-node", type=at_least_one, help="ranks that evaluate (one per GPU)")
    add("--gpus-per-worker", type=at_least_one, default=1, help="more for larger models (1)")
    add("--cpus-per-worker", type=at_least_one, default=4, help="cores per rank (4)")
    add("--mem", help="memory per node, as for sbatch: 200G; 0 for all of it")
    for name in ("partition", "account", "constraint", "qos"):
        add(f"--{name}", help="as for sbatch")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line to run first")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="further sbatch options")
    add("--islands", type=at_least_one, metavar="K", help="jobs that work on the search together")
    add("--mpi", metavar="TYPE", help="for srun: pmix, pmi2 (MPI_TYPE, or pmix)")
    add(
        "--signal-before", type=at_least_one, default=300, metavar="SECONDS",
        help="how long before the time limit the search stops: the longest evaluation and 60 (300)",
    )  # fmt: skip
    add("--max-requeues", type=_at_least_zero, default=100, help="requeues per job (100)")
    add("--log-json", action="store_true", help="the ranks' logs as JSON lines, too")
    modes = ("auto", "mmap", "pread", "direct")
    add("--io", choices=modes, help="how weights are read, as for search")
    add("--stage", metavar="DIR", help="a folder on the nodes' disks, as for search")
    add("--dry-run", action="store_true", help="print the batch script and submit nothing")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--wait", type=float, default=90.0, metavar="SECONDS", help="wait for their end (90)"
    )


def _at_least_zero(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


COMMANDS = {
    "launch": Command(
        "submit a search to Slurm, as one job or as several islands",
        "gptailor launch search.yaml --nodes 8 --gpus-per-node 4 --time 12:00:00",
        _add_launch,
        _launch,
    ),
    "status": Command(
        "show how far a run is and what its jobs are doing",
        "gptailor status runs/smollm2",
        _add_run,
        _status,
        "nothing was changed",
    ),
    "cancel": Command(
        "end the jobs of a run; search --resume continues it",
        "gptailor cancel runs/smollm2",
        _add_cancel,
        _cancel,
        "jobs that were asked to end will end",
    ),
}
