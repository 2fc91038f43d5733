"""How a model folder is read: which tensors are used, where the layers are, what is tied.

Names and shapes tell most of this, but not which tensors transformers ignores on load, nor the
defaults that a config leaves to its class. A `Reader`, which has transformers at hand, knows both.
Models of a few types whose layers are all alike need none: `plain_reading` knows all tensor names
that they can have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gptailor.errors import ModelError
from gptailor.models.checkpoint import Checkpoint

PLAIN_TYPES = ("llama", "mistral")
"""Model types whose layers are all alike, do not depend on index or depth, and whose head is untied
by default."""

_PLAIN_NAME = re.compile(
    r"model\.(embed_tokens|norm"
    r"|layers\.(0|[1-9][0-9]*)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
    r"|(input|post_attention)_layernorm))\.weight"
)
_PLAIN_HEAD, _PLAIN_EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Reading:
    """What a loader would use of a model folder.

    Attributes:
        ignored: tensors of the files that transformers ignores, and those of a head that is an
            exact copy of tied embeddings.
        is_tied: the output head is the embedding matrix.
        prefix: of the layers' tensors, up to the number; None for the group with the most bytes.
        unties: config.json ties the head, but the files hold a different one, so the result's
            config must not tie it.
        shared: a tensor that several layers share; empty if each has its own.
        is_plain: a cut changes nothing in its config but the number of layers.
        notes: what the user should know, a sentence each.
    """

    ignored: frozenset[str] = frozenset()
    is_tied: bool = False
    prefix: str | None = None
    unties: bool = False
    shared: str = ""
    is_plain: bool = False
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """Knows how a loader would read a folder."""

    def read(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading:
        """The reading of a folder; raises a `ModelError` if it can't be read as a model."""

    def cut_config(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], src_layers: Sequence[int]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A config.json for these layers, and notes.

        Raises:
            UsageError: no config can describe them: a layer would become one of another kind.
        """

    def check_result(
        self, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        """Compares the names, types and shapes of a result with the model that its config
        describes.

        Raises:
            ModelError: something is missing, left over, or of another shape.
        """


def plain_reading(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading | None:
    """The reading of a model whose type and tensor names settle everything; None for others.

    Raises:
        ModelError: the output head is missing.
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
    """The reading by names alone, without a `Reader`: all tensors are used."""
    heads = ("lm_head.weight", "embed_out.weight")
    return Reading(is_tied=not any(name.endswith(heads) for name in checkpoint.tensors))


def tied_reading(
    checkpoint: Checkpoint, ties: bool, head: str, embeddings: str, reading: Reading
) -> Reading:
    """Decides by config and files whether the head is the embedding matrix.

    This follows transformers: a config that ties is right unless the files hold two different
    matrices. lm-eval and vLLM always believe the config, so the result's config has to be right.

    Args:
        checkpoint: the files.
        ties: whether the config ties the two.
        head, embeddings: names of the two matrices.
        reading: everything else that is known.

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
            "(tie_word_embeddings), so a loader would make it up: set tie_word_embeddings to true "
            "if it is tied, or download the model again."
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
        f"{folder}: config.json ties {head} to the embeddings, but the files hold a different one: "
        "it is treated as untied, and configs of results are corrected."
    )
    return replace(reading, unties=True, notes=(*reading.notes, note))
