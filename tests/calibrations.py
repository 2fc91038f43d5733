"""Made-up statistics for tests that need some: written directly, without running a model."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptailor.models.calibration import SCHEMA, weights_digest
from gptailor.models.checkpoint import Checkpoint
from tests.models.tiny import Array, Entry, encoded, file_bytes, load_model


def drawn_statistics(method: str, model: str, tensors: Mapping[str, Entry]) -> dict[str, Array]:
    """Fisher information over a wide range, or Gram matrices of correlated inputs."""
    result = {}
    for name, (_, shape, _) in tensors.items():
        rng = np.random.default_rng(zlib.crc32(f"{method}/{model}/{name}".encode()))
        if method == "fisher":
            result[name] = np.exp(2 * rng.standard_normal(shape)) * (rng.random(shape) < 0.9)
        elif len(shape) == 2 and "embed" not in name:
            inputs = rng.standard_normal((4 * shape[1], shape[1])) + rng.standard_normal(shape[1])
            result[name] = inputs.T @ inputs / len(inputs)
    return result


def save_statistics(
    folder: Path,
    method: str,
    models: Mapping[str, str],
    *,
    dtype: str = "F32",
    changes: Mapping[str, Array | None] | None = None,
    **metadata: str,
) -> Path:
    """Writes NAME.METHOD.safetensors for each model; `changes` replaces tensors, None drops one."""
    folder.mkdir(exist_ok=True)
    for model, place in models.items():
        values: dict[str, Any] = drawn_statistics(method, model, load_model(Path(place)))
        values |= changes or {}
        known = {
            "schema": SCHEMA,
            "method": method,
            "weights": weights_digest(Checkpoint(place).tensors),
        }
        header: dict[str, Any] = {"__metadata__": known | metadata}
        data = b""
        for name, value in values.items():
            if value is not None:
                raw = encoded(value, dtype)
                offsets = [len(data), len(data) + len(raw)]
                header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
                data += raw
        (folder / f"{model}.{method}.safetensors").write_bytes(file_bytes(header, data))
    return folder
