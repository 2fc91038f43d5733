"""What models read while a repair is computed: token sequences in groups, composed into batches.

A group is a task, or the text; each has its own teacher. A sequence is what lm-eval runs to score a
context with one of its continuations: all continuations are read, none is marked as right. Where
sequences begin alike, their common beginning is run again but counts only once.

Shapes: B sequences, T tokens of the longest one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptailor.config import EvaluationConfig, TaskSpec
from gptailor.errors import UsageError
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.text import make_sequences, read_documents
from gptailor.evaluation.workload import Workload
from gptailor.recipe.repair import TEXT, CalibrationDocuments

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included: enough to keep a processor busy. Where memory is short, they
are fewer, which rounds results differently."""

FULL_TOKENS = 512
"""A batch that has so many ends where rows would be padded by much."""

LEAST_FILLED = 0.75
"""The length of a row relative to the longest, below which it is padded by much."""

TEXT_LENGTH = 128
"""The longest piece of a text, in tokens; short ones make the states of more different texts."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Sequences of one group for one forward pass.

    Attributes:
        group: the group's name.
        input_BT: token ids, padded on the right.
        counts_BT: True for tokens that count.
    """

    group: str
    input_BT: torch.Tensor
    counts_BT: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """Everything that is read for one calibration.

    Attributes:
        batches: those of one group next to each other.
        groups: the groups' names.
        num_documents: documents of tasks.
        num_tokens: tokens that count.
        num_run: tokens that are run, padding included.
        digest: of all sequences (16 hex digits).
    """

    batches: tuple[Batch, ...]
    groups: tuple[str, ...]
    num_documents: int
    num_tokens: int
    num_run: int
    digest: str

    def smaller_batch(self, batch_tokens: int) -> int | None:
        """The next power of two below a number of tokens that splits a batch; None if every batch
        is one sequence."""
        several = [b.input_BT.numel() for b in self.batches if len(b.input_BT) > 1]
        if not several:
            return None
        while batch_tokens >= max(several):
            batch_tokens //= 2
        return batch_tokens

    def in_batches(self, batch_tokens: int) -> Reading:
        """The same sequences in batches of so many tokens, as if they had been read that way."""
        batches: list[Batch] = []
        for group in self.groups:
            own = [batch for batch in self.batches if batch.group == group]
            found = sorted(tokens for batch in own for tokens in _rows(batch))
            batches += _batches(group, found, own[0].input_BT.device, batch_tokens)
        return replace(
            self,
            batches=tuple(batches),
            num_run=sum(batch.input_BT.numel() for batch in batches),
        )


def read_calibration(
    documents: CalibrationDocuments,
    lm: ResidentLM,
    device: torch.device,
    scored: Sequence[Workload],
    batch_tokens: int = BATCH_TOKENS,
) -> Reading:
    """Reads tasks and text.

    Args:
        documents: what is read.
        lm: encodes it.
        device: for the batches.
        scored: the workloads that models are scored on.
        batch_tokens: tokens of a batch, padding included, unless one sequence has more.

    Raises:
        UsageError: a task or the text can't be read, there are no documents, one of them is scored,
            or the documents are not those that `documents.digest` stands for.
    """
    groups: dict[str, set[Tokens]] = {}
    num_documents = 0
    if documents.tasks:
        workload = open_calibration_tasks(documents, lm)
        check_unscored(workload, scored)
        num_documents = workload.num_documents
        for task in documents.tasks:
            groups[task.task] = _sequences(workload, task.task, lm)
    if documents.text is not None:
        _check_unscored_text(documents.text, scored)
        groups[TEXT] = _text_sequences(documents, lm)
    for name, found in groups.items():
        if not found:
            raise UsageError(
                f"The repair has no documents of {name} left to read: score fewer documents "
                "(evaluation.rungs), or name other tasks or a text for space.repair.calibration."
            )
    digest = hashlib.sha256(
        json.dumps([[name, sorted(found)] for name, found in groups.items()]).encode()
    ).hexdigest()[:16]
    if documents.digest and documents.digest != digest:
        raise UsageError(
            "The documents that the repair reads are not those that the recipe was made with: "
            "restore the tasks and the text, or remove the digest from the recipe's repair."
        )
    batches = [
        batch
        for name, found in groups.items()
        for batch in _batches(name, sorted(found), device, batch_tokens)
    ]
    return Reading(
        tuple(batches),
        tuple(groups),
        num_documents,
        sum(int(batch.counts_BT.sum()) for batch in batches),
        sum(batch.input_BT.numel() for batch in batches),
        digest,
    )


def open_calibration_tasks(documents: CalibrationDocuments, lm: ResidentLM) -> Workload:
    """The tasks as a workload of their own; raises like `Workload`."""
    config = EvaluationConfig(
        tasks=tuple(TaskSpec(task=t.task, num_fewshot=t.num_fewshot) for t in documents.tasks),
        include_path=documents.include_path,
        apply_chat_template=documents.apply_chat_template,
        fewshot_as_multiturn=documents.fewshot_as_multiturn,
        system_instruction=documents.system_instruction,
    )
    return Workload(
        config.tasks,
        config,
        lm,
        num_documents=documents.documents,
        skip=documents.skip,
        seed=documents.seed,
        comparable=False,
    )


def check_unscored(workload: Workload, scored: Sequence[Workload]) -> None:
    """Raises a `UsageError` if a calibration document is one that models are scored on.

    Documents are compared, as the same one has another context with other examples, and contexts,
    as several tasks may ask the same.
    """
    documents: set[tuple[str, str]] = set()
    contexts: set[str] = set()
    for other in scored:
        for task in other.task_names:
            documents.update((task, _shown(document)) for document in other.documents(task))
            contexts.update(str(i.args[0]) for i in other.instances(task) if i.args and i.args[0])
    for task in sorted(workload.task_names):
        found = [str(i.args[0]) for i in workload.instances(task) if i.args]
        both = [context for context in found if context in contexts]
        both += [text for d in workload.documents(task) if (task, text := _shown(d)) in documents]
        if both:
            raise UsageError(
                f"A calibration document of {task} is also scored ({both[0][:60]!r}): a repair "
                "must not see what measures it. Name other documents for the calibration."
            )


def _check_unscored_text(path: str, scored: Sequence[Workload]) -> None:
    """Raises a `UsageError` if a document of the text is one whose perplexity is measured."""
    texts = {
        instance.args[0].strip()
        for workload in scored
        for task in workload.task_names
        for instance in workload.instances(task)
        if instance.request_type == "loglikelihood_rolling"
    }
    for document in read_documents(path) if texts else ():
        if document.strip() in texts:
            raise UsageError(
                f"A document of the text {path} is also scored ({document[:60]!r}): a repair must "
                "not see what measures it. Name another text for the calibration."
            )


def _shown(document: Any) -> str:
    return json.dumps(document, sort_keys=True, default=str)


def _sequences(workload: Workload, name: str, lm: ResidentLM) -> set[Tokens]:
    """The token sequences of a requested task, with all continuations of each context."""
    longest = int(lm.max_length)
    found: set[Tokens] = set()
    for task in workload.members(name):
        instances = workload.instances(task)
        scored = [i for i in instances if i.request_type == "loglikelihood"]
        for _, context, continuation in lm.encoded(scored):
            found.add(tuple((context + continuation)[-(longest + 1) : -1]))
        for instance in instances:
            if instance.request_type == "loglikelihood_rolling":
                found.add(tuple(lm.tok_encode(instance.args[0])[:longest]))
            elif instance.request_type == "generate_until":
                text = instance.args[0] + workload.reference(task, instance)
                found.add(tuple(lm.tok_encode(text)[-longest:]))
    return {tokens for tokens in found if tokens}


def _text_sequences(documents: CalibrationDocuments, lm: ResidentLM) -> set[Tokens]:
    assert documents.text is not None
    longest = min(TEXT_LENGTH, int(lm.max_length))
    found = make_sequences(read_documents(documents.text), lm.tok_encode, documents.tokens, longest)
    return set(found.tokens)


def _batches(
    name: str, sequences: Sequence[Tokens], device: torch.device, batch_tokens: int
) -> list[Batch]:
    """Batches of similar lengths.

    Args:
        name: the group's.
        sequences: in lexical order, so that a common beginning is shared with the one before.
        device: for the tensors.
        batch_tokens: of a batch, padding included, unless one sequence has more.
    """
    shared = [0, *(_common(a, b) for a, b in itertools.pairwise(sequences))]
    rows = sorted(zip(sequences, shared, strict=True), key=lambda row: (-len(row[0]), row[0]))
    batches = []
    begin = 0
    while begin < len(rows):
        length = len(rows[begin][0])
        part = rows[begin : begin + max(batch_tokens // length, 1)]
        enough = -(-FULL_TOKENS // length)
        short = (n for n, row in enumerate(part) if len(row[0]) < LEAST_FILLED * length)
        part = part[: max(next(short, len(part)), enough)]
        begin += len(part)
        input_BT = torch.zeros(len(part), length, dtype=torch.long)
        counts_BT = torch.zeros(len(part), length, dtype=torch.bool)
        for row, (tokens, known) in enumerate(part):
            input_BT[row, : len(tokens)] = torch.tensor(tokens)
            counts_BT[row, known : len(tokens)] = True
        batches.append(Batch(name, input_BT.to(device), counts_BT.to(device)))
    return batches


def _rows(batch: Batch) -> list[Tokens]:
    """The sequences of a batch, without padding: the last token of each one counts, as only
    beginnings are shared."""
    ends = [int(counts_T.nonzero()[-1]) + 1 for counts_T in batch.counts_BT]
    return [tuple(row[:end]) for row, end in zip(batch.input_BT.tolist(), ends, strict=True)]


def _common(first: Tokens, second: Tokens) -> int:
    """The length of the common beginning."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
