"""Checks whether two configs make the same model of the same weights, as transformers reads them.

Equal names and shapes are not enough: a different rope, epsilon or activation turns the same
weights into a different model. Conversely, two configs can say the same thing differently, since
each version of transformers writes them in its own way. So the configs are compared field by field
after transformers has parsed them; where the files already agree, transformers is not imported.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptailor.errors import ModelError
from gptailor.models.candidate import Candidate
from gptailor.models.config_fields import (
    ABSENT,
    NAMES,
    POSITIONS,
    SPELLED_OUT,
    Difference,
    differences,
    is_harmless,
)
from gptailor.models.untrusted import shown

_SHARED_SOURCES = ("cache_utils.py", "masking_utils.py", "modeling_rope_utils.py")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_BY_POSITIONS = {"default": False, "linear": False, "llama3": False, "proportional": False}
"""Rope type → whether the number of positions changes it; see also `_rope_needs_positions`."""
_UNTOLD = (*NAMES, "tie_word_embeddings", "type")
"""Fields whose differences have no effect and are not reported; `type` is rope's older spelling."""
_MOST_SHOWN = 3


def compare_configs(candidate: Candidate, base: Candidate) -> list[Difference]:
    """The differences without effect between two configs, as transformers reads them.

    Raises:
        ModelError: a difference changes what the layers compute, or transformers can't load one of
            the configs.
    """
    found = list(_differences(candidate, base))
    harmful = [difference for difference, is_note in found if not is_note]
    if harmful:
        raise differs(candidate, base, harmful)
    return [difference for difference, _ in found]


def differs(candidate: Candidate, base: Candidate, harmful: list[Difference]) -> ModelError:
    """The error for differences that change what the same tensors compute."""
    texts = [str(difference) for difference in harmful[:_MOST_SHOWN]]
    more = len(harmful) - _MOST_SHOWN
    texts += [f"{more} more"] if more > 0 else []
    named = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return ModelError(
        f"{candidate.folder}: config.json has {named}, so the same tensors would compute something "
        f"different than with {base.folder}: leave it out."
    )


def _differences(candidate: Candidate, base: Candidate) -> Iterator[tuple[Difference, bool]]:
    """Each difference, and whether it is without effect."""
    from gptailor.evaluation.loading import load_config

    configs = []
    for one in (candidate, base):
        try:
            configs.append(load_config(one.folder))
        except ModelError as error:
            raise ModelError(
                f"{candidate.folder}: config.json differs from that of {base.folder}, and gptailor "
                f"can't tell whether that matters: {error}"
            ) from error
    yield from _compared("", *configs)


def _compared(path: str, config: Any, base: Any) -> Iterator[tuple[Difference, bool]]:
    """`_differences` for two transformers configs and the configs nested in them."""
    kinds = [getattr(one, "model_type", "") for one in (config, base)]
    if type(config) is not type(base) or kinds[0] != kinds[1]:
        yield Difference(f"{path}model_type", *kinds), False
        return
    parts = [one.to_dict() for one in (config, base)]
    own = [vars(one) for one in (config, base)]
    inner = [k for k in own[0] if _is_config(own[0][k]) and _is_config(own[1].get(k))]
    for key in inner:
        yield from _compared(f"{path}{key}.", own[0][key], own[1][key])
    texts = [{k: v for k, v in part.items() if k not in inner} for part in parts]
    for difference in differences(*texts):
        key = re.split(r"[.\[]", difference.key)[0]
        is_note = (
            is_harmless(difference)
            or (difference.value in (None, ABSENT) and difference.base_value in (None, ABSENT))
            or (key == "pad_token_id" and not _moves_positions(config))
            or _is_spelled_out(difference, parts)
            or (key in POSITIONS and not any(_rope_needs_positions(part) for part in parts))
            or not _is_known(config, key)
        )
        yield difference._replace(key=path + difference.key), is_note


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _is_spelled_out(difference: Difference, parts: list[dict[str, Any]]) -> bool:
    """Whether a difference only spells out a rule that both configs resolve alike."""
    key = re.split(r"[.\[]", difference.key)[0]
    if key in SPELLED_OUT:
        lists = [part.get(SPELLED_OUT[key]) for part in parts]
        return isinstance(lists[0], list) and lists[0] == lists[1]
    kinds = [part.get("layer_types") or [] for part in parts]
    are_full = all(kind == "full_attention" for some in kinds for kind in some)
    if key in _WINDOWS:  # no layer uses the window
        return are_full and all(kinds)
    if key == "layer_types":  # the list states the default
        return are_full and not any(part.get(window) for part in parts for window in _WINDOWS)
    # the older spelling, kept next to rope_type
    return key == "rope_parameters" and difference.key.endswith(".type")


def _rope_needs_positions(part: Mapping[str, Any]) -> bool:
    """Whether a config's rope depends on the number of positions the model was made for."""
    rope = part.get("rope_parameters") or {}
    nested = [one for one in rope.values() if isinstance(one, dict)]
    for one in nested or [rope]:
        kind = one.get("rope_type") or "default"
        if kind in ("yarn", "longrope"):  # an absent factor means the ratio of two lengths
            if one.get("factor") is None:
                return True
        elif _BY_POSITIONS.get(kind, True):
            return True
    return False


def _is_known(config: Any, key: str) -> bool:
    """Whether the config's class declares the field, or code that runs the model reads it."""
    if dataclasses.is_dataclass(config):
        declared = {field.name for field in dataclasses.fields(config)}
    else:  # older versions of transformers
        declared = set(inspect.signature(type(config).__init__).parameters)
    declared |= {*config.attribute_map, *config.attribute_map.values()}
    if key in declared:
        return True
    text = _sources(Path(inspect.getfile(type(config))).parent)
    return re.search(rf"config\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']", text) is not None


def _moves_positions(config: Any) -> bool:
    """Whether the architecture's positions start after the padding id (as RoBERTa's do)."""
    sources = _sources(Path(inspect.getfile(type(config))).parent)
    return re.search(r"create_position_ids|[+*] self\.padding_idx", sources) is not None


@lru_cache(maxsize=8)
def _sources(package: Path) -> str:
    """Source code of one architecture's modules and of the shared modules that read configs."""
    import transformers

    root = Path(transformers.__file__).parent
    paths = [*sorted(package.glob("modeling_*.py")), *(root / name for name in _SHARED_SOURCES)]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())


def note(candidate: Candidate, harmless: list[Difference]) -> str:
    """One sentence on the differences without effect; empty if none is worth reporting."""
    told = [d for d in harmless if d.key.rpartition(".")[2] not in _UNTOLD]
    positions = [d for d in told if d.key.rpartition(".")[2] in POSITIONS]
    others = sorted({re.split(r"\[", d.key)[0] for d in told if d not in positions})
    said = ""
    for key, value, base_value in positions[:1]:
        said = (
            f"its {key} is {shown(value)}, but the base's {shown(base_value)} applies, in the "
            "result and as the context length of every score"
        )
    if others:
        what = ", ".join(others[:8]) + (", …" if len(others) > 8 else "")
        said += f"; it differs in {what}" if said else f"its config.json differs in {what}"
        said += " from the base, which changes no layer"
    return f"{candidate.name}: {said}." if said else ""
