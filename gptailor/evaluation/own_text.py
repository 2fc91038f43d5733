"""Text that a model writes itself: what it reads when nobody gives it a text.

A model's own text is language as it knows it, so it stands in for the data that it was trained on
(Liu et al. 2023, LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import torch

from gptailor.errors import GptailorError, ModelError, ResourceError
from gptailor.evaluation.devices import is_out_of_memory
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.loading import load_tokenizer
from gptailor.evaluation.resident import ResidentModel
from gptailor.evaluation.surroundings import seeded
from gptailor.models.family import Family
from gptailor.recipe import Recipe

LENGTH = 128
"""Tokens of a piece, the one that it starts with included."""

_ROWS = 64


def write_own_text(
    writer: Recipe, family: Family, num_pieces: int, *, dtype: str, device: str
) -> list[str]:
    """Pieces of `LENGTH` tokens, sampled at temperature 1, each from nothing.

    The same machine with the same number of threads gives the same pieces.

    Args:
        writer: the recipe of the model that writes.
        family: its candidates.
        num_pieces: how many; those without any visible character are left out.
        dtype: of the forward passes.
        device: as in `search.yaml`.

    Raises:
        ModelError: the model can't be loaded, or can't write.
        ResourceError: memory is exhausted.
    """
    from transformers import GenerationConfig

    try:
        resident = ResidentModel(family, dtype=dtype, device=device)
        lm = ResidentLM(resident.model, load_tokenizer(family.base.folder), _ROWS)
        lm.check_tokenizer(has_chat=False)
        resident.assemble(writer)
        num_new = min(LENGTH, int(lm.max_length)) - 1
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=num_new,
            min_new_tokens=num_new,  # an end would only make a shorter piece
            pad_token_id=lm.prefix_token_id,
        )
        pieces: list[str] = []
        with seeded(), torch.inference_mode():
            for begin in range(0, num_pieces, _ROWS):
                shape = min(_ROWS, num_pieces - begin), 1
                first_B1 = torch.full(shape, lm.prefix_token_id, device=resident.device)
                seen_B1 = torch.ones_like(first_B1)
                written = resident.model.generate(
                    first_B1, attention_mask=seen_B1, generation_config=settings
                )
                pieces += lm.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
    except GptailorError:
        raise
    except Exception as error:  # transformers refuses to generate in many ways
        if is_out_of_memory(error):
            raise ResourceError(
                "Out of memory while a model wrote a text for the repair: name a text "
                "(space.repair.calibration.text)."
            ) from error
        raise ModelError(f"The model can't write a text for the repair: {error}") from error
    pieces = [piece for piece in pieces if piece.strip()]
    if not pieces:
        raise ModelError("The model writes nothing that could be read: name a text for the repair.")
    return pieces
