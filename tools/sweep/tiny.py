"""Tiny random models: a config, weights, a tokenizer, and a second candidate a small step away.

The weights are random, including norms and biases, so that every layer has an effect.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gptailor.demo
from tools.sweep.cases import Case
from tools.sweep.fields import DROP, EXCEPTIONS, RULES

DEMO = Path(gptailor.demo.__file__).parent / "models" / "base"


def import_model(model_type: str) -> None:
    """Imports the module of an architecture, which takes most of the time of a tiny model."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with contextlib.suppress(Exception):  # `build` says why
        AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]


def tiny_config(model_type: str, changes: Mapping[str, Any] = {}) -> Any:
    """A config of the architecture with small numbers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**_fields(cls, {**EXCEPTIONS.get(model_type, {}), **changes}))


def _fields(cls: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a config class, from the rules and the changes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    result: dict[str, Any] = {}
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    for name, default in defaults.items():
        if isinstance(default, bool) or name.startswith("_"):
            continue
        if name == "tie_word_embeddings" or name.endswith("_config"):
            continue
        for pattern, value in RULES:
            if re.fullmatch(pattern, name):
                if value is not None:
                    result[name] = value
                break
    if "pad_token_id" in defaults:
        result["pad_token_id"] = 0
    for key, value in (("bos_token_id", 1), ("eos_token_id", 2)):
        if key in defaults:
            result[key] = value
    subs = getattr(cls, "sub_configs", {}) or {}
    if subs:
        try:
            example = cls()
        except Exception:  # some refuse their own defaults
            example = None
        for key in subs:
            sub = getattr(example, key, None)
            if sub is None and "model_type" in changes.get(key, {}):
                sub = CONFIG_MAPPING[changes[key]["model_type"]]()
            if sub is not None:
                inner = _fields(type(sub), {**EXCEPTIONS.get(sub.model_type, {}),
                                            **changes.get(key, {})})  # fmt: skip
                result[key] = {"model_type": sub.model_type, **inner}
    result.update({k: v for k, v in changes.items() if k not in subs})
    return {k: v for k, v in result.items() if v is not DROP}


def build(case: Case, folder: Path) -> dict[str, str]:
    """Writes a base and a second candidate, a small step away; returns name → folder."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(case.model_type, case.changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    shake(model, generator, first=True)
    models = {}
    for name in ("base", "other"):
        if name == "other":
            shake(model, generator, first=False)
        place = folder / name
        to_dtype(model, case).save_pretrained(place)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, place / file)
        edit_config(place, case.raw)
        models[name] = str(place)
    edit_config(folder / "base", case.raw_base)
    return models


def to_dtype(model: Any, case: Case) -> Any:
    """The model in the case's type, except for tensors that stay in float32."""
    import torch

    if case.dtype == "float32":
        return model
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    result = copy.deepcopy(model)
    for name, tensor in [*result.named_parameters(), *result.named_buffers()]:
        stays = case.wide in name or any(
            re.search(rf"(^|\.){re.escape(k)}($|\.)", name) for k in kept
        )
        if tensor.is_floating_point() and not stays:
            tensor.data = tensor.data.to(getattr(torch, case.dtype))
    result.config.dtype = getattr(torch, case.dtype)
    return result


def shake(model: Any, generator: Any, *, first: bool) -> None:
    """Gives every saved tensor random values, or moves it by a small random step."""
    import torch

    seen = set()
    saved = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen or name not in saved or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if tensor.ndim > 1 and first and not re.search(r"A_log|conv|slope|decay", name):
                tensor.copy_(noise * 0.2)
            else:
                tensor.add_(noise, alpha=0.05 if tensor.ndim > 1 else 0.1 if first else 0.03)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None] | None) -> None:
    """Rewrites a folder's config.json."""
    if edit is not None:
        path = folder / "config.json"
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data, indent=2))
