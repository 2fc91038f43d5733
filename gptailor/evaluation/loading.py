"""The one place where transformers reads a model folder: no code of the folder runs, no pickle.

A folder can name Python files of its own (`auto_map`), kernels to download (`attn_implementation`)
or an adapter that stands for another model. None of it is followed. Sizes that the weights don't
have are found on torch's meta device, before any memory is taken for them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gptailor.errors import ModelError, ResourceError, plain
from gptailor.models.checkpoint import TensorInfo
from gptailor.models.untrusted import MAX_CONFIG_BYTES, is_file, read_json, shown

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32,
    "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64,
    "F64": torch.float64,
}  # fmt: skip
"""As safetensors names them."""

_FREE_ELEMENTS = 100_000_000
"""What a model may have beside its weights: buffers, parameters that are tied elsewhere."""


class UnknownModel(ModelError):
    """A model of a type that transformers does not have."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: transformers can't load it, or only by running code of the folder.
    """
    from transformers import AutoTokenizer

    with explained(f"The tokenizer of {folder} can't be loaded", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_model(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype | str,
    *,
    strict: bool = False,
) -> Any:
    """A causal language model on the CPU, of which every weight comes from its files.

    Args:
        folder: the model folder.
        tensors: its checkpoint's, already checked.
        dtype: of its parameters, or "auto".
        strict: every tensor of the files must have a place in the model, too.

    Raises:
        ModelError: transformers can't load it, only by running code of the folder, or would make
            up weights that the files lack.
        ResourceError: memory is exhausted.
    """
    from transformers import AutoModelForCausalLM

    config = load_shell(folder, tensors).config
    with explained(f"transformers can't load {folder}", folder), no_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are reported all the same
            output_loading_info=True,
        )
    check_loaded(as_names(info), folder, strict=strict)
    return model


def check_loaded(found: Mapping[str, Sequence[str]], where: object, *, strict: bool) -> None:
    """Raises a `ModelError` unless all parameters found their tensors, and the reverse if `strict`.

    Args:
        found: as `rehearse` gives it.
        where: the model, for the sentence.
        strict: no tensor may be left over.
    """
    if missing := found["missing_keys"]:
        raise ModelError(
            f"{where} lacks {some(missing)}, which transformers would make up at random: download "
            "the model again, or mend its config.json."
        )
    if wrong := found["mismatched_keys"]:
        raise ModelError(
            f"{where}: config.json needs another shape of {some(wrong)} than the weights have."
        )
    if strict and (left := found["unexpected_keys"]):
        raise ModelError(f"{where} has {some(left)}, which transformers would not use.")


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def build(config: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of a config, parameters on the meta device, buffers with their values.

    Args:
        config: what transformers made of a config.json whose sizes were checked (`load_shell`).
        folder: for errors.
        dtype: of its parameters, and of what it computes in that type; None for the config's.

    Raises:
        ModelError: transformers can't make it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    kwargs = {} if dtype is None else {"dtype": dtype}
    with (
        explained(f"transformers can't build {folder}", folder),
        quiet(),
        torch.random.fork_rng([]),
    ):
        config = copy.deepcopy(config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **kwargs)
        return model.eval()


def rehearse(
    shell: Any, folder: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]
) -> dict[str, list[str]]:
    """What transformers would say of loading these tensors, found by loading them without memory.

    Args:
        shell: the model on the meta device; it stays as it is.
        folder: for errors.
        tensors: name, dtype as safetensors names it, and shape of each.

    Returns:
        "missing_keys", which it would make up; "unexpected_keys", which it would leave out with a
        warning; "mismatched_keys", of another shape: names, sorted.

    Raises:
        ModelError: transformers can't put them together.
    """
    return as_names(load_without_memory(shell, folder, tensors)[1])


def load_without_memory(
    shell: Any,
    folder: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    dtype: torch.dtype | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device as transformers loads it in a type, and its loading info;
    arguments and errors as for `rehearse`."""
    weights = {
        name: torch.empty(shape, dtype=TORCH_DTYPES[kind], device="meta")
        for name, kind, shape in tensors
    }
    kwargs = {} if dtype is None else {"dtype": dtype}
    with explained(f"transformers can't load {folder}", folder), quiet(), no_bars():
        model, info = type(shell).from_pretrained(
            None,
            config=copy.deepcopy(shell.config),
            state_dict=weights,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    return model, info


def as_names(info: Mapping[str, Iterable[Any]]) -> dict[str, list[str]]:
    """transformers' loading info with names only."""
    return {
        key: sorted(item if isinstance(item, str) else str(item[0]) for item in info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def load_config(folder: Path) -> Any:
    """What transformers makes of a folder's config.json: defaults filled in, lists written out.

    Raises:
        UnknownModel: transformers has no model of this type.
        ModelError: it can't make anything of it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = _check_folder(folder).get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        raise UnknownModel(
            f"transformers can't load {folder}: this version of it does not know its architecture "
            f"({shown(model_type)}): install a newer one; if it needs Python code that comes with "
            "it, gptailor never runs such code."
        )
    with explained(f"transformers can't load {folder}", folder), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, *vars(config).values()):
        if hasattr(part, "quantization_config"):  # left over: quantized weights were refused
            del part.quantization_config
    return config


def load_shell(folder: Path, tensors: Mapping[str, TensorInfo] | None) -> Any:
    """The same model on torch's meta device: shapes without memory.

    Args:
        folder: the model folder.
        tensors: its checkpoint's; None where the config is our own.

    Raises:
        ModelError: transformers can't make it, or its sizes are not those of the weights.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with explained(f"transformers can't load {folder}", folder):
        with quiet(), torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if tensors is not None:
            _check_sizes(folder, shell, tensors)
        return shell


def _check_folder(folder: Path) -> dict[str, Any]:
    """The folder's config, which names no code."""
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
    return config


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
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging as their_logging

    had_bars = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            their_logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about a config, which it would say twice."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
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
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what}: {plain(reason)}") from error
