"""Turns a text into token sequences for statistics, the same for every model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptailor.errors import UsageError


@dataclass(frozen=True)
class Sequences:
    """Token sequences for models to read.

    Attributes:
        tokens: the tokens of each sequence.
    """

    tokens: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all sequences."""
        return sum(map(len, self.tokens))

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the tokens."""
        return hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()


def read_documents(path: str | Path) -> list[str]:
    """The non-empty documents of a file: its lines, or the values of `text` in a `.jsonl`.

    Raises:
        UsageError: the file is missing, not UTF-8 or without documents, or a line is not a
            document.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"The text {path} can't be read: {reason}.") from error
    if path.suffix == ".jsonl":
        numbered = enumerate(lines, start=1)
        lines = [_text_of(line, path, number) for number, line in numbered if line.strip()]
    documents = [line.strip("\r") for line in lines if line.strip()]
    if not documents:
        raise UsageError(f"The text {path} is empty.")
    return documents


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        document = None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{path}, line {number}, is not a JSON object with a text.")
    return text


def make_sequences(
    documents: Iterable[str], encode: Callable[[str], Sequence[int]], num_tokens: int, seq_len: int
) -> Sequences:
    """Takes documents in order, long ones in pieces, until there are enough tokens.

    Args:
        documents: texts.
        encode: a tokenizer, including its special tokens.
        num_tokens: the most tokens in all; fewer if the documents have fewer.
        seq_len: the most tokens in one sequence.

    Raises:
        UsageError: there is not a single token.
    """
    sequences: list[tuple[int, ...]] = []
    left = num_tokens
    for document in documents:
        tokens = tuple(encode(document))
        for begin in range(0, len(tokens), seq_len):
            piece = tokens[begin : begin + seq_len][:left]
            if piece:
                sequences.append(piece)
                left -= len(piece)
        if left <= 0:
            break
    if not sequences:
        raise UsageError("The text has no tokens.")
    return Sequences(tuple(sequences))
