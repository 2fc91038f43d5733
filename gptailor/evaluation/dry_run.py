"""Loads what evaluations need besides the weights, as a worker will: the tokenizer and the tasks.

The model is on torch's meta device, with shapes but no memory, so a login node can do this. Run as
a program, it reads a resolved configuration as JSON and prints its findings as JSON; `prefetch`
runs it with the network cut off.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gptailor.config import Config, parse_config
from gptailor.errors import GptailorError
from gptailor.evaluation.family import open_family
from gptailor.evaluation.lm import ResidentLM, plan_batches, read_inputs
from gptailor.evaluation.loading import load_tokenizer
from gptailor.evaluation.pointers import find_pointers
from gptailor.evaluation.repair.reading import Reading, read_calibration
from gptailor.evaluation.structure import Structure
from gptailor.evaluation.workload import Workload, open_workloads
from gptailor.models.family import Family
from gptailor.recipe.repair import CalibrationDocuments


@dataclass(frozen=True)
class WorkloadSize:
    """The size of one evaluation.

    Attributes:
        documents: how many are scored.
        requests: how many lm-eval makes of them.
        tokens: how many go through the model, padding included; an upper bound for generated text.
        batch_tokens: tokens of the largest batch.
        logits: the most positions whose logits one batch computes.
        digest: changes when tasks or documents do.
    """

    documents: int
    requests: int
    tokens: int
    batch_tokens: int
    logits: int
    digest: str


class DryRun:
    """Tokenizer, tasks and requests of a search, without the weights.

    Args:
        config: the search.
        family: its candidates, of which only the base's headers and tokenizer are read.
        few: use only this many documents of each task, those most likely to be refused.

    Attributes:
        lm: encodes requests; its model has no weights.
        stack: the path of the model's layers.
        workloads: the tasks.

    Raises:
        UsageError: a task or its data can't be loaded, or the model can't answer a request.
        ModelError: transformers can't build the base, stores it in a way that a search can't use,
            or can't load its tokenizer.
    """

    def __init__(self, config: Config, family: Family, *, few: int | None = None) -> None:
        base = family.base
        structure = Structure(base.folder, base.config, base.checkpoint.tensors)
        find_pointers(structure, family)
        tokenizer = load_tokenizer(base.folder)
        self.stack = structure.stack
        self.lm = ResidentLM(structure.shell.eval(), tokenizer, config.evaluation.batch_size)
        self.workloads = open_workloads(
            config.evaluation, self.lm, seed=config.search.seed, few=few
        )

    def sizes(self) -> dict[str, WorkloadSize]:
        """The sizes of the search's workload and, if there is one, the holdout's."""
        return {name: self._size(workload) for name, workload in self.workloads.items()}

    def reading(self, documents: CalibrationDocuments) -> Reading:
        """What repairs read; raises a `UsageError` like `read_calibration`."""
        scored = tuple(self.workloads.values())
        return read_calibration(documents, self.lm, torch.device("cpu"), scored)

    def _size(self, workload: Workload) -> WorkloadSize:
        requests = workload.requests()
        batches: list[tuple[int, int]] = []  # (tokens, logits)
        for kind, instances in requests.items():
            if kind == "loglikelihood":
                inputs = read_inputs(self.lm.encoded(instances), self.lm.max_length)
                planned = plan_batches(inputs, int(self.lm.batch_size), torch.device("cpu"))
                batches += [
                    (b.input_BT.numel(), len(b.input_BT) * len(b.positions_P)) for b in planned
                ]
            else:
                batches += self._text_batches(kind, instances)
        return WorkloadSize(
            documents=workload.num_documents,
            requests=sum(map(len, requests.values())),
            tokens=sum(tokens for tokens, _ in batches),
            batch_tokens=max(tokens for tokens, _ in batches),
            logits=max(logits for _, logits in batches),
            digest=workload.digest,
        )

    def _text_batches(self, kind: str, instances: list[Any]) -> list[tuple[int, int]]:
        """Batches of rolling perplexity, which needs every position, or of generated text."""
        from lm_eval.models.utils import normalize_gen_kwargs

        lengths = [len(self.lm.tok_encode(instance.args[0])) for instance in instances]
        if kind == "generate_until":
            new = [
                normalize_gen_kwargs(i.args[1], self.lm.max_gen_toks)["max_gen_toks"]
                for i in instances
            ]
            lengths = [min(a + b, self.lm.max_length) for a, b in zip(lengths, new, strict=True)]
        size = int(self.lm.batch_size)
        lengths.sort(reverse=True)
        found = []
        for at in range(0, len(lengths), size):
            some = lengths[at : at + size]
            longest = min(some[0], self.lm.max_length)
            rows = len(some) * (longest if kind == "loglikelihood_rolling" else 1)
            found.append((sum(some), rows))
        return found


def main() -> int:
    """Reads a configuration from standard input; writes sizes or an error to standard output."""
    try:
        config = parse_config(json.load(sys.stdin), "the configuration")
        dry_run = DryRun(config, open_family(config.models, config.base))
        found = {name: asdict(size) for name, size in dry_run.sizes().items()}
        print(json.dumps({"sizes": found}))
    except GptailorError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
