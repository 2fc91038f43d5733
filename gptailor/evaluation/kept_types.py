"""What transformers keeps in float32 though the model computes in a narrower type.

Architectures name a few of their parameters so: biases that choose experts, for example, or norms
where the type is float16. Which they are is found by loading the model once more, without memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gptailor.evaluation.loading import load_without_memory
from gptailor.models.checkpoint import TensorInfo


class KeptTypes:
    """Answers for one architecture, each found once.

    Args:
        shell: the model on the meta device.
        folder: for errors.
        tensors: of the files that count.
        module_names: tensor of the files → parameter or buffer of the model.
    """

    def __init__(
        self,
        shell: Any,
        folder: Path,
        tensors: Iterable[TensorInfo],
        module_names: Mapping[str, str | None],
    ) -> None:
        self._shell, self._folder = shell, folder
        self._tensors = [t for t in tensors if module_names.get(t.name)]
        self._module_names = module_names
        self.names = cache(self._names)
        """Type of the forward pass → names of the files' tensors that stay float32 in it."""

    def _names(self, dtype: torch.dtype) -> frozenset[str]:
        flags = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        if dtype is torch.float32 or not any(getattr(self._shell, flag, None) for flag in flags):
            return frozenset()
        tensors = [(t.name, t.dtype, t.shape) for t in self._tensors]
        model, _ = load_without_memory(self._shell, self._folder, tensors, dtype)
        found = {n for n, t in model.state_dict().items() if t.dtype is torch.float32}
        return frozenset(t.name for t in self._tensors if self._module_names[t.name] in found)
