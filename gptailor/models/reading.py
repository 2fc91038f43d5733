"""How a model folder is read: which tensors count, where the layers are, what is tied.

Names and shapes tell most, but not what transformers leaves out on load, nor what a config means
that leaves it to a class. Whoever has transformers at hand gives a `Reader`. Models of a few types
whose layers are all alike need none: `plain_reading` knows all names that they can have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gptailor.errors import ModelError
from gptailor.models.checkpoint import Checkpoint

PLAIN_TYPES = ("llama", "mistral")
"""Model types whose layers are alike, depend neither on index nor depth, and untie by default."""

_PLAIN_NAME = re.compile(
    r"model\.(embed_tokens|norm"
    r"|layers\.(0|[1-9][0-9]*)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention)_layernorm))\.weight"
)
_PLAIN_HEAD, _PLAIN_EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Reading:
    """What counts in a model folder.

    Attributes:
        ignored: tensors of the files that transformers leaves out; so are those of a head that is
            an equal copy of tied embeddings.
        is_tied: the output head is the embedding matrix.
        prefix: of the layers' tensors, up to the number; None for what has most bytes.
        unties: config.json ties the head, but the files hold another one: the result's must not.
        shared: a tensor that several layers have in common; empty where each has its own.
        is_plain: a cut changes nothing in its config but the number of layers.
        notes: what a person should know, a sentence each.
    """

    ignored: frozenset[str] = frozenset()
    is_tied: bool = False
    prefix: str | None = None
    unties: bool = False
    shared: str = ""
    is_plain: bool = False
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """Knows what a loader makes of a folder."""

    def read(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading:
        """Raises a `ModelError` if the folder can't be read as a model."""

    def cut_config(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], src_layers: Sequence[int]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A config.json for these layers, and notes.

        Raises:
            UsageError: none can describe them: a layer would become one of another kind.
        """

    def check_result(
        self, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        """Compares the names, types and shapes of a result with the model of its config.

        Raises:
            ModelError: something is missing, left over, or of another shape.
        """


def plain_reading(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading | None:
    """The reading of a model whose type and names leave nothing open; None for all others.

    Raises:
        ModelError: it lacks its output head.
    """
    if config.get("model_type") not in PLAIN_TYPES or "quantization_config" in config:
        return None
    tensors = checkpoint.tensors
    num_layers = config.get("num_hidden_layers")
    if type(num_layers) is not int or len(tensors) - (_PLAIN_HEAD in tensors) != 2 + 9 * num_layers:
        return None
    if any(not _PLAIN_NAME.fullmatch(name) for name in tensors if name != _PLAIN_HEAD):
        return None
    if _PLAIN_EMBEDDINGS not in tensors:
        return None
    ties = config.get("tie_word_embeddings", False)
    if not isinstance(ties, bool):
        return None
    return tied_reading(checkpoint, ties, _PLAIN_HEAD, _PLAIN_EMBEDDINGS, Reading(is_plain=True))


def named_reading(checkpoint: Checkpoint) -> Reading:
    """The reading by names alone, where nobody knows better: all tensors count."""
    heads = ("lm_head.weight", "embed_out.weight")
    return Reading(is_tied=not any(name.endswith(heads) for name in checkpoint.tensors))


def tied_reading(
    checkpoint: Checkpoint, ties: bool, head: str, embeddings: str, reading: Reading
) -> Reading:
    """Decides by config and files whether the head is the embedding matrix.

    As transformers does on load: a config that ties is right unless the files hold two different
    matrices. lm-eval and vLLM believe the config in each case, so that the result's has to say it.

    Args:
        checkpoint: the files.
        ties: what the config means.
        head, embeddings: names of the two matrices.
        reading: what else is known.

    Raises:
        ModelError: there is no head, and the config does not tie it.
    """
    folder, tensors = checkpoint.folder, checkpoint.tensors
    if head not in tensors or embeddings not in tensors:
        if ties:
            return replace(reading, is_tied=True)
        lacks = head if head not in tensors else embeddings
        raise ModelError(
            f"{folder} lacks {lacks}, and its config.json says that it is not tied "
            "(tie_word_embeddings), so that a loader would make it up: set tie_word_embeddings to "
            "true if it is, or download the model again."
        )
    if not ties:
        return reading
    if checkpoint.is_equal(head, embeddings):
        note = f"{folder}: {head} is a copy of the tied {embeddings} and is left out."
        return replace(
            reading,
            is_tied=True,
            ignored=reading.ignored | {head},
            notes=(*reading.notes, note),
        )
    note = (
        f"{folder}: config.json ties {head} to the embeddings, but the files hold another one: it "
        "counts as untied, and results say so."
    )
    return replace(reading, unties=True, notes=(*reading.notes, note))
