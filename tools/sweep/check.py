"""Checks one family: the folder that gptailor writes and the model that it scores.

Three models are compared for each recipe, in float32: the one in memory that a search scores; the
folder that `stitch` writes, as stock transformers loads it; and a cut by hand, that is, layers
taken out of full models loaded by stock transformers, one after another, without any of gptailor's
code. The first two must agree; the second must have all its weights from the files, and layers of
the same kind as their sources; the third shows what the recipe means.
"""

from __future__ import annotations

import itertools
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptailor.errors import GptailorError
from gptailor.evaluation.family import open_family
from tools.sweep.cases import Case
from tools.sweep.layers import compare_modules, cut_by_hand, find_stack
from tools.sweep.look import (
    TOLERANCE,
    Contexts,
    differences,
    distance,
    language_model,
    load,
    loglikelihoods,
    look,
)
from tools.sweep.recipes import Cut, recipe_of


@dataclass(frozen=True)
class Row:
    """The outcome of one recipe.

    Attributes:
        case: the family.
        recipe: its name.
        verdict: right, refused, refused by search, WRONG, bug or no model.
        detail: the error's message, or what is wrong.
        notes: findings that are notable but not wrong.
    """

    case: str
    recipe: str
    verdict: str
    detail: str = ""
    notes: tuple[str, ...] = ()


class Trial:
    """One family and its models.

    Args:
        case: the family.
        models: name → folder.
        scratch: a folder for results.
    """

    def __init__(self, case: Case, models: Mapping[str, str], scratch: Path) -> None:
        self.case = case.name
        self.models = dict(models)
        self.recipe_dtype = case.dtype
        self.dtype = case.forward or case.dtype
        self.scratch = scratch
        self._full: dict[str, Any] = {}
        self._resident: Any = None
        self._resident_error: BaseException | None = None
        self._lm: Any = None
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(3, 128, (2, 17), generator=generator)
        self.family: Any = None

    def open(self) -> Row | None:
        """Opens the family; the row of the error if that fails, or if stock transformers does."""
        try:
            model, info = load(self.models["base"], self.dtype)
            if info["missing_keys"] or info["unexpected_keys"]:
                raise ValueError(f"save_pretrained leaves out {info}")
            found = look(model, self.tokens, None)["generated"]
            if isinstance(found, str):
                raise ValueError(found)
        except Exception as error:
            return Row(self.case, "-", "no model", f"{type(error).__name__}: {error}"[:200])
        try:
            self.family = open_family(self.models, "base")
        except Exception as error:
            return self._failed("open", error)
        return None

    def full(self, name: str) -> Any:
        """A candidate as stock transformers loads it."""
        if name not in self._full:
            self._full[name] = load(self.models[name], self.dtype)[0]
        return self._full[name]

    def try_cut(self, cut: Cut) -> Row:
        """Stitches, scores and compares one recipe."""
        notes: list[str] = []
        recipe = recipe_of(cut, self.models, self.recipe_dtype)
        scored: dict[str, Any] | None = None
        refusal: Row | None = None
        try:
            scored = self._scored(recipe)
        except Exception as error:
            refusal = self._failed(cut.name, error)
        out = self.scratch / "out"
        faults: list[str] = []
        try:
            self._stitch(recipe, out, verify=False)
            faults = self._faults(cut, out, scored, notes)
        except GptailorError as error:
            return self._refused(self._failed(cut.name, error), out, scored)
        except Exception as error:
            faults.append(f"the folder: {type(error).__name__}: {str(error)[:200]}")
        if faults:  # would `verify` have reported them?
            try:
                self._stitch(recipe, out, verify=True)
            except Exception as error:
                return self._refused(self._failed(cut.name, error), out, scored)
        if refusal is not None and refusal.verdict == "bug":
            faults.append(f"search: bug: {refusal.detail}")
        elif refusal is not None:
            notes.append(f"stitched, but a search says: {refusal.detail}")
        if faults:
            verdict = "bug" if all("bug:" in fault for fault in faults) else "WRONG"
            return Row(self.case, cut.name, verdict, "; ".join(faults), tuple(notes))
        verdict = "right" if refusal is None else "refused by search"
        return Row(self.case, cut.name, verdict, "", tuple(notes))

    def _refused(self, row: Row, out: Path, scored: Mapping[str, Any] | None) -> Row:
        """A row with what is notable about a refusal."""
        notes = list(row.notes)
        if scored is not None:
            notes.append("a search would score it")
        if out.exists():
            notes.append("the folder is left behind")
        return Row(row.case, row.recipe, row.verdict, row.detail, tuple(notes))

    def try_arms(self) -> Row:
        """Measures how much each layer of the base changes, for the control arms of a search."""
        from gptailor.evaluation.similarity import measure

        try:
            self._open_resident()
            found = measure(self._resident, self._lm, Contexts(), "base", self.recipe_dtype)  # type: ignore[arg-type]
        except Exception as error:
            return self._failed("arms", error)
        model = self.full("base")
        first: list[torch.Tensor] = []
        layer = model.get_submodule(find_stack(model))[0]
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with hook, torch.inference_mode():
            states = model(
                input_ids=torch.tensor(Contexts.tokens), use_cache=False, output_hidden_states=True
            ).hidden_states
        if not states or len(states) <= len(found.block_influence) or not same(states[0], first[0]):
            return Row(self.case, "arms", "right", "", ("no truth: other hidden states",))
        truth = [
            float(1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())
            for a, b in itertools.pairwise(states[:-1])
        ]
        off = max(abs(a - b) for a, b in zip(truth, found.block_influence, strict=False))
        if off > TOLERANCE[self.dtype]:
            return Row(self.case, "arms", "WRONG", f"arms: Block Influence is off by {off:.1e}")
        return Row(self.case, "arms", "right")

    def _stitch(self, recipe: Any, out: Path, verify: bool) -> None:
        import yaml

        from gptailor.verbs import stitch

        shutil.rmtree(out, ignore_errors=True)
        path = self.scratch / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict()))
        stitch(path, out, verify=verify, sync=False, threads=1)

    def _scored(self, recipe: Any) -> dict[str, Any]:
        self._open_resident()
        model = self._resident.assemble(recipe)
        return look(model, self.tokens, self._lm)

    def _open_resident(self) -> None:
        from gptailor.evaluation.resident import ResidentModel

        if self._resident_error is not None:
            raise self._resident_error
        if self._resident is None:
            try:
                self._resident = ResidentModel(self.family, dtype=self.dtype, device="cpu")
                self._lm = language_model(self._resident.model, self.models["base"])
            except Exception as error:
                self._resident_error = error
                raise

    def _faults(self, cut: Cut, out: Path, resident: Any, notes: list[str]) -> list[str]:
        faults: list[str] = []
        model, info = load(str(out), self.dtype)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[key]:
                some = sorted(map(str, info[key]))
                faults.append(f"load: {len(some)} {key.replace('_', ' ')}, {some[0]}")
        stack_name = find_stack(self.full("base"))
        if find_stack(model) != stack_name:
            faults.append(f"kinds: layers in {find_stack(model)}, not {stack_name}")
        else:  # before anything runs, because some modules change themselves when they run
            faults += self._kinds(cut, model, stack_name, notes)
        mine = look(model, self.tokens, None)
        if not torch.isfinite(mine["logits"]).all():
            faults.append("logits of the folder are not finite")
        lm = language_model(model, str(out), stock=True)
        mine["sums"] = loglikelihoods(lm)
        lm.batch_size_per_gpu = len(mine["sums"])
        again = loglikelihoods(lm)
        if max(abs(a - b) for (a, _), (b, _) in zip(again, mine["sums"], strict=True)) > 1e-3:
            notes.append("lm-eval's scores depend on the size of batches")
            mine["sums"] = ()
        if resident is not None:
            faults += differences("search and folder", resident, mine, self.dtype)
        faults += self._truth(cut, model, mine, stack_name, notes)
        return faults

    def _kinds(self, cut: Cut, model: Any, stack_name: str, notes: list[str]) -> list[str]:
        """Compares each layer of the folder's model with its source."""
        faults = []
        stack = model.get_submodule(stack_name)
        if len(stack) != len(cut.layers):
            return [f"kinds: {len(stack)} layers instead of {len(cut.layers)}"]
        for out_layer, (name, src_layer) in enumerate(cut.layers):
            values = name != "merge" and cut.scale is None
            source = self.full("base" if name == "merge" else name).get_submodule(stack_name)
            for what, kind in compare_modules(stack[out_layer], source[src_layer], values):
                text = f"layer {out_layer} (from {src_layer}): {what}"
                if kind == "constant":
                    notes.append(text)
                else:
                    faults.append(f"kinds: {text}")
        return faults[:3]

    def _truth(
        self, cut: Cut, model: Any, mine: Any, stack_name: str, notes: list[str]
    ) -> list[str]:
        """Compares with a model cut by hand."""
        if any(name == "merge" for name, _ in cut.layers):
            return []
        try:
            hand = cut_by_hand(cut, {n: self.full(n) for n in self.models}, stack_name)
            logits = hand(input_ids=self.tokens, use_cache=False).logits.float()
        except Exception as error:
            notes.append(f"no truth by hand: {type(error).__name__}: {str(error)[:80]}")
            return []
        worst = distance(logits, mine["logits"])
        tolerance = 10 * TOLERANCE[self.recipe_dtype] if cut.scale else TOLERANCE[self.dtype]
        if not worst <= tolerance:
            text = f"truth: logits are off by {worst:.1e}"
            if any("layer " in note for note in notes):
                notes.append(text + " (constants)")
                return []
            return [text]
        return []

    def _failed(self, recipe: str, error: BaseException) -> Row:
        if isinstance(error, GptailorError):
            return Row(self.case, recipe, "refused", f"{type(error).__name__}: {error}")
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames)
             if "/gptailor/" in f.filename or f.filename == __file__), "?"
        )  # fmt: skip
        return Row(self.case, recipe, "bug", f"{type(error).__name__} at {place}: {error}"[:300])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    return one.shape == other.shape and torch.equal(one, other)
