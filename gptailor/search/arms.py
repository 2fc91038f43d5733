"""The control arms: prunings that need no search, and that the search starts from.

- `dense:MODEL`: an unchanged candidate.
- `refit:1`: the merge of all variants, refitted, if the search made one; a candidate for all other
  arms except `uniform` and `paper`.
- `block_influence:SIZE@MODEL`: layers with the least Block Influence are dropped (Men et al. 2024,
  ShortGPT, arXiv 2403.03853).
- `angular:SIZE@MODEL`: the contiguous block with the least angular distance is dropped (Gromov et
  al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887).
- `uniform:SIZE`: all candidates averaged with equal weights, then cut by mean Block Influence.
- `paper:SIZE`: what the paper's search starts from: random layers between 45 and 97 % of the
  depth are dropped, the others merge all variants by task arithmetic with λ = 1 / their number
  (GPTailor, arXiv 2506.20480, and the configurations published with it).
- `random:SIZE@MODEL`: random layers of one random candidate are dropped.

`+repair` behind a name: the same arm, repaired like the search's recipes (`evaluation/repair`);
`+repair(384)`: with a repair that read 384 documents, as those of the front.

SIZE is the fraction of layers that is kept. If candidates differ in their embeddings, final norm or
head, an arm takes those of MODEL, or merges them like its layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gptailor.config import REFIT
from gptailor.evaluation.similarity import Similarity
from gptailor.merging.registry import LINEAR, TASK_ARITHMETIC
from gptailor.recipe import NO_LAYER, End, Merge, Recipe, Take
from gptailor.search.space import SearchSpace, is_gene

NEEDS_SIMILARITY = ("block_influence", "angular", "uniform")
"""Arms that need measured similarities of the layers."""


def control_arms(
    space: SearchSpace,
    arms: Sequence[str],
    sizes: Sequence[float],
    similarities: Mapping[str, Similarity],
    seed: int,
) -> list[tuple[str, Recipe]]:
    """Returns (name, recipe) of the control arms, in the order in which they are evaluated.

    Args:
        space: bounds the sizes and says which layers are protected.
        arms: which kinds, from `config.ARMS`.
        sizes: fractions of the layers to keep, for example 0.75.
        similarities: model → its layers' similarities, for `block_influence`, `angular`, `uniform`.
        seed: of the random arm.
    """
    found: list[tuple[str, Recipe]] = []
    for model in space.names:  # always: everything else is compared with them
        arm = f"{REFIT}:1" if model == REFIT else f"dense:{model}"
        found.append((arm, _taken(space, model, range(space.num_layers))))
    if "uniform" in arms and len(space.names) > 1:
        found.append(("uniform:1", _averaged(space, range(space.num_layers))))
    for size in sorted(set(sizes), reverse=True):
        keep = round(size * space.num_layers)
        if not space.min_layers <= keep <= min(space.max_layers, space.num_layers - 1):
            continue
        rng = np.random.default_rng([seed, 1, keep])
        for model, similarity in similarities.items():
            if "block_influence" in arms:
                kept = keep_by_influence(space, np.array(similarity.block_influence), keep)
                found.append((f"block_influence:{size:g}@{model}", _taken(space, model, kept)))
            if "angular" in arms:
                kept = keep_by_angle(space, np.array(similarity.angular), keep)
                found.append((f"angular:{size:g}@{model}", _taken(space, model, kept)))
        if "uniform" in arms and len(space.names) > 1:
            influence = np.mean([s.block_influence for s in similarities.values()], axis=0)
            kept = keep_by_influence(space, influence, keep)
            found.append((f"uniform:{size:g}", _averaged(space, kept)))
        if "paper" in arms and len(space.names) > 1:
            found.append(
                (f"paper:{size:g}", _paper(space, keep, np.random.default_rng([seed, 2, keep])))
            )
        if "random" in arms:
            model = space.names[int(rng.integers(len(space.names)))]
            kept = _random_kept(space, keep, rng)
            found.append((f"random:{size:g}@{model}", _taken(space, model, kept)))
    return found


def keep_by_influence(
    space: SearchSpace, influence: npt.NDArray[np.float64], keep: int
) -> npt.NDArray[np.int64]:
    """The `keep` layers with the most Block Influence, ascending; ties keep the lower layer."""
    order = sorted(
        range(space.num_layers), key=lambda i: (i not in space.protected, -influence[i], i)
    )
    return np.sort(np.array(order[:keep], dtype=np.int64))


def keep_by_angle(
    space: SearchSpace, angular: npt.NDArray[np.float64], keep: int
) -> npt.NDArray[np.int64]:
    """All layers but the contiguous block whose input and output are closest, ascending."""
    size = space.num_layers - keep
    protected = set(space.protected)
    begins = [begin for begin in range(keep + 1) if not protected & set(range(begin, begin + size))]
    if not begins:  # no block is free: drop the layers that change least, wherever they are
        return keep_by_influence(space, np.diag(angular, 1), keep)
    begin = min(begins, key=lambda b: (angular[b, b + size], b))
    return np.array([i for i in range(space.num_layers) if not begin <= i < begin + size])


def _random_kept(space: SearchSpace, keep: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    free = np.setdiff1d(np.arange(space.num_layers), space.protected)
    gone = rng.choice(free, min(space.num_layers - keep, len(free)), replace=False)
    return np.setdiff1d(np.arange(space.num_layers), gone)


def _paper(space: SearchSpace, keep: int, rng: np.random.Generator) -> Recipe:
    num_layers, num_gone = space.num_layers, space.num_layers - keep
    deep = np.arange(int(0.45 * num_layers), max(round(0.97 * num_layers), 1))
    free = np.setdiff1d(deep, space.protected)
    if len(free) < num_gone:
        free = np.setdiff1d(np.arange(num_layers), space.protected)
    gone = rng.choice(free, min(num_gone, len(free)), replace=False)
    variants = [name for name in space.names if name not in (space.base, REFIT)]
    weights = tuple((name, round(1 / len(variants), 6)) for name in variants)
    values = (("lambda", 1.0), ("normalize", 0.0))
    kept = np.setdiff1d(np.arange(num_layers), gone)
    # in the paper, embeddings follow the lowest kept layer, final norm and head the highest
    return _merged(space, Merge(TASK_ARITHMETIC.name, NO_LAYER, weights, values), kept)


def _taken(space: SearchSpace, model: str, kept: Sequence[int] | npt.NDArray[np.int64]) -> Recipe:
    layers = [Take(model, int(i)) for i in kept]
    return space.recipe(layers, space.ends.embeddings[model], space.ends.head[model])


def _averaged(space: SearchSpace, kept: Sequence[int] | npt.NDArray[np.int64]) -> Recipe:
    weights = tuple((name, 1.0) for name in space.names if name != REFIT)
    return _merged(space, Merge(LINEAR.name, NO_LAYER, weights, (("normalize", 1.0),)), kept)


def _merged(
    space: SearchSpace, merge: Merge, kept: Sequence[int] | npt.NDArray[np.int64]
) -> Recipe:
    """Merges every kept layer this way, and each end at which candidates differ."""
    layers = [replace(merge, src_layer=int(i)) for i in kept]
    ends = [_merged_end(space, merge, end) for end in (space.ends.embeddings, space.ends.head)]
    return space.recipe(layers, *ends)


def _merged_end(space: SearchSpace, merge: Merge, stand_ins: Mapping[str, str]) -> End:
    if not is_gene(stand_ins):
        return space.base
    weights: dict[str, float] = defaultdict(float)
    for model, weight in merge.weights:
        weights[stand_ins[model]] += weight
    if merge.takes_base:
        weights.pop(space.base, None)  # its difference from itself is zero
    return replace(merge, weights=tuple(weights.items()))
