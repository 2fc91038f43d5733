"""Runs one model of a family on a text and writes its statistics to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptailor.errors import GptailorError, ModelError, ResourceError
from gptailor.evaluation.casting import as_bytes, check_range
from gptailor.evaluation.device_memory import available_bytes
from gptailor.evaluation.devices import is_out_of_memory, pick_device
from gptailor.evaluation.loading import load_model, load_tokenizer
from gptailor.evaluation.statistics import fisher_information, gram_matrices
from gptailor.evaluation.structure import module_names
from gptailor.evaluation.text import Sequences, make_sequences, read_documents
from gptailor.merging.registry import get_method
from gptailor.models.architecture import text_config
from gptailor.models.calibration import SCHEMA, statistics_path, weights_digest, writing
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import FLOAT_DTYPES
from gptailor.patience import Say, slowly


def read_sequences(
    path: str | Path, base: Candidate, *, num_tokens: int, seq_len: int
) -> Sequences:
    """The sequences of a text in the base's tokens; none is longer than the model's context.

    Raises:
        UsageError: the text is missing or empty.
        ModelError: the base's tokenizer can't be loaded.
    """
    documents = read_documents(path)
    tokenizer = load_tokenizer(base.folder)
    longest = text_config(base.config).get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:
        seq_len = min(seq_len, longest)

    def encode(document: str) -> list[int]:
        tokens: list[int] = tokenizer(document, verbose=False).input_ids  # we cut long ones later
        return tokens

    return make_sequences(documents, encode, num_tokens, seq_len)


def calibrate_model(
    candidate: Candidate,
    method: str,
    sequences: Sequences,
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    note: Say = lambda text: None,
) -> Path:
    """Runs a model on sequences and writes its statistics; returns the file.

    Fisher information is written relative to its mean over all elements, so that all models count
    equally and `floor` means the same for each. It is bfloat16, which has the range of float32 and
    more precision than such a weight needs. Gram matrices are float32, because linear systems are
    solved with them.

    Args:
        candidate: the model.
        method: one of `merging.registry.CALIBRATED`.
        sequences: what the model reads.
        folder: where the file goes.
        device: "auto", "cpu", "cuda", "cuda:1".
        dtype: of the model during the forward passes: a key of `DTYPES`.
        seed: for the tokens that are drawn for fisher.
        note: called with the progress if it takes long.

    Raises:
        ModelError: transformers can't load the model or stores its tensors under other names, the
            model computes numbers that are not finite, or a weight is too large for `dtype`.
        ResourceError: the model does not fit into memory, or the disk is full.
        UsageError: the device does not exist.
    """
    path = statistics_path(folder, method, candidate.name)
    metadata = {
        "schema": SCHEMA,
        "method": method,
        "weights": weights_digest(candidate.tensors),
        "text": sequences.digest,
        "tokens": str(sequences.num_tokens),
        "sequences": str(len(sequences.tokens)),
        "dtype": dtype,
    }
    num_read = 0

    def count(*_: object) -> None:
        nonlocal num_read
        num_read += 1

    def how_far() -> str:  # exceeds the total where matrices don't fit together: several passes
        return f"{num_read} of {len(sequences.tokens)} sequences"

    try:
        with slowly(f"Loading {candidate.name}", note):
            model = _load(candidate, dtype)
            known = _known(model, candidate)
            _check_numbers(known, candidate)
            model.to(pick_device(device))
        model.register_forward_hook(count)
        with slowly(f"Calibrating {candidate.name} for {method}", note, how_far):
            if get_method(method).statistics == "elements":
                metadata["seed"] = str(seed)
                _write_fisher(path, metadata, model, known, sequences, seed)
            else:
                _write_regmean(path, metadata, model, known, sequences)
    except FloatingPointError as error:
        raise ModelError(f"{candidate.folder} can't be calibrated: {error}.") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or isinstance(error, GptailorError):
            raise
        raise ResourceError(
            f"{candidate.folder} does not fit into memory for calibration: use --dtype bfloat16, "
            "a smaller --seq-len, or another --device."
        ) from error
    return path


def _load(candidate: Candidate, dtype: str) -> Any:
    tensors = candidate.checkpoint.tensors
    return load_model(candidate.folder, tensors, getattr(torch, dtype)).eval()


def _known(model: Any, candidate: Candidate) -> dict[str, torch.Tensor]:
    """Name in the files → parameter or buffer, for all tensors that can be merged."""
    state: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    names, _ = module_names(model, candidate.tensors)
    known = {}
    for name, info in candidate.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            continue
        found = state.get(names[name] or "")
        if found is None or tuple(found.shape) != info.shape:
            raise ModelError(
                f"{candidate.folder}: transformers has no parameter of the shape "
                f"{list(info.shape)} for {name}; this architecture is not supported yet."
            )
        known[name] = found
    return known


def _check_numbers(known: Mapping[str, torch.Tensor], candidate: Candidate) -> None:
    """Raises a `ModelError` if a number is finite in the file but infinite in float16."""
    for name, loaded in known.items():
        info = candidate.tensors[name]
        if loaded.dtype is torch.float16 and info.dtype != "F16" and loaded.isinf().any():
            exact = torch.utils.dlpack.from_dlpack(candidate.checkpoint.tensor(name))
            check_range(exact, loaded, f"{info.path}: {name}")


def _write_fisher(
    path: Path,
    metadata: dict[str, str],
    model: nn.Module,
    known: Mapping[str, torch.Tensor],
    sequences: Sequences,
    seed: int,
) -> None:
    # tied parameters have one name here, and all of their names in the file
    names = {id(t): name for name, t in known.items() if isinstance(t, nn.Parameter)}
    parameters = {name: known[name] for name in names.values()}
    fisher = fisher_information(model, sequences.tokens, parameters, seed)  # type: ignore[arg-type]
    total = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())
    mean = total / sum(f.numel() for f in fisher.values())
    if mean == 0.0:
        raise FloatingPointError("all its gradients are zero")
    metadata["mean"] = f"{mean:.9g}"
    shapes = {name: ("BF16", tuple(t.shape)) for name, t in known.items()}
    with writing(path, metadata, shapes) as file:
        for name, tensor in known.items():
            if id(tensor) in names:
                file.write(name, as_bytes((fisher[names[id(tensor)]] / mean).bfloat16()))


def _write_regmean(
    path: Path,
    metadata: dict[str, str],
    model: nn.Module,
    known: Mapping[str, torch.Tensor],
    sequences: Sequences,
) -> None:
    names = {id(t): name for name, t in known.items()}
    linears = {
        names[id(module.weight)]: module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in names
        and names[id(module.weight)].endswith(".weight")
    }
    embedded = model.get_input_embeddings().weight  # type: ignore[operator]
    linears = {n: m for n, m in linears.items() if m.weight is not embedded}
    if not linears:
        raise ModelError(
            f"{path.name}: the model has no linear layers, so regmean would be a plain average."
        )
    shapes = {name: ("F32", (m.in_features,) * 2) for name, m in linears.items()}
    budget = available_bytes() // 2
    device = next(model.parameters()).device
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 2
    with writing(path, metadata, shapes) as file:
        for name, gram_II in gram_matrices(model, sequences.tokens, linears, budget):
            file.write(name, as_bytes(gram_II))
