"""lm-eval's own Hugging Face model, which does work that evaluations share only once.

`ResidentLM` is `lm_eval`'s HFLM, so tokenization, windows of rolling perplexity, generation and
stop sequences are lm-eval's. Only the path of log-likelihood requests to the model is different:
requests are encoded once for all recipes, equal inputs are run once, batches are composed the same
way for every recipe, and the output head is computed only where a continuation needs it.

Shapes: B sequences, T tokens of the longest sequence, P positions that any sequence of the batch
needs, V vocabulary size, R requests of the batch, C tokens of their longest continuation.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch import nn

from gptailor.errors import ModelError, UsageError

Request = tuple[Any, list[int], list[int]]
"""A request in lm-eval's form: (cache key, context tokens, continuation tokens)."""


_NAN = (
    "The model's {} are not numbers: its weights hold NaN or infinity, or they overflow in the "
    "evaluation's dtype (try float32 to find out)."
)


@dataclass(frozen=True)
class Batch:
    """One forward pass and what is read from it.

    Attributes:
        input_BT: token ids, padded on the right.
        positions_P: the positions whose logits are needed, ascending.
        rows_RC, columns_RC, tokens_RC: for each token of a continuation, its sequence, its index
            in `positions_P`, and the token itself.
        mask_RC: False where a continuation is shorter than the longest one.
        requests: the index of each row's request.
    """

    input_BT: torch.Tensor
    positions_P: torch.Tensor
    rows_RC: torch.Tensor
    columns_RC: torch.Tensor
    tokens_RC: torch.Tensor
    mask_RC: torch.Tensor
    requests: tuple[int, ...]


class ResidentLM(HFLM):  # type: ignore[misc]
    """lm-eval's view of a model whose layers change between evaluations.

    Args:
        model: a transformers causal language model, on its device.
        tokenizer: its tokenizer.
        batch_size: sequences in one forward pass.

    Attributes:
        forward_s: seconds spent inside the model's forward pass so far.
        num_tokens: tokens that went through it so far, padding included.

    Raises:
        ModelError: the model declares no maximum length.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # HFLM warns about ignored arguments, which we don't use
        try:
            super().__init__(
                pretrained=model,
                backend="causal",  # HFLM takes a decoder-only BART for a seq2seq model
                tokenizer=tokenizer,
                batch_size=batch_size,
            )
        finally:
            logger.setLevel(level)
        if self.max_length < 1:  # XLNet has no limit
            raise ModelError(
                f"A model of this type ({self.config.model_type}) does not say how many tokens it "
                "reads, so lm-eval can't score it; it can still be stitched."
            )
        self._max_length = self.max_length - _first_position(model, self.max_length)
        self.forward_s = 0.0
        self.num_tokens = 0
        self._began = 0.0
        self._generating = False
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self._captured: list[Request] | None = None  # while requests are only encoded
        self._plans: dict[tuple[tuple[tuple[int, ...], int], ...], list[Batch]] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each request and whether it is greedy, like HFLM; encodes only once."""
        return self._loglikelihood_tokens(self.encoded(requests))

    def encoded(self, requests: Sequence[Any]) -> list[Request]:
        """Log-likelihood requests as tokens, encoded by HFLM; nothing is run."""
        missing = [r for r in requests if tuple(r.args) not in self._encoded]
        if missing:
            self._captured = []
            try:
                super().loglikelihood(missing, disable_tqdm=True)
                captured = self._captured
            finally:
                self._captured = None
            for request, (_, context, continuation) in zip(missing, captured, strict=True):
                self._encoded[tuple(request.args)] = (context, continuation)
        return [(None, *self._encoded[tuple(r.args)]) for r in requests]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Like HFLM, without a progress bar."""
        result: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return result

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Like HFLM, without a progress bar; raises if logits are not numbers."""
        self._generating = True
        try:
            result: list[str] = super().generate_until(requests, disable_tqdm=True)
        finally:
            self._generating = False
        return result

    def check_tokenizer(self, *, has_chat: bool) -> None:
        """Raises unless the tokenizer has what lm-eval needs.

        Raises:
            ModelError: there is no token to begin a text with.
            UsageError: there is no chat template, or there are several without a default.
        """
        if self.prefix_token_id is None:
            raise ModelError(
                f"The tokenizer in {self.tokenizer.name_or_path} has neither a BOS nor an EOS "
                "token, and lm-eval starts a text without a context with one: set the right one "
                "in its tokenizer_config.json."
            )
        if not has_chat:
            return
        try:
            self.tokenizer.get_chat_template()
        except ValueError as error:
            what = "several chat templates, none of them the default"
            if not self.tokenizer.chat_template:
                what = "no chat template"
            raise UsageError(
                f"apply_chat_template: the tokenizer in {self.tokenizer.name_or_path} has {what}: "
                "put the right one into a chat_template.jinja there, or leave the key out."
            ) from error

    def hidden_states_only(self, input_BT: torch.Tensor) -> None:
        """Runs the model only for its hooks; computes logits of one position where possible."""
        kwargs = {"logits_to_keep": 1} if self._keeps_logits else {}
        self.model(input_ids=input_BT, use_cache=False, **kwargs)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, override_bs
        if self._captured is not None:
            self._captured.extend(requests)
            return [(0.0, False)] * len(requests)
        inputs = read_inputs(requests, self.max_length)
        if inputs not in self._plans:
            if len(self._plans) >= 16:
                self._plans.clear()
            self._plans[inputs] = plan_batches(inputs, int(self.batch_size), self.device)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._plans[inputs]:
            for request, answer in zip(batch.requests, self._answers(batch), strict=True):
                answers[request] = answer
        return answers

    @torch.inference_mode()
    def _answers(self, batch: Batch) -> list[tuple[float, bool]]:
        kwargs = {"logits_to_keep": batch.positions_P} if self._keeps_logits else {}
        logits_BPV = self.model(input_ids=batch.input_BT, use_cache=False, **kwargs).logits
        if not self._keeps_logits:
            logits_BPV = logits_BPV[:, batch.positions_P]
        logprobs_BPV = F.log_softmax(logits_BPV, dim=-1, dtype=self.softmax_dtype)
        logprobs_RC = logprobs_BPV[batch.rows_RC, batch.columns_RC, batch.tokens_RC]
        sums_R = torch.where(batch.mask_RC, logprobs_RC, 0).sum(-1)
        hits_RC = logprobs_RC >= logprobs_BPV.amax(-1)[batch.rows_RC, batch.columns_RC]
        # Several tokens may share the maximum; lm-eval takes the first one. Only tokens at the
        # maximum are checked: an argmax everywhere would take longer than the softmax.
        top = logprobs_BPV[batch.rows_RC[hits_RC], batch.columns_RC[hits_RC]].float().argmax(-1)
        hits_RC[hits_RC.clone()] = top == batch.tokens_RC[hits_RC]
        greedy_R = (hits_RC | ~batch.mask_RC).all(-1)
        sums = sums_R.float().tolist()
        if any(math.isnan(value) for value in sums):
            raise FloatingPointError(_NAN.format("log-likelihoods"))
        return list(zip(sums, greedy_R.tolist(), strict=True))

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del module
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None:
            self.num_tokens += input_ids.numel()
        self._began = time.perf_counter()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if self._generating and bool(output.logits[:, -1].isnan().any()):
            raise FloatingPointError(_NAN.format("logits"))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.forward_s += time.perf_counter() - self._began


def _first_position(model: nn.Module, rows: int) -> int:
    """The position of the first token: 0, or after the padding position in models like RoBERTa.

    lm-eval ignores this and fails on a text that exceeds the remaining positions.

    Args:
        model: the model.
        rows: number of rows of its position table.
    """
    for name, module in model.named_modules():
        is_table = type(module) is nn.Embedding and "position" in name.rpartition(".")[2]
        if is_table and module.num_embeddings == rows and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def read_inputs(
    requests: Sequence[Request], max_length: int
) -> tuple[tuple[tuple[int, ...], int], ...]:
    """For each request, its context and continuation tokens and the number of continuation tokens.

    The tokens are cut on the left to the model's maximum length plus one. `requests.check_requests`
    has made sure that neither part is empty and that the continuation fits.
    """
    assert all(context and 0 < len(rest) <= max_length for _, context, rest in requests)
    return tuple(
        (tuple((context + continuation)[-(max_length + 1) :]), len(continuation))
        for _, context, continuation in requests
    )


def plan_batches(
    inputs: Sequence[tuple[tuple[int, ...], int]], batch_size: int, device: torch.device
) -> list[Batch]:
    """Composes batches from requests in a way that depends only on the requests.

    Args:
        inputs: as `read_inputs` returns them.
        batch_size: sequences in a batch.
        device: for the tensors.

    Returns:
        Batches, longest sequences first; requests with the same input share a sequence.
    """
    by_sequence: dict[tuple[int, ...], list[int]] = {}
    for request, (tokens, _) in enumerate(inputs):
        by_sequence.setdefault(tokens[:-1], []).append(request)
    sequences = sorted(by_sequence, key=lambda s: (-len(s), s))
    return [
        _batch(sequences[i : i + batch_size], by_sequence, inputs, device)
        for i in range(0, len(sequences), batch_size)
    ]


def _batch(
    sequences: Sequence[tuple[int, ...]],
    by_sequence: dict[tuple[int, ...], list[int]],
    inputs: Sequence[tuple[tuple[int, ...], int]],
    device: torch.device,
) -> Batch:
    length = len(sequences[0])
    needed: list[tuple[int, int, list[int], tuple[int, ...]]] = []
    for row, sequence in enumerate(sequences):
        for request in by_sequence[sequence]:
            tokens, num_continuation = inputs[request]
            last = len(sequence)
            positions = list(range(last - num_continuation, last))
            needed.append((request, row, positions, tokens[-num_continuation:]))
    used = sorted({p for _, _, positions, _ in needed for p in positions})
    column_of = {position: column for column, position in enumerate(used)}
    width = max(len(positions) for _, _, positions, _ in needed)
    shape = (len(needed), width)
    rows, columns, tokens_RC = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, (_, row, positions, continuation) in enumerate(needed):
        n = len(positions)
        rows[i] = row
        columns[i, :n] = torch.tensor([column_of[p] for p in positions])
        tokens_RC[i, :n] = torch.tensor(continuation)
        mask[i, :n] = True
    padded = [[*sequence, *([0] * (length - len(sequence)))] for sequence in sequences]
    return Batch(
        input_BT=torch.tensor(padded, device=device),
        positions_P=torch.tensor(used, device=device),
        rows_RC=rows.to(device),
        columns_RC=columns.to(device),
        tokens_RC=tokens_RC.to(device),
        mask_RC=mask.to(device),
        requests=tuple(request for request, *_ in needed),
    )
