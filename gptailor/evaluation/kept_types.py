"""Finds the parameters that transformers keeps in float32 in a model of a narrower dtype.

Architectures declare a few such parameters: for example biases that choose experts, or norms where
the dtype is float16. They are found by loading the model again without memory.
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
    """The kept parameters of one architecture, found once per dtype.

    Args:
        shell: the model on the meta device.
        folder: for errors.
        tensors: the tensors of the files.
        module_names: tensor in the files → parameter or buffer of the model.
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
        """Dtype of the forward pass → names of the files' tensors that stay float32 in it."""

    def _names(self, dtype: torch.dtype) -> frozenset[str]:
        flags = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        if dtype is torch.float32 or not any(getattr(self._shell, flag, None) for flag in flags):
            return frozenset()
        tensors = [(t.name, t.dtype, t.shape) for t in self._tensors]
        model, _ = load_without_memory(self._shell, self._folder, tensors, dtype)
        found = {n for n, t in model.state_dict().items() if t.dtype is torch.float32}
        return frozenset(t.name for t in self._tensors if self._module_names[t.name] in found)
