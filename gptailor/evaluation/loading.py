"""The one place where transformers reads a model folder: no code of the folder runs, no pickle.

A folder can name Python files of its own (`auto_map`), kernels to download (`attn_implementation`)
or an adapter that stands for another model. None of it is followed. Sizes that the weights don't
have are found on torch's meta device, before any memory is taken for them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptailor.errors import ModelError, ResourceError, plain
from gptailor.models.checkpoint import TensorInfo
from gptailor.models.untrusted import MAX_CONFIG_BYTES, is_file, read_json, shown

_FREE_ELEMENTS = 100_000_000
"""What a model may have beside its weights: buffers, parameters that are tied elsewhere."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: transformers can't load it, or only by running code of the folder.
    """
    from transformers import AutoTokenizer

    with _explained(f"The tokenizer of {folder} can't be loaded", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_model(folder: Path, tensors: Mapping[str, TensorInfo], dtype: torch.dtype | str) -> Any:
    """A causal language model on the CPU.

    Args:
        folder: the model folder.
        tensors: its checkpoint's, already checked.
        dtype: of its parameters, or "auto".

    Raises:
        ModelError: transformers can't load it, or only by running code of the folder.
        ResourceError: memory is exhausted.
    """
    from transformers import AutoModelForCausalLM

    load_shell(folder, tensors)
    with _explained(f"transformers can't load {folder}", folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, weights_only=True
        )


def load_config(folder: Path) -> Any:
    """What transformers makes of a folder's config.json: defaults filled in, lists written out.

    Raises:
        ModelError: transformers does not know it, or would run code of the folder.
    """
    from transformers import AutoConfig

    _check_folder(folder)
    with _explained(f"transformers can't load {folder}", folder), _quiet():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_shell(folder: Path, tensors: Mapping[str, TensorInfo]) -> Any:
    """The same model on torch's meta device: shapes without memory.

    Raises:
        ModelError: transformers can't make it, or its sizes are not those of the weights.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with _explained(f"transformers can't load {folder}", folder):
        with _quiet(), torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _check_sizes(folder, shell, tensors)
        return shell


def _check_folder(folder: Path) -> None:
    if is_file(folder / "adapter_config.json"):
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) beside the model, which transformers "
            "would apply: merge it with peft's merge_and_unload, or move the file away."
        )
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(part.get(key)):
                raise ModelError(
                    f"{folder}: config.json sets {key} to {shown(part[key])}, code from the hub, "
                    "which is never run: remove the key."
                )


def _check_sizes(folder: Path, shell: torch.nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """Compares what the config describes with what the weights are."""
    needed = sum(p.numel() for p in (*shell.parameters(), *shell.buffers()))
    there = sum(t.n_elements for t in tensors.values())
    for name, parameter in shell.named_parameters():
        if name in tensors and tuple(parameter.shape) != tensors[name].shape:
            raise ModelError(
                f"{folder}: config.json needs {name} of shape {shown(list(parameter.shape))}, but "
                f"the weights have {shown(list(tensors[name].shape))}."
            )
    if needed > 2 * there + _FREE_ELEMENTS:
        raise ModelError(
            f"{folder}: config.json describes a model of {needed:,} elements, but the weights have "
            f"{there:,}."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says about a config, which it would say twice."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(what: str, folder: Path) -> Iterator[None]:
    """Whatever transformers and tokenizers raise because of a folder's files is a `ModelError`."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"{folder} does not fit into memory.") from error
    except BaseException as error:
        # a panic of the tokenizers' Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{what}: it needs Python code that comes with it, and gptailor never runs such "
                "code: use a version of the model that transformers knows by itself."
            ) from error
        if "does not recognize this architecture" in text:
            raise ModelError(
                f"{what}: this version of transformers does not know its architecture: install a "
                "newer one; if it needs Python code that comes with it, gptailor never runs such "
                "code."
            ) from error
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what}: {plain(reason)}") from error
