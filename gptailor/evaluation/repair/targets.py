"""Teachers' hidden states: where a repaired model's residual stream shall be, at every depth.

Each group of calibration documents has a teacher, a model of full depth without a repair. Its
states are computed once and kept: in memory while they are small, else in a file without a name
that goes away with the process.

Shapes: B sequences, T tokens, N tokens that count, H hidden size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gptailor.errors import ResourceError, is_disk_full, size
from gptailor.evaluation.device_memory import available_bytes
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.repair.reading import Batch, Reading
from gptailor.evaluation.repair.replay import Arguments, trace
from gptailor.evaluation.resident import ResidentModel
from gptailor.recipe import Layer, Recipe, dense_recipe
from gptailor.recipe.repair import UNCUT


@dataclass(frozen=True)
class Lesson:
    """What one batch of documents teaches.

    Attributes:
        batch: its tokens.
        states: for each depth d from 0 to L, the teacher's state that enters source layer d, of the
            tokens that count; (N, H) each, in the dtype of the forward pass.
        arguments: what each source layer gets besides its input.
        share: of one token, so that each group counts as much as any other, however long it is.
    """

    batch: Batch
    states: Sequence[torch.Tensor]
    arguments: Sequence[Arguments]
    share: float = 1.0

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.states[0])

    def target(self, depth: int, device: torch.device) -> torch.Tensor:
        """The state at a depth, float32 on a device, (N, H)."""
        return self.states[depth].to(device).float()

    def counted(self, x_BTF: torch.Tensor) -> torch.Tensor:
        """The values of tokens that count, float32, (N, F)."""
        return x_BTF[self.batch.counts_BT.to(x_BTF.device)].float()

    def residual(self, output_BTH: torch.Tensor, depth: int) -> torch.Tensor:
        """What is missing from a student's state at a depth, float32, (N, H)."""
        return self.target(depth, output_BTH.device) - self.counted(output_BTH)

    def weights(self, depth: int, device: torch.device) -> torch.Tensor:
        """`share` / mean square of each token's state, (N,): a few tokens have enormous states,
        which would otherwise be all that counts."""
        return self.share / (self.target(depth, device).pow(2).mean(-1) + 1e-6)


def teachers_of(recipe: Recipe, groups: Sequence[str], num_layers: int) -> dict[str, Recipe]:
    """Group → its teacher as a recipe without cuts and repair.

    Args:
        recipe: the recipe to repair; its repair names teachers, not `BY_TASK`.
        groups: the groups of documents.
        num_layers: source layers of the family.
    """
    repair = recipe.repair
    assert repair is not None
    if repair.teachers == UNCUT:
        return dict.fromkeys(groups, uncut(recipe, num_layers))
    if isinstance(repair.teachers, str):
        named = dict.fromkeys(groups, repair.teachers)
    else:
        named = dict(repair.teachers)
    return {group: dense(recipe, named[group], num_layers) for group in groups}


def dense(recipe: Recipe, model: str, num_layers: int) -> Recipe:
    """One of a recipe's candidates, whole, as a recipe."""
    return dense_recipe(recipe.models, recipe.base, model, num_layers, recipe.dtype)


def uncut(recipe: Recipe, num_layers: int) -> Recipe:
    """The recipe with all source layers: one that it drops is made like the nearest one below."""
    kept = {layer.src_layer: layer for layer in recipe.layers}
    layers: list[Layer] = []
    latest: Layer = recipe.layers[0]
    for src_layer in range(num_layers):
        latest = kept.get(src_layer, latest)
        layers.append(replace(latest, src_layer=src_layer, scale=1.0))
    return replace(recipe, layers=tuple(layers), repair=None, _cache={})


class Teachers:
    """Computes and keeps lessons.

    Args:
        resident: assembles the teachers; stays assembled as the last one.
        lm: runs them.
    """

    def __init__(self, resident: ResidentModel, lm: ResidentLM) -> None:
        self._resident = resident
        self._lm = lm
        self._kept: dict[tuple[str, str, str], list[Lesson]] = {}

    def lessons(self, recipe: Recipe, reading: Reading) -> list[Lesson]:
        """One for each batch, in their order; those of teachers not seen before are computed.

        Raises:
            ResourceError: there is neither memory nor disk for the states.
            ModelError: the architecture can't be repaired.
        """
        found: list[Lesson] = []
        used = set()
        num_layers = self._resident.family.num_layers
        for group, whole in teachers_of(recipe, reading.groups, num_layers).items():
            key = whole.hash, reading.digest, group
            used.add(key)
            if key not in self._kept:
                self._forget_all_but(used, recipe)
                self._kept[key] = self._lessons(
                    whole, [b for b in reading.batches if b.group == group]
                )
            found += self._kept[key]
        return found

    def _forget_all_but(self, used: set[tuple[str, str, str]], recipe: Recipe) -> None:
        """Uncut merges are as many as recipes: theirs are only kept for one recipe."""
        if recipe.repair is not None and recipe.repair.teachers == UNCUT:
            self._kept = {key: kept for key, kept in self._kept.items() if key in used}

    @torch.no_grad()
    def _lessons(self, teacher: Recipe, batches: Sequence[Batch]) -> list[Lesson]:
        self._resident.assemble(teacher)
        layers = self._resident.layers()
        lessons = []
        num_tokens = [int(batch.counts_BT.sum()) for batch in batches]
        share = 1.0 / max(sum(num_tokens), 1)
        in_memory: bool | None = None
        for batch, count in zip(batches, num_tokens, strict=True):
            seen = trace(self._lm, layers, batch.input_BT)
            first = seen.states[0]
            shape = (len(seen.states), count, first.shape[-1])
            if in_memory is None:
                all_bytes = shape[0] * sum(num_tokens) * shape[2] * first.dtype.itemsize
                in_memory = all_bytes <= available_bytes() // 4
            kept = _room(shape, first.dtype, in_memory=in_memory)
            for depth, state in enumerate(seen.states):
                kept[depth] = state[batch.counts_BT.to(state.device)].cpu()
            if not bool(torch.isfinite(kept).all()):
                raise FloatingPointError(
                    f"the hidden states of the teacher ({', '.join(teacher.used_models)}) are not "
                    "finite numbers"
                )
            lessons.append(Lesson(batch, list(kept), seen.arguments, share))
        return lessons


def _room(shape: tuple[int, ...], dtype: torch.dtype, *, in_memory: bool) -> torch.Tensor:
    """An empty tensor in memory, or in a file without a name."""
    n_bytes = int(torch.Size(shape).numel()) * dtype.itemsize
    if in_memory:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            path = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(
                path, shared=True, size=n_bytes // dtype.itemsize, dtype=dtype
            ).view(shape)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise ResourceError(
            f"The teachers' states of a repair take {size(n_bytes)} for each batch, and neither "
            f"memory nor {tempfile.gettempdir()} has room for them: read fewer calibration "
            "documents, or set TMPDIR to a larger disk."
        ) from error
