"""What repairs give back after a cut, on documents that neither they nor a choice have seen.

    python benchmarks/repair.py examples/smollm2 [--sizes 0.9,0.8,0.75,0.7,0.6] [--seeds 3]
        [--stacks merge,refit] [--documents 600] [--text FILE] [--json OUT] [key=value ...]

The folder holds a `search.yaml` with a holdout, whose tasks are scored; `key=value` changes one of
its settings, as for `gptailor search`. First come the whole models: the base, its refitted merge,
and a merge of all variants by each merge method. Then the merge (task arithmetic, λ = 1/√n), its
refit and the first variant are cut by the Block Influence of the refit's layers. Each cut is scored

- as it is,
- with Prune&Comp's compensation (arXiv 2507.18212): the state behind a gap is scaled to the size
  that it had,
- with ReplaceMe's map (arXiv 2505.02819): the MLP's output before a gap is multiplied by the matrix
  that best predicts the state behind it,
- repaired at the gaps, after the first gap, and at all layers, as the front of a search is; after
  the first gap also without the base's text, and as all recipes of a search are, which read less
  and fit every second layer.

Repairs read search documents, chosen anew for each seed. With `--text`, its perplexity per token is
printed for all; no repair reads it. Times are seconds for one repair, and for scoring one recipe on
the search's documents.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from gptailor.config import Config, EvaluationConfig, read_config
from gptailor.evaluation.evaluator import Evaluator
from gptailor.evaluation.family import open_family
from gptailor.evaluation.repair.replay import run_layer
from gptailor.evaluation.repair.settings import front_repair, planned_repair
from gptailor.evaluation.repair.targets import Lesson
from gptailor.evaluation.text import make_sequences, read_documents
from gptailor.merging.registry import METHODS
from gptailor.recipe import Layer, Merge, Recipe, Repair, Take
from gptailor.recipe.repair import UNCUT, RepairedLayers
from gptailor.verbs.preparation import prepared, refit_recipe

KINDS: tuple[RepairedLayers, ...] = ("gaps", "after", "all")


class Bench:
    """A family with a refitted merge, scored on holdout documents."""

    def __init__(self, config: Config, num_documents: int, scratch: Path, text: Path | None):
        assert config.evaluation.holdout is not None
        config = config.model_copy(update={"output": str(scratch)}).with_refit()
        planned, front = planned_repair(config), front_repair(config)
        assert planned is not None
        assert front is not None
        self.config, self.planned, self.front = config, planned, front
        prepared(config, None, lambda text: None)
        family = open_family(config.models, config.base)
        self.num_layers = family.num_layers
        self.merge = refit_recipe(config, front, family.num_layers)
        asked = config.evaluation.model_dump()
        asked |= {"tasks": asked["holdout"]["tasks"], "holdout": None, "rungs": (num_documents,)}
        self.evaluator = Evaluator(family, EvaluationConfig.model_validate(asked))
        self.text = text
        if text is not None:
            lm = self.evaluator.lm
            found = make_sequences(read_documents(text), lm.tok_encode, 8192, 256)
            self.elsewhere = found.tokens

    def recipe(self, layers: Sequence[Layer], repair: Repair | None = None) -> Recipe:
        base = self.config.base
        models = self.config.models
        return Recipe(models, base, tuple(layers), base, base, "bfloat16", repair=repair)

    def repair(
        self, kind: RepairedLayers, seed: int, *, little: bool = False, **changes: Any
    ) -> Repair:
        """As in a search: little for all recipes, more for the front."""
        repair = self.planned if little else self.front
        calibration = replace(repair.calibration, seed=seed, skip=0, **changes)
        return replace(repair, layers=kind, calibration=calibration)

    def merges(self) -> Iterator[tuple[str, list[Layer]]]:
        """A whole merge of all variants by each method, with its own parameters."""
        variants = [name for name in self.merge.models if name not in (self.config.base, "refit")]
        for name, method in METHODS.items():
            if method.is_calibrated or method.max_sources < len(variants):
                continue
            weights = tuple((variant, 1.0) for variant in variants)
            values = {
                p.name: p.search[0] if p.default is None else p.default for p in method.parameters
            }
            layers: list[Layer] = [
                Merge(name, i, weights, tuple(values.items())) for i in range(self.num_layers)
            ]
            yield name, layers

    def score(self, recipe: Recipe) -> tuple[float, float]:
        """Accuracy, and seconds to assemble."""
        outcome = self.evaluator.evaluate(recipe)
        if outcome.accuracy is None:
            raise outcome.as_error()
        return outcome.accuracy, outcome.cost.assemble_s

    def score_assembled(self) -> float:
        """Accuracy of the model as it is assembled now."""
        workload = self.evaluator.workloads["search"]
        scores = workload.scores(workload.run(self.evaluator.lm))
        return statistics.mean(score.value for score in scores)

    @torch.no_grad()
    def perplexity(self) -> float:
        """Of the second half of the text, by the model as it is assembled now."""
        if self.text is None:
            return math.nan
        total, count = 0.0, 0
        for tokens in self.elsewhere:
            ids = torch.tensor([tokens])
            logits = self.evaluator.lm.model(input_ids=ids, use_cache=False).logits[0].float()
            total -= float(logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
            count += len(tokens) - 1
        return math.exp(total / count)

    def lessons(self, recipe: Recipe) -> list[Lesson]:
        """The states of the recipe's own layers without cuts; assembles the recipe afterwards."""
        asked = recipe.with_repair(replace(self.repair("gaps", 0), teachers=UNCUT))
        lessons = self.evaluator.repairs.lessons(asked)
        self.evaluator.resident.assemble(recipe)
        return lessons

    def compensated(self, recipe: Recipe) -> Recipe:
        """Prune&Comp: layers before a gap are scaled by the growth of the state across the gap."""
        lessons = self.lessons(recipe)
        layers = list(recipe.layers)
        for j, depth in gaps(recipe, self.num_layers):
            at = layers[j].src_layer + 1
            norms = [
                [one.states[d].float().norm(dim=-1).mean() for d in (at, depth)] for one in lessons
            ]
            before, behind = (sum(float(pair[i]) for pair in norms) for i in range(2))
            layers[j] = replace(layers[j], scale=min(max(behind / before, 0.1), 10.0))
        return replace(recipe, layers=tuple(layers), _cache={})

    @torch.no_grad()
    def replaced(self, recipe: Recipe) -> None:
        """ReplaceMe: leaves the recipe assembled with its maps folded into `down_proj`."""
        lessons = self.lessons(recipe)
        resident = self.evaluator.resident
        gaps_at = dict(gaps(recipe, self.num_layers))
        hidden = [self._entering(one) for one in lessons]
        for j, src_layer in enumerate(recipe.src_layers):
            layer = resident.layers()[j]
            seen: list[torch.Tensor] = []
            hook = layer.get_submodule("mlp").register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output)
            )
            outputs = [
                run_layer(layer, h, one.arguments[src_layer])
                for h, one in zip(hidden, lessons, strict=True)
            ]
            hook.remove()
            if j in gaps_at:
                x, y = [], []
                for mlp, output, one in zip(seen, outputs, lessons, strict=True):
                    counts = one.batch.counts_BT
                    x.append(mlp[counts].double())
                    y.append(one.states[gaps_at[j]].double() - (output - mlp)[counts].double())
                X, Y = torch.cat(x), torch.cat(y)
                gram = X.T @ X
                gram.diagonal().add_(1e-4 * gram.diagonal().mean())
                T = torch.linalg.solve(gram, X.T @ Y)
                old = layer.get_parameter("mlp.down_proj.weight")
                new = (T.T @ old.double()).to(old.dtype)
                parameter = torch.nn.Parameter(new, requires_grad=False)
                layer = resident.replace(j, {"mlp.down_proj.weight": parameter})
                outputs = [
                    run_layer(layer, h, one.arguments[src_layer])
                    for h, one in zip(hidden, lessons, strict=True)
                ]
            hidden = outputs

    def _entering(self, lesson: Lesson) -> torch.Tensor:
        from gptailor.evaluation.repair.replay import entering

        resident = self.evaluator.resident
        return entering(self.evaluator.lm, resident.layers()[0], lesson.batch.input_BT)


def gaps(recipe: Recipe, num_layers: int) -> Iterator[tuple[int, int]]:
    """(output layer, next source layer) of each layer before a gap."""
    depths = [*recipe.src_layers[1:], num_layers]
    for j, (src_layer, depth) in enumerate(zip(recipe.src_layers, depths, strict=True)):
        if depth != src_layer + 1:
            yield j, depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--sizes", default="0.9,0.8,0.75,0.7,0.6")
    parser.add_argument("--stacks", help="of merge, refit and the first variant; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    config = read_config(arguments.folder / "search.yaml", arguments.overrides)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(config, arguments.documents, Path(scratch), arguments.text)
        first = next(name for name in config.models if name != config.base)

        def note(what: str, size: float, kind: str, values: list[float], *seconds: float) -> None:
            spread = f"{min(values):.3f}-{max(values):.3f}" if len(values) > 1 else ""
            perplexity = bench.perplexity()
            extra = " ".join(f"{value:.1f} s" for value in seconds)
            print(
                f"{what:16} {size:4.2f} {kind:17} {statistics.mean(values):.3f} {spread:11} "
                f"{perplexity:9.1f} {extra}",
                flush=True,
            )
            rows.append({
                "what": what, "size": size, "kind": kind, "accuracy": values,
                "perplexity": perplexity, "seconds": seconds,
            })  # fmt: skip

        def repaired(what: str, size: float, cut: Sequence[Layer], kind: str, **how: Any) -> None:
            layers = cast("RepairedLayers", kind.partition(",")[0])
            found = [
                bench.score(bench.recipe(cut, bench.repair(layers, seed, **how)))
                for seed in range(arguments.seeds)
            ]
            seconds = statistics.median(s for _, s in found)
            note(what, size, kind, [accuracy for accuracy, _ in found], seconds)

        whole: dict[str, list[Layer]] = {
            name: [Take(name, i) for i in range(bench.num_layers)] for name in bench.config.models
        }
        for what, stack in (*whole.items(), *bench.merges()):
            try:
                note(what, 1.0, "plain", [bench.score(bench.recipe(stack))[0]])
            except Exception as error:  # a method that these weights make no model of
                print(f"{what}: {error}", flush=True)
        influence = bench.evaluator.similarity("refit", "bfloat16").block_influence
        order = sorted(range(bench.num_layers), key=lambda i: (-influence[i], i))
        stacks = {"merge": list(bench.merge.layers), "refit": whole["refit"], first: whole[first]}
        if arguments.stacks is not None:
            stacks = {name: stacks[name] for name in arguments.stacks.split(",")}
        for size in map(float, arguments.sizes.split(",")):
            kept = sorted(order[: round(size * bench.num_layers)])
            for what, stack in stacks.items():
                cut = [stack[i] for i in kept]
                recipe = bench.recipe(cut)
                note(what, size, "plain", [bench.score(recipe)[0]])
                note(what, size, "prune&comp", [bench.score(bench.compensated(recipe))[0]])
                bench.replaced(recipe)
                note(what, size, "replaceme", [bench.score_assembled()])
                for kind in KINDS:
                    repaired(what, size, cut, kind)
                repaired(what, size, cut, "after, no text", text=None)
                repaired(what, size, cut, "alternate, little", little=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "at": time.time()}, indent=1))


if __name__ == "__main__":
    main()
