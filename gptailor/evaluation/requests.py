"""Finds requests that a model can't answer, before the first evaluation.

These would stop lm-eval's own Hugging Face model in the middle of a run: a continuation longer than
the model's context, an answer or prompt without tokens, a prompt that leaves no room for generated
text. A context that is too long is truncated on the left, as lm-eval does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptailor.errors import UsageError, plain, unknown

if TYPE_CHECKING:
    from gptailor.evaluation.lm import ResidentLM

_SHOWN = 40
"""Longer texts are shortened in messages."""


@dataclass(frozen=True)
class Asked:
    """A request and where it comes from.

    Attributes:
        task: lm-eval's name of the task.
        document: index among the task's documents, from 0.
        instance: lm-eval's instance.
    """

    task: str
    document: int
    instance: Any


def check_requests(requests: Iterable[Asked], lm: ResidentLM) -> None:
    """Checks that the model could answer every request; nothing is run.

    Raises:
        UsageError: it can't answer one of them; the message names the first one's task and
            document.
    """
    reader = _Reader(lm)
    wrong: dict[tuple[str, int], str] = {}
    for asked in requests:
        key = asked.task, asked.document
        if key not in wrong:
            reason = reader.why_not(asked.instance)
            if reason:
                wrong[key] = reason
    if wrong:
        (task, document), reason = next(iter(wrong.items()))
        more = sum(name == task for name, _ in wrong) - 1
        others = f" (and {more} more)" if more else ""
        raise UsageError(f"The task {task} can't be scored: document {document}{others}: {reason}")


class _Reader:
    """Checks requests the way lm-eval will process them."""

    def __init__(self, lm: ResidentLM) -> None:
        self._lm = lm
        self._max_length = int(lm.max_length)
        config = lm.model.config.get_text_config()
        self._rows = int(getattr(config, "vocab_size", None) or 2**62)

    def why_not(self, instance: Any) -> str:
        """Why the model can't answer a request; empty if it can."""
        if instance.request_type == "loglikelihood":
            return self._why_not_scored(instance)
        if instance.request_type == "loglikelihood_rolling":
            return self._why_unknown(self._lm.tok_encode(instance.args[0]))
        if instance.request_type == "generate_until":
            return self._why_not_generated(*instance.args[:2])
        return ""

    def _why_not_scored(self, instance: Any) -> str:
        before, after = instance.args[:2]
        no_token = f"the answer {_shown(after)} has no tokens. Give it some text, or leave it out."
        if before == "" and not self._lm.tok_encode(after, add_special_tokens=False):
            return no_token
        [(_, context, continuation)] = self._lm.encoded([instance])
        if not continuation:
            return no_token
        if not context:
            return f"the context {_shown(before)} of the answer {_shown(after)} has no tokens."
        if len(continuation) > self._max_length:
            return (
                f"the answer {_shown(after)} has {len(continuation)} tokens, but the model reads "
                f"{self._max_length} at most. Shorten it, or leave the document out."
            )
        return self._why_unknown([*context, *continuation])

    def _why_not_generated(self, prompt: str, settings: Any) -> str:
        from lm_eval.models.utils import normalize_gen_kwargs

        if self._lm.eot_token_id is None:
            return "text is to be generated, but the tokenizer has no EOS token to end it."
        try:
            kwargs = normalize_gen_kwargs(settings, self._lm.max_gen_toks)
        except (AttributeError, TypeError, ValueError) as error:
            return f"its generation_kwargs {_shown(settings)} are wrong: {plain(str(error))}."
        for name in kwargs:
            if name not in self._known_settings:
                known = sorted(self._known_settings)
                return str(unknown("option", name, known, "its generation_kwargs"))
        new, temperature = kwargs["max_gen_toks"], kwargs.get("temperature", 0.0)
        if kwargs.get("do_sample") and not temperature > 0:
            return "its generation_kwargs have do_sample: true, which needs a temperature above 0."
        room = self._max_length - new
        if new < 1 or room < 1:
            return (
                f"{new} new tokens are requested, but the model reads {self._max_length} in all. "
                "Set another max_gen_toks in the task's generation_kwargs."
            )
        tokens = self._lm.tok_batch_encode([prompt], left_truncate_len=room)[0][0].tolist()
        if not tokens:
            return f"the prompt {_shown(prompt)} has no tokens."
        if kwargs.get("max_length", room + new) <= len(tokens):
            return (
                f"the prompt has {len(tokens)} tokens, but max_length of the task's "
                f"generation_kwargs is {kwargs['max_length']}. Use max_gen_toks."
            )
        return self._why_unknown(tokens)

    @cached_property
    def _known_settings(self) -> set[str]:
        """The options that transformers' generate takes, and those that lm-eval handles itself."""
        from transformers import GenerationConfig

        model = self._lm.model
        arguments = {*inspect.signature(model.forward).parameters}
        arguments |= {*inspect.signature(model.generate).parameters}
        return {"until", "max_gen_toks", *vars(GenerationConfig()), *arguments} - {"kwargs"}

    def _why_unknown(self, tokens: list[int]) -> str:
        largest = max(tokens, default=0)
        if largest < self._rows:
            return ""
        token = _shown(self._lm.tok_decode([largest], skip_special_tokens=False))
        return (
            f"it has the token {token} with the id {largest}, but the model has {self._rows} "
            "embeddings. Its tokenizer belongs to another model."
        )


def _shown(text: object) -> str:
    return repr(plain(str(text), _SHOWN))
