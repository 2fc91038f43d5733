"""The verbs before a search on a cluster: fetch what it needs, say what it will cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptailor.errors import GptailorError, ModelError, ResourceError, UsageError
from gptailor.models.family import Family
from gptailor.models.untrusted import home_expanded, is_folder

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""What keeps the libraries of a job from asking the network."""

_NO_NETWORK = "http://127.0.0.1:9"
"""A proxy that is never there: whoever asks the network all the same is refused at once."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a candidate lies.

    Attributes:
        ref: as the configuration names it.
        folder: its files, as a job will find them.
        n_bytes: of its weights.
        from_hub: it lies in the hub's cache.
    """

    ref: str
    folder: str
    n_bytes: int
    from_hub: bool


@dataclass(frozen=True)
class Prefetched:
    """What a job without a network will find.

    Attributes:
        models: name → files.
        documents: "search" and, if there is one, "holdout" → documents of one evaluation.
        variables: that jobs need in their environment.
        hf_home: the folder with what came from the hub; nodes must see it.
        only_checked: nothing could have been downloaded, as HF_HUB_OFFLINE was set.
    """

    models: dict[str, ModelFiles]
    documents: dict[str, int]
    variables: dict[str, str]
    hf_home: str
    only_checked: bool


def prefetch(config: str | Path, overrides: Sequence[str] = ()) -> Prefetched:
    """Downloads what a search needs, then loads it where there is no network, as a job will.

    Models come from the hub unless they are local folders; tasks are loaded once, so that lm-eval
    fetches their datasets.

    Raises:
        UsageError: the configuration is wrong, or a task can't be had.
        ModelError: a model or tokenizer can't be had, or is unusable.
        ResourceError: the disk is full.
    """
    from gptailor.config import read_config
    from gptailor.evaluation.dry_run import DryRun

    parsed = read_config(config, overrides)
    family = Family(parsed.models, parsed.base)  # downloads
    sizes = DryRun(parsed, family).sizes()  # downloads
    found = _offline(parsed.model_dump_json())
    for name, size in sizes.items():
        if found[name]["digest"] != size.digest:
            raise UsageError(
                f"The {name} documents are others without a network: name fixed revisions of the "
                "datasets in the tasks."
            )
    models = {
        name: ModelFiles(
            ref=ref,
            folder=str(family.candidates[name].folder),
            n_bytes=sum(t.n_bytes for t in family.candidates[name].tensors.values()),
            from_hub=not is_folder(home_expanded(ref)),
        )
        for name, ref in parsed.models.items()
    }
    places = _places()
    return Prefetched(
        models=models,
        documents={name: size.documents for name, size in sizes.items()},
        variables={**OFFLINE, **places},
        hf_home=places["HF_HOME"],
        only_checked=_is_set("HF_HUB_OFFLINE"),
    )


def _offline(config_json: str) -> dict[str, dict[str, object]]:
    """What a process that has no network finds."""
    proxies = {
        key: _NO_NETWORK
        for name in ("http_proxy", "https_proxy", "all_proxy")
        for key in (name, name.upper())
    }
    environment = {**os.environ, **OFFLINE, **proxies, "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run(
        [sys.executable, "-m", "gptailor.evaluation.dry_run"],
        input=config_json,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the check without a network ended with: {last}") from None
    if "error" in answer:
        kinds: dict[int, type[GptailorError]] = {3: ModelError, 4: ResourceError}
        kind = kinds.get(answer["exit_code"], UsageError)
        raise kind(f"It was found, but not without a network: {answer['error']}")
    found: dict[str, dict[str, object]] = answer["sizes"]
    return found


def _places() -> dict[str, str]:
    """The folders of the hub's files, where they are not below HF_HOME as usual one by one."""
    import datasets
    from huggingface_hub import constants

    home = Path(constants.HF_HOME).absolute()
    places = {"HF_HOME": str(home)}
    for name, folder, usual in (
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE, home / "hub"),
        ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE, home / "datasets"),
    ):
        if Path(folder).absolute() != usual:
            places[name] = str(Path(folder).absolute())
    return places


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
