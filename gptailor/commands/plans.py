"""The command lines of the verbs that prepare a search on a cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from typing import TYPE_CHECKING

from gptailor.commands.command import Command, at_least_one, say
from gptailor.errors import size

if TYPE_CHECKING:
    from gptailor.verbs.plans import Plan


def _plan(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    found = verbs.plan(
        arguments.config,
        arguments.overrides,
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        gpu_gib=arguments.gpu_gib,
        probe=arguments.probe,
        note=say,
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    for line in _plan_lines(found):
        print(line)
    return 0


def _plan_lines(plan: Plan) -> list[str]:
    needs, count = plan.footprint, len(plan.footprint.candidates)
    lines = [
        f"space       at most 10^{plan.recipes_log10:.1f} recipes, of which {plan.evaluations:,} "
        "are evaluated"
    ]
    for name, work in plan.sizes.items():
        lines.append(
            f"{name:11} {work.documents:,} documents, {work.requests:,} requests, "
            f"{work.tokens:,} tokens per evaluation"
        )
    lines += [
        f"disk        {size(plan.node_bytes)} for {count} candidates, read once per node",
        f"type        {plan.why_dtype}",
        f"model       {size(needs.model)} dense in {plan.dtype}, {size(needs.resident)} for all "
        "candidates",
        f"batch       about {size(needs.activations)} inside a layer and {size(needs.logits)} of "
        "logits",
        *_memory_lines(plan),
        *_repair_lines(plan),
    ]
    for probe in plan.probes:
        lines.append(
            f"probe       {probe.name}, {probe.layers} layers: {probe.seconds:.2f} s "
            f"({probe.assemble_s:.2f} s to assemble, {probe.forward_s:.2f} s in forward passes, "
            f"{probe.tokens:,} tokens)"
        )
    if plan.evaluation_s is None or plan.hours is None:
        return [*lines, "time        not measured"]
    return [
        *lines,
        f"time        {plan.evaluation_s:.2f} s per evaluation on a worker like this one "
        f"({plan.device}); with {plan.workers} of them",
        f"            {plan.evaluations_per_hour:,.0f} per hour, {plan.hours:.2g} hours for all "
        "(without the holdout)",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    if plan.why_not:
        return [f"worker      {plan.why_not}"]
    if plan.gpus is None and plan.cpu_candidates is not None:
        return [
            "worker      on the CPU (for a GPU: --gpu-gib); as evaluation.candidates_gib says, "
            f"each reads candidates into {size(plan.cpu_candidates)}",
            f"            and may cache {size(plan.cpu_cache)} of merged layers;",
            _stay_line(plan.cpu_stay),
        ]
    if plan.gpus is None:
        lines = [
            "worker      on the CPU (for a GPU: --gpu-gib); candidates are mapped, in memory once "
            "for all workers on a node;",
            f"            each may cache {size(plan.cpu_cache)} of merged layers",
        ]
        if plan.footprint.is_cast:
            lines.append(
                f"            and {size(plan.cpu_copies)} for copies of the candidates in "
                f"{plan.dtype}, at least {size(plan.footprint.blocks.held)}"
            )
        return lines
    gpus = plan.gpus
    where = "of each GPU" if len(gpus.parts) > 1 else "of one GPU"
    lines = [f"worker      {size(gpus.budget)} {where} for weights, {size(gpus.cache)} for merges"]
    if len(gpus.parts) > 1:
        lines.append(f"            the model is spread over {len(gpus.parts)} GPUs:")
        for part in gpus.parts:
            holds = []
            if part.first_layer < part.end_layer:
                holds.append(f"layers {part.first_layer} to {part.end_layer - 1}")
            if part.gpu == 0:
                holds.append("embeddings, final norm, head")
            lines.append(f"            GPU {part.gpu}: {', '.join(holds)}, {size(part.n_bytes)}")
    return [*lines, _stay_line(gpus.all_stay)]


def _repair_lines(plan: Plan) -> list[str]:
    needs, found = plan.repair, plan.repair_room
    if needs is None:
        return []
    read = f"repair      {needs.documents:,} documents, {needs.tokens:,} tokens in addition"
    if found is None:
        return [read]
    where = "in a file in TMPDIR" if found.in_file else "in memory"
    largest = plan.front_repair or needs
    lines = [read]
    if plan.front_repair is not None:
        lines.append(f"            {largest.documents:,} and {largest.tokens:,} for the front")
    return [
        *lines,
        f"            teachers' states take {size(largest.teachers)} {where}",
        f"            {found.why_not or _fits(largest.on_device, found.room)}",
    ]


def _fits(taken: int, room: int) -> str:
    return f"each worker needs {size(taken)} for it, of {size(room)} that all else leaves"


def _stay_line(all_stay: bool) -> str:
    if all_stay:
        return "            all candidates stay there"
    return "            the most used layers stay there, others are read again when needed"


def _prefetch(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    found = verbs.prefetch(arguments.config, arguments.overrides, note=say)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    width = max(map(len, found.models))
    for name, model in found.models.items():
        source = f"{model.ref} in " if model.from_hub else ""
        print(f"{name:{width}}  {size(model.n_bytes):>8}  {source}{model.folder}")
    documents = ", ".join(f"{count} {name}" for name, count in found.documents.items())
    print(f"Tokenizer and tasks are available: {documents} documents.")
    if found.only_checked:
        print("Nothing was downloaded, because HF_HUB_OFFLINE is set.")
    print("Everything was loaded without a network, as a job will do with these variables:")
    for variable, value in found.variables.items():
        print(f"  export {variable}={shlex.quote(value)}")
    print("Its nodes must see these folders under the same paths.")
    return 0


def _add_prefetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_prefetch(parser)
    parser.add_argument("--workers", type=at_least_one, default=1, help="workers of the search (1)")
    parser.add_argument(
        "--gpus-per-worker", type=at_least_one, default=1, help="GPUs of each worker (1)"
    )
    parser.add_argument(
        "--gpu-gib",
        type=float,
        help="memory of a GPU in GiB, like 80 (this machine's GPU, or a plan for the CPU)",
    )
    parser.add_argument(
        "--no-probe",
        dest="probe",
        action="store_false",
        help="skip the three evaluations that measure the time",
    )


COMMANDS = {
    "plan": Command(
        "estimate what a search costs: memory, bytes, and time from three evaluations",
        "gptailor plan search.yaml --workers 64 --gpus-per-worker 2 --gpu-gib 80 --no-probe",
        _add_plan,
        _plan,
    ),
    "prefetch": Command(
        "download what a search on nodes without a network will need",
        "gptailor prefetch search.yaml",
        _add_prefetch,
        _prefetch,
    ),
}
