"""Tests of every declared method: engine, reference, recipes, search, mergekit and docs agree.

Nothing here is specific to one method, so a new method goes through all of it. More such tests are
in tests/search/test_space.py for the search and tests/evaluation/test_device_merge.py for the GPU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor import _C
from gptailor.errors import UsageError
from gptailor.mergekit import read_mergekit, to_recipe
from gptailor.mergekit.config import mergekit_parameters
from gptailor.merging import reference
from gptailor.merging.method import Method
from gptailor.merging.parameter import BASE_FLAG, Value, for_each
from gptailor.merging.registry import METHODS
from gptailor.models.family import Family
from gptailor.recipe import Merge, Recipe
from gptailor.recipe.canonical import canonical_layer, hashed
from tests.mergekit.family import save_family
from tests.native.native_tools import tensor
from tests.recipe.recipes import MODELS, recipe
from tests.recipe.test_canonical_builds import built, gram

ROOT = Path(__file__).resolve().parents[2]
IN_ORDER = ("blue", "green", "red")
"""In canonical order, so that random masks are the same."""
SHAPES = ((1,), (7,), (3, 5), (33, 40), (2, 3, 4))
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
of_the_engine = pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if m.engine is not None], ids=lambda m: m.name
)


def settings(method: Method) -> Iterator[dict[str, Value]]:
    """The defaults, the values that a search tries first, and those with each flag flipped."""
    search: dict[str, Value] = {p.name: p.search[0] for p in method.parameters}
    yield {p.name: p.search[0] if p.default is None else p.default for p in method.parameters}
    yield search
    for parameter in method.parameters:
        if parameter.is_flag:
            yield search | {parameter.name: 1.0 - parameter.search[0]}


def sources(method: Method) -> tuple[str, ...]:
    return IN_ORDER[: min(method.max_sources, 2 if method.min_sources == 2 else 3)]


def merges(method: Method) -> Iterator[Merge]:
    weights = (0.7, 0.4, 0.3) if method.weighted else (1.0, 1.0, 1.0)
    for values in settings(method):
        pairs = tuple(zip(sources(method), weights, strict=False))
        yield Merge(method.name, 1, pairs, tuple(values.items()))


def family(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A base and finetunes of it; some of their elements equal the base's."""
    rng = np.random.default_rng(5)
    base = rng.standard_normal(shape)
    kept = rng.integers(0, 4, shape) > 0
    models = {name: base + kept * 0.1 * rng.standard_normal(shape) for name in IN_ORDER}
    return {name: x.astype(np.float32) for name, x in ({"base": base} | models).items()}


def statistics(method: Method, models: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    if method.statistics == "elements":
        return [models[name] ** 2 for name in sources(method)]
    if method.statistics == "inputs":
        return [gram(models[name]).numpy() for name in sources(method)]
    return None


def engine_of(
    entry: Merge, models: dict[str, np.ndarray], step: int | None = None, **options: Any
) -> bytes:
    """The engine's result for an entry, in bfloat16, computed in slices of `step` elements."""
    method = METHODS[entry.method]
    merge = _C.Merge(
        entry.method,
        [tensor(models[name], "F32") for name in entry.models],
        tensor(models["base"], "F32") if entry.takes_base else None,
        statistics=[tensor(x, "F32") for x in statistics(method, models) or ()],
        out_dtype="BF16",
        weights=[weight for _, weight in entry.weights],
        key=7,
        **{"parameters": dict(entry.parameters)} | options,
    )
    n = merge.n_elements
    out = _C.Buffer(2 * n)
    for begin in range(0, n, step or n):
        merge.run(begin, min(step or n, n - begin), out, 2 * begin)
    return bytes(memoryview(out))


@every_method
def test_something_computes_it(method: Method) -> None:
    assert method.name in reference.FORMULAS
    simplest = canonical_layer(next(merges(method)), "base", MODELS)
    assert isinstance(simplest, Merge)
    computes = METHODS[simplest.method]
    assert (computes.engine is not None) != computes.is_linear_solve


@every_method
def test_the_canonical_form_builds_what_the_reference_says(method: Method) -> None:
    """Compares the engine or LAPACK with the float64 reference."""
    shapes = [(5, 8)] if method.statistics == "inputs" else SHAPES
    for shape, entry in itertools.product(shapes, merges(method)):
        models = family(shape)
        simplest = canonical_layer(entry, "base", MODELS)
        told: dict[str, Any] = {
            "weights": [w for _, w in entry.weights] if method.weighted else None,
            "parameters": dict(entry.parameters),
            "statistics": statistics(method, models),
            "key": 7,
        }
        x = [models[name] for name in entry.models]
        base = models["base"] if entry.takes_base else None
        with np.errstate(all="ignore"):
            exact = reference.merge(method.name, x, base, **told).ravel()
            steps = reference.merge(method.name, x, base, **told, dtype=np.float32).ravel()
        got = built(simplest, models)
        limit = 2e-6 * (1 + np.abs(exact).max())
        # where elements are selected, two within rounding of each other may swap places
        wrong = (np.abs(got - exact) > limit) & (np.abs(got - steps) > limit)
        assert wrong.sum() <= got.size // 500, (entry, got[wrong], exact[wrong])


@of_the_engine
def test_threads_and_slices_change_no_bit(method: Method) -> None:
    models = family((301, 703))
    for entry in merges(method):
        whole = engine_of(entry, models, threads=1)
        assert engine_of(entry, models, threads=3, step=50_001) == whole


@of_the_engine
def test_defaults_may_be_left_out(method: Method) -> None:
    models = family((20, 30))
    for entry in merges(method):
        if entry.takes_base and not method.uses_base:
            continue  # the engine uses an optional base whenever it gets one
        known = method.by_name
        told = {n: v for n, v in entry.parameters if v != known[n].default}
        assert engine_of(entry, models, parameters=told) == engine_of(entry, models)


@of_the_engine
def test_the_engine_has_the_same_bounds(method: Method) -> None:
    models, entry = family((4, 6)), next(merges(method))
    for parameter in method.parameters:
        if parameter.name == BASE_FLAG:
            continue
        values = dict(entry.parameters)
        for bad in (parameter.low - 1e-3, parameter.high * 1.001 + 1e-3):
            with pytest.raises(ValueError, match=f"{parameter.name}.* outside"):
                engine_of(entry, models, parameters=values | {parameter.name: bad})
        if not parameter.per_source:
            with pytest.raises(ValueError, match=f"{parameter.name} needs one value"):
                engine_of(entry, models, parameters=values | {parameter.name: [0.0, 0.0]})
    with pytest.raises(ValueError, match="has no parameter 'unheard_of'"):
        engine_of(entry, models, parameters={"unheard_of": 1.0})


@of_the_engine
def test_a_nan_is_found(method: Method) -> None:
    for entry in merges(method):
        for name in (*entry.models, *(["base"] if entry.takes_base else [])):
            models = family((30, 40))
            models[name].ravel()[700] = np.nan
            with pytest.raises(_C.NanError, match="NaN"):
                engine_of(entry, models)


@every_method
def test_the_canonical_form_is_unique(method: Method) -> None:
    for entry in merges(method):
        simplest = canonical_layer(entry, "base", MODELS)
        assert canonical_layer(simplest, "base", MODELS) == simplest
        values = {
            name: value[::-1] if isinstance(value, tuple) else value
            for name, value in entry.parameters
        }
        if method.share is not None:
            values[method.share.name] = 1.0 - entry.number(method.share.name)
        turned = replace(entry, weights=entry.weights[::-1], parameters=tuple(values.items()))
        assert canonical_layer(turned, "base", MODELS) == simplest
        other_names = {name: f"{name}/x" for name in entry.models}
        renamed = replace(entry, weights=tuple((other_names[m], w) for m, w in entry.weights))
        refs = MODELS | {new: MODELS[old] for old, new in other_names.items()}
        again = canonical_layer(renamed, "base", refs)
        assert hashed(again, refs) == hashed(simplest, MODELS)


@every_method
def test_a_recipe_reads_back_as_itself(method: Method) -> None:
    for entry in merges(method):
        weights = sorted(entry.weights, key=_place)  # as weights are read: in the models' order
        ordered = replace(entry, weights=tuple(weights))
        found = recipe(ordered, replace(ordered, parameters=_for_each(ordered)))
        assert Recipe.from_yaml(found.to_yaml()) == found


def _place(pair: tuple[str, float]) -> int:
    return list(MODELS).index(pair[0])


def _for_each(entry: Merge) -> tuple[tuple[str, Value], ...]:
    """The parameters, with another value for one source where values may differ."""
    known, count = METHODS[entry.method].by_name, len(entry.weights)
    return tuple(
        (name, (known[name].high, *for_each(value, count)[1:]) if known[name].per_source else value)
        for name, value in entry.parameters
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    save_family(folder)
    return folder


@every_method
def test_mergekits_yaml_means_the_same(method: Method, folder: Path) -> None:
    names = ["red", "green"][: min(method.max_sources, 2)]
    needs_base = method.uses_base or method.starts_at_base
    entry = "".join(f"  - {{model: {name}, parameters: {{weight: 0.4}}}}\n" for name in names[1:])
    if not method.weighted:
        entry = "".join(f"  - model: {name}\n" for name in names[1:])
    first = "base" if method.starts_at_base else names[0]
    head = f"  - model: {first}\n" + ("    parameters: {weight: 0.6}\n" if method.weighted else "")
    of_all, of_each = mergekit_parameters(method.name)
    asked = {name: method.by_name[name] for name in (*of_all, *of_each) if name != "weight"}
    settings = "".join(f"  {name}: {p.search[0]}\n" for name, p in asked.items())
    text = f"merge_method: {method.name}\nmodels:\n{head}{entry}"
    text += "base_model: base\n" if needs_base else ""
    text += f"parameters:\n{settings}" if settings else ""
    path = folder / f"{method.name}.yml"
    path.write_text(text)
    if not method.in_mergekit:
        with pytest.raises(UsageError, match="unknown merge_method"):
            read_mergekit(path)
        return
    config = read_mergekit(path)
    assert config is not None
    layer = to_recipe(config, Family(config.models, config.base)).layers[0]
    assert isinstance(layer, Merge)
    assert layer.method == method.name
    assert layer.models == (first, *names[1:])
    assert {n: v for n, v in layer.parameters if n in asked} == {
        name: p.search[0] for name, p in asked.items()
    }
    ours = method.by_name.keys() - asked.keys()
    assert all(layer.parameter(name) == method.by_name[name].default for name in ours)


def rows() -> dict[str, list[str]]:
    """The cells of the table in docs/merge_methods.md by method, with "as above" filled in."""
    found: dict[str, list[str]] = {}
    above = ""
    for line in (ROOT / "docs" / "merge_methods.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[0].startswith("`"):
            cells[2] = above = cells[2].replace("as above", above)
            found[cells[0].strip("`")] = cells
    return found


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no source tree")
@every_method
def test_the_documentation_says_so(method: Method) -> None:
    _, computes, parameters, _, unlike_mergekit = rows()[method.name]
    assert computes
    assert ("not in mergekit" in unlike_mergekit) != method.in_mergekit
    said = {
        name: (star == "*", default)  # the last one counts: "as above, `normalize` (false)"
        for name, star, default in re.findall(r"`(\w+)`(\*?)(?: \(([^)]*)\))?", parameters)
    }
    assert said == {p.name: (p.per_source, shown(p)) for p in method.parameters}


def shown(parameter: Any) -> str:
    if parameter.default is None:
        return ""
    value = parameter.shown(parameter.default)
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"e-0", "e-", f"{value:g}")


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no source tree")
def test_the_documentation_names_no_other_method() -> None:
    assert list(rows().keys() - METHODS.keys()) == []
