"""The words of the verbs before a search on a cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex

from gptailor.commands.command import Command


def _prefetch(arguments: argparse.Namespace) -> int:
    from gptailor import verbs

    found = verbs.prefetch(arguments.config, arguments.overrides)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    width = max(map(len, found.models))
    for name, model in found.models.items():
        source = f"{model.ref} in " if model.from_hub else ""
        print(f"{name:{width}}  {size(model.n_bytes):>8}  {source}{model.folder}")
    documents = ", ".join(f"{count} {name}" for name, count in found.documents.items())
    print(f"Tokenizer and tasks are there: {documents} documents.")
    if found.only_checked:
        print("Nothing was downloaded, as HF_HUB_OFFLINE is set.")
    print("All of it was loaded without a network, as a job will do with")
    for variable, value in found.variables.items():
        print(f"  export {variable}={shlex.quote(value)}")
    print("in its environment. Its nodes must see these folders under the same names.")
    return 0


def size(n_bytes: float) -> str:
    """A number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def _add_prefetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a search.yaml")
    parser.add_argument("overrides", nargs="*", help="key.path=value")


COMMANDS = {
    "prefetch": Command(
        "download what a search on nodes without a network will need",
        "gptailor prefetch search.yaml",
        _add_prefetch,
        _prefetch,
    ),
}
