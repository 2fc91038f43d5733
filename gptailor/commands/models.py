"""The command lines of the verbs for one model."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from gptailor.commands.command import Command, add_io, at_least_one, say

if TYPE_CHECKING:
    from gptailor.evaluation.outcome import Score


def _stitch(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    out = verbs.stitch(
        arguments.source,
        arguments.out,
        point=arguments.point,
        verify=arguments.verify,
        sync=arguments.sync,
        threads=arguments.threads,
        io=arguments.io,
        max_shard_size=arguments.max_shard_size,
        note=say,
    )
    print(json.dumps({"folder": str(out)}) if arguments.json else f"The model is in {out}.")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    files = verbs.calibrate(
        arguments.source,
        arguments.text,
        arguments.out,
        methods=arguments.method,
        num_tokens=arguments.tokens,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        note=say,
    )
    if arguments.json:
        print(json.dumps({"files": [str(path) for path in files]}))
        return 0
    for path in files:
        print(path)
    print(f"To use them, add `calibration: {files[0].parent}` to the recipe.")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    scores = verbs.evaluate(
        arguments.model,
        _names(arguments.tasks),
        like=arguments.like,
        metric=arguments.metric,
        limit=arguments.limit,
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        system_instruction=arguments.system_instruction,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
        io=arguments.io,
        note=say,
    )
    if arguments.json:
        print(json.dumps([_score_dict(score) for score in scores], indent=2))
        return 0
    words = [(score.task, score.metric) for score in scores]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    for score in scores:
        stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        names = f"{score.task:{widths[0]}}  {score.metric:{widths[1]}}"
        print(f"{names}  {score.value:.4f}{stderr}")
    return 0


def _names(text: str | None) -> list[str]:
    """Splits a comma-separated list of names."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _score_dict(score: Score) -> dict[str, object]:
    """A score for JSON, which can't represent numbers that are not finite."""
    numbers = {"value": score.value, "stderr": score.stderr, "chance": score.chance}
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
    words = {"task": score.task, "metric": score.metric}
    return {**words, **finite, "num_documents": score.num_documents}


def _add_stitch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a recipe.yaml, a mergekit YAML, or a run folder with --point"
    )
    parser.add_argument("out", help="the model folder to make")
    parser.add_argument("--point", help="id of a point of the run, or its first characters")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the smoke test"
    )
    parser.add_argument(
        "--no-sync", dest="sync", action="store_false", help="do not wait for the disk"
    )
    parser.add_argument("--threads", type=int, default=0, help="for merging (0 = all cores)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="50GB",
        help="largest weight file, like 5GB or 500MiB (50GB). On a disk that can share blocks "
        "with the inputs (XFS, Btrfs) copied layers take no space, but may need a few more files",
    )
    add_io(parser)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a recipe.yaml or a search.yaml")
    parser.add_argument(
        "--text", required=True, help="one document per line, or a .jsonl of objects with a text"
    )
    parser.add_argument("--out", help="folder for the result (the calibration that source names)")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        help="fisher or regmean; may be given twice (those that source uses)",
    )
    parser.add_argument(
        "--tokens", type=at_least_one, default=100_000, help="how many to read (100000)"
    )
    parser.add_argument(
        "--seq-len", type=at_least_one, default=512, help="tokens in a sequence, at most (512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the tokens drawn for fisher (0)")
    parser.add_argument("--dtype", default="float32", help="of the models while they read")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a hub id, a recipe.yaml or a mergekit YAML")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tasks", help="lm-eval's names, separated by commas")
    asked.add_argument(
        "--like",
        metavar="SEARCH",
        help="a search.yaml or a run's config.yaml: scores on its tasks, options and documents",
    )
    parser.add_argument("--metric", help="only this one, like acc_norm (all metrics of the tasks)")
    parser.add_argument(
        "--limit",
        type=float,
        help="only the first documents of each task; a fraction of them if below 1",
    )
    parser.add_argument("--include-path", help="a folder with your own tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples in the context")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="prompt with the model's chat template"
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="each example is a turn of the chat (if there is a chat template)",
    )
    parser.add_argument("--system-instruction", help="the system prompt")
    parser.add_argument("--batch-size", type=int, help="sequences in a batch (32)")
    parser.add_argument("--dtype", help="bfloat16, float16, float32 or auto (auto)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or auto (auto)")
    add_io(parser)


COMMANDS = {
    "stitch": Command(
        "write the model that a recipe describes",
        "gptailor stitch runs/smollm2 --point 1f3a09bc my-model",
        _add_stitch,
        _stitch,
    ),
    "calibrate": Command(
        "run each model on a text, for merges by fisher and regmean",
        "gptailor calibrate recipe.yaml --text sample.txt --method regmean --out calibration",
        _add_calibrate,
        _calibrate,
    ),
    "eval": Command(
        "score one model, the same way as a search does",
        "gptailor eval my-model --tasks piqa,arc_easy --limit 100",
        _add_eval,
        _eval,
    ),
}
