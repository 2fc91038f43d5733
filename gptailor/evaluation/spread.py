"""Places source layers on a worker's GPUs when a model does not fit on one.

A source layer is on the same GPU for all candidates, so a taken or merged layer never has to move:
only hidden states do, once at each boundary. Embeddings, final norm and output head are all on the
first GPU. The head could follow the last layer, but a search compares logits with tokens that are
on the first GPU. This way only hidden states return there, which are much smaller than logits, and
tied embeddings need no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from gptailor.errors import ResourceError


def place_layers(
    layer_bytes: Sequence[int], outside_bytes: int, free_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Spreads source layers over GPUs so that the fullest GPU is as empty as possible.

    Args:
        layer_bytes: what each source layer needs, bottom to top.
        outside_bytes: what embeddings, final norm and head need; they are on the first GPU.
        free_bytes: what each GPU can hold of them.

    Returns:
        The index of each source layer's GPU, never less than that of the layer below. If GPUs are
        left empty, they are the last ones.

    Raises:
        ResourceError: the model does not fit.
    """
    num_layers = len(layer_bytes)
    ends = [0, *accumulate(layer_bytes)]

    def fill(gpu: int, begin: int, end: int) -> float:
        needed = ends[end] - ends[begin] + (outside_bytes if gpu == 0 else 0)
        if needed == 0:
            return 0.0
        return needed / free_bytes[gpu] if free_bytes[gpu] > 0 else math.inf

    # best[end]: (how full the fullest GPU is, where each GPU's layers end) of the layers below end
    best: list[tuple[float, tuple[int, ...]]]
    best = [(fill(0, 0, end), (end,)) for end in range(num_layers + 1)]
    for gpu in range(1, len(free_bytes)):
        best = [
            min(
                (
                    (max(best[begin][0], fill(gpu, begin, end)), (*best[begin][1], end))
                    for begin in range(end + 1)
                ),
                key=lambda found: (found[0], [-at for at in found[1]]),
            )
            for end in range(num_layers + 1)
        ]
    fullest, borders = best[num_layers]
    if fullest > 1.0:
        needed = ends[-1] + outside_bytes
        raise ResourceError(
            f"The model needs {gib(needed)} GiB, but the worker's {len(free_bytes)} GPUs have "
            f"{' + '.join(map(gib, free_bytes))} GiB for it, and a layer can't be split: give each "
            "worker more GPUs."
        )
    return tuple(
        gpu
        for gpu, (begin, end) in enumerate(zip((0, *borders), borders, strict=False))
        for _ in range(begin, end)
    )


def layer_ranges(placement: Sequence[int]) -> dict[int, range]:
    """GPU → its source layers, from a placement."""
    return {
        gpu: range(placement.index(gpu), placement.index(gpu) + placement.count(gpu))
        for gpu in dict.fromkeys(placement)
    }


def gib(n_bytes: float) -> str:
    """A number of bytes in GiB, for messages."""
    return f"{n_bytes / 2**30:.1f}"
