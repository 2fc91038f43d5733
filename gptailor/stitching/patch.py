"""A patch: some tensors of a stitched model, computed before it is written, in a file of their own.

A repair needs forward passes, which the stitcher does not do. So whoever computed it hands over its
weights as a small safetensors file, and the writer copies them like any other source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptailor.errors import ModelError
from gptailor.models.calibration import read_metadata
from gptailor.models.checkpoint import TensorInfo, read_header

SCHEMA = "gptailor/repair/1"


@dataclass(frozen=True)
class Patch:
    """The tensors of a patch.

    Attributes:
        path: the file.
        recipe: the hash of the recipe that they belong to.
        tensors: name in the result → where its bytes are.
        notes: Markdown for the model card.
    """

    path: Path
    recipe: str
    tensors: dict[str, TensorInfo]
    notes: str = ""


def read_patch(path: Path) -> Patch:
    """Reads the header of a patch.

    Raises:
        ModelError: the file is not a patch, or is corrupt.
    """
    tensors = read_header(path)
    metadata = read_metadata(path)
    if metadata.get("schema") != SCHEMA:
        raise ModelError(f"{path} holds no repair: remove it, and it is computed again.")
    return Patch(path, metadata.get("recipe", ""), tensors, metadata.get("notes", ""))
