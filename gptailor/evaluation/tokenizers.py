"""Compares two tokenizers by what they do, as files of different formats may hold the same one.

`tokenizer.model`, `vocab.json` with `merges.txt` and `tokenizer.json` are three ways to store a
tokenizer. Where the files do not show that they are the same, transformers loads both.
"""

from __future__ import annotations

from typing import Any

from gptailor.errors import ModelError
from gptailor.models.candidate import Candidate
from gptailor.models.rows import check_rows
from gptailor.models.untrusted import shown

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "HELLO, World! It's 3.14159, 1,000,000 and 0x7f; e-mail: a_b@example.org?",
    "def f(x):\n    return [x ** 2 for x in range(10)]  # squares\n\n\tif x != y:\r\n",
    "  leading,   several   and trailing spaces   ",
    "Füße, naïve café, Ωμέγα, Привет, 你好世界, こんにちは, مرحبا, 한국어, e\u0301",
    "🙂👩‍👩‍👧 ½ ™ … “quoted” – dash\u00a0no-break\u200bzero-width",
    '{"key": [1, 2.5, null], "x": "\\n"} <html></html> $E=mc^2$ C:\\path\\file',
    "<s></s><unk><pad> <|endoftext|> <|im_start|>user [INST] [/INST] <bos><eos>",
)
"""Samples of text that tokenizers treat differently."""


def compare_tokenizers(candidate: Candidate, base: Candidate) -> None:
    """Raises a `ModelError` unless the candidate's tokenizer splits each text as the base's does,
    and its embeddings have a row for each token."""
    from gptailor.evaluation.loading import load_tokenizer

    loaded = []
    for one in (candidate, base):
        try:
            loaded.append(load_tokenizer(one.folder))
        except ModelError as error:
            raise ModelError(
                f"{candidate.folder}: its tokenizer has other files than that of {base.folder}, "
                f"and gptailor can't tell whether they are the same: {error}"
            ) from error
    what = _difference(*loaded)
    if what:
        raise ModelError(
            f"{candidate.folder} has another vocabulary: its tokenizer differs from the base's "
            f"({base.folder}), {what}. Leave it out, make it the base, or resize its embeddings to "
            "the base's tokenizer first."
        )
    check_rows(candidate, base, 1 + max(loaded[1].get_vocab().values(), default=-1))


def _difference(mine: Any, bases: Any) -> str:
    """How the first tokenizer differs from the second; empty if it doesn't."""
    ids, base_ids = mine.get_vocab(), bases.get_vocab()
    for token in sorted({*ids, *base_ids}, key=lambda t: (base_ids.get(t, ids.get(t)), t)):
        if token not in base_ids:
            return f"which has no {shown(token)}"
        if token not in ids:
            return f"which has {shown(token)}, too"
        if ids[token] != base_ids[token]:
            return f"in which {shown(token)} is {base_ids[token]} and not {ids[token]}"
    added = [{t.content for t in one.added_tokens_decoder.values()} for one in (mine, bases)]
    for token in sorted(added[0] ^ added[1]):
        if any(len(one.encode(token, add_special_tokens=False)) != 1 for one in (mine, bases)):
            return f"where {shown(token)} is one token in one of them only"
    for text in TEXTS:
        pieces = [one.encode(text, add_special_tokens=False) for one in (mine, bases)]
        if pieces[0] != pieces[1]:
            return (
                f"which splits {shown(text)} differently; if the base's is right for it, remove "
                "its own tokenizer files"
            )
    return ""
