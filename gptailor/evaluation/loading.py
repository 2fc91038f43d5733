"""The only place where transformers reads a model folder: runs none of its code, loads no pickle.

A folder can name Python files of its own (`auto_map`), kernels to download (`attn_implementation`)
or an adapter for another model. None of these is followed. Sizes that don't match the weights are
found on torch's meta device, before any memory is allocated for them.
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
"""safetensors' dtype names → torch dtypes."""

_FREE_ELEMENTS = 100_000_000
"""Elements that a model may have besides its weights: buffers and tied parameters."""


class UnknownModel(ModelError):
    """A model of a type that transformers does not have."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: transformers can't load it without running code of the folder.
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
    """Loads a causal language model onto the CPU, with every weight taken from its files.

    Args:
        folder: the model folder.
        tensors: the tensors of its checkpoint, already checked.
        dtype: of its parameters, or "auto".
        strict: the model must also use every tensor of the files.

    Raises:
        ModelError: transformers can't load it without running code of the folder, or would
            randomly initialize weights that the files lack.
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
            ignore_mismatched_sizes=True,  # they are still reported
            output_loading_info=True,
        )
    check_loaded(as_names(info), folder, strict=strict)
    return model


def check_loaded(found: Mapping[str, Sequence[str]], where: object, *, strict: bool) -> None:
    """Raises a `ModelError` unless all parameters found their tensors, and the reverse if `strict`.

    Args:
        found: as `rehearse` returns it.
        where: the model, for the message.
        strict: no tensor may be left over.
    """
    if missing := found["missing_keys"]:
        raise ModelError(
            f"{where} lacks {some(missing)}, which transformers would initialize at random: "
            "download the model again, or fix its config.json."
        )
    if wrong := found["mismatched_keys"]:
        raise ModelError(
            f"{where}: config.json needs a different shape for {some(wrong)} than the weights have."
        )
    if strict and (left := found["unexpected_keys"]):
        raise ModelError(f"{where} has {some(left)}, which transformers would not use.")


def some(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def build(config: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Builds the model of a config with parameters on the meta device and buffers with values.

    Args:
        config: transformers' config, of a config.json whose sizes were checked (`load_shell`).
        folder: for errors.
        dtype: of the parameters and the constants computed in that dtype; None for the config's.

    Raises:
        ModelError: transformers can't build it.
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
    """What transformers would report about loading these tensors, found without using memory.

    Args:
        shell: the model on the meta device; it is not changed.
        folder: for errors.
        tensors: name, dtype as safetensors names it, and shape of each.

    Returns:
        Sorted names: "missing_keys", which it would initialize at random; "unexpected_keys", which
        it would leave out with a warning; "mismatched_keys", whose shapes differ.

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
    """The model on the meta device as transformers loads it in a dtype, and the loading info;
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
    """transformers' loading info, reduced to names."""
    return {
        key: sorted(item if isinstance(item, str) else str(item[0]) for item in info[key])
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }


def load_config(folder: Path) -> Any:
    """What transformers makes of a folder's config.json: defaults filled in, lists written out.

    Raises:
        UnknownModel: transformers has no model of this type.
        ModelError: transformers can't parse it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = _check_folder(folder).get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        raise UnknownModel(
            f"transformers can't load {folder}: this version does not know its architecture "
            f"({shown(model_type)}): install a newer version of transformers; if the model needs "
            "Python code that comes with it, gptailor never runs such code."
        )
    with explained(f"transformers can't load {folder}", folder), quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, *vars(config).values()):
        if hasattr(part, "quantization_config"):  # a leftover: quantized weights were refused
            del part.quantization_config
    return config


def load_shell(folder: Path, tensors: Mapping[str, TensorInfo] | None) -> Any:
    """Loads the model of a folder on torch's meta device: shapes without memory.

    Args:
        folder: the model folder.
        tensors: the tensors of its checkpoint; None if the config is gptailor's own.

    Raises:
        ModelError: transformers can't build it, or its sizes don't match the weights.
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
    """The folder's config, checked to name no code."""
    if is_file(folder / "adapter_config.json"):
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json) in addition to the model, which "
            "transformers would apply: merge it with peft's merge_and_unload, or remove the file."
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
    """Compares the sizes in the config with those of the weights."""
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
    """Hides transformers' progress bars."""
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
    """Silences transformers' messages about a config, which would otherwise appear twice."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def explained(what: str, folder: Path) -> Iterator[None]:
    """Turns what transformers and tokenizers raise because of a folder into a `ModelError`."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"{folder} does not fit into memory.") from error
    except BaseException as error:
        # a panic of the tokenizers' Rust code is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{what}: it needs Python code that comes with it, and gptailor never runs such "
                "code: use a version of the model that transformers supports without it."
            ) from error
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what}: {plain(reason)}") from error
