"""A merge method (`Method`), and a single merge as plain values (`Mix`).

The methods themselves are declared in `registry.py`. The build reads them with only Python's
standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gptailor.errors import UsageError, unknown
from gptailor.merging.parameter import (
    BASE_FLAG,
    Parameter,
    Parametrised,
    Value,
    for_each,
    simplified,
)


@dataclass(frozen=True)
class Engine:
    """How the compiled engine computes a method: names of enumerators in `csrc`.

    Attributes:
        formula: the elementwise formula (`Formula` in formulas.h).
        keep: which differences from the base are used (`Keep` in formulas.h).
        analysis: the pass over whole tensors that comes first (`Analysis` in methods.h).
        sphere: the coefficients derived from inner products (`Sphere` in coefficients.h).
        on_gpu: True if the GPU can compute it, too; otherwise the CPU does.
    """

    formula: str
    keep: str = "all"
    analysis: str = "none"
    sphere: str = "none"
    on_gpu: bool = False


def unchanged(mix: Mix) -> Mix:
    """The rule of a method without a known simpler form."""
    return mix


@dataclass(frozen=True)
class Method:
    """A way to make one tensor out of several.

    Attributes:
        name: the key in recipes and configurations; mergekit's name where mergekit has it.
        formula: what is computed, element by element, in float32.
        paper: where it comes from.
        parameters: all but the weights.
        weighted: True if each source has a weight (`weights: {a: 0.5}`), False if sources are
            only listed (`models: [a, b]`).
        min_sources, max_sources: how many sources it takes, not counting the base.
        base: whether the formula uses the recipe's base in addition to the sources; "optional":
            iff the parameter `task_vectors` is set.
        engine: how it is computed; None if it is always built as another method, or by a solver.
        is_linear_solve: True if LAPACK computes it (`regmean.py`), not the engine.
        statistics: the statistics that each source needs, made from a text by `gptailor
            calibrate`: "elements" for a number for each element, "inputs" for the Gram matrix of a
            linear layer's inputs.
        mean: the flag that makes the result a mean, whose weights can't add up to zero; True if it
            always is one.
        simplify: the rule that finds the simplest merge with the same result.
        in_mergekit: True if mergekit has it.
        starts_at_base: True if mergekit uses its base_model as the first source.
    """

    name: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...]
    weighted: bool
    min_sources: int
    max_sources: int
    base: Literal["never", "always", "optional"]
    engine: Engine | None = None
    is_linear_solve: bool = False
    statistics: Literal["none", "elements", "inputs"] = "none"
    mean: bool | str = False
    simplify: Callable[[Mix], Mix | str] = unchanged
    in_mergekit: bool = True
    starts_at_base: bool = False

    @property
    def is_calibrated(self) -> bool:
        """True if each source needs statistics."""
        return self.statistics != "none"

    @property
    def share(self) -> Parameter | None:
        """The parameter that divides the result between two sources; None if there is none."""
        return next((p for p in self.parameters if p.is_share), None)

    @property
    def has_amounts(self) -> bool:
        """True if the proportions of the sources can be chosen."""
        return self.weighted or self.share is not None

    @property
    def uses_base(self) -> bool:
        """True if the formula always uses the recipe's base."""
        return self.base == "always"

    @property
    def is_random(self) -> bool:
        """True if it draws random numbers, which depend on its parameter `seed`."""
        return "seed" in self.by_name

    @property
    def by_name(self) -> dict[str, Parameter]:
        """The parameters by name."""
        return {p.name: p for p in self.parameters}

    def takes_base(self, values: Mapping[str, Value]) -> bool:
        """True if the formula uses the base with these parameters."""
        return self.uses_base or (self.base == "optional" and values.get(BASE_FLAG) == 1.0)

    def is_mean(self, values: Mapping[str, Value]) -> bool:
        """True if the result is a mean with these parameters, so weights can't add up to zero."""
        return self.mean if isinstance(self.mean, bool) else values[self.mean] == 1.0

    def runs_on_gpu(self, values: Mapping[str, Value]) -> bool:
        """True if the GPU computes it with these parameters."""
        return (
            self.engine is not None
            and self.engine.on_gpu
            and all(p.gpu_value in (None, values[p.name]) for p in self.parameters)
        )

    def completed(self, values: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
        """Values of all parameters in the registry's order, with defaults filled in, unchecked.

        A missing parameter without a default is left out.

        Raises:
            UsageError: a parameter is unknown.
        """
        known = self.by_name
        for key in values:
            if key not in known:
                raise unknown(f"parameter of {self.name}", key, known)
        found = {name: values.get(name, p.default) for name, p in known.items()}
        return tuple(
            (name, simplified(value)) for name, value in found.items() if value is not None
        )

    def checked(
        self, values: Mapping[str, object], where: str, sources: Iterable[str] = ()
    ) -> dict[str, Value]:
        """All parameters of the method, with defaults filled in and bounds checked.

        Args:
            values: as given in a recipe.
            where: the place, for errors.
            sources: the merged models, for parameters with a value for each.

        Raises:
            UsageError: a parameter is unknown, missing or outside its bounds.
        """
        known, names = self.by_name, list(sources)
        for key in values:
            if key not in known:
                raise unknown(f"parameter of {self.name}", key, known, where)
        result: dict[str, Value] = {}
        for name, parameter in known.items():
            if name in values:
                result[name] = parameter.checked_values(values[name], names, where)
            elif parameter.default is None:
                raise UsageError(f"{where}: {self.name} needs a value for {name}.")
            else:
                result[name] = parameter.default
        self._check_together(result, len(names) or 1, where)
        return result

    def _check_together(self, values: Mapping[str, Value], num_sources: int, where: str) -> None:
        """Checks that della's probabilities, density ± epsilon, lie between 0 and 1."""
        if not ("density" in values and "epsilon" in values):
            return
        densities, epsilons = (for_each(values[k], num_sources) for k in ("density", "epsilon"))
        for density, epsilon in zip(densities, epsilons, strict=True):
            if 0.0 < density < 1.0 and not 0.0 < density - epsilon <= density + epsilon < 1.0:
                raise UsageError(
                    f"{where}: density {density:g} and epsilon {epsilon:g} do not fit together: "
                    "density - epsilon must be above 0 and density + epsilon below 1."
                )


@dataclass(frozen=True)
class Mix(Parametrised):
    """A merge of some sources.

    Attributes:
        method: the merge method.
        weights: (source, weight) in order; weight 1.0 if the method has no weights.
        parameters: (name, value) of every parameter of the method; defaults are filled in.
        base: the source that is the base.
    """

    method: Method
    weights: tuple[tuple[str, float], ...]
    parameters: tuple[tuple[str, Value], ...]
    base: str

    def __post_init__(self) -> None:
        values = self.method.completed(dict(self.parameters))
        object.__setattr__(self, "parameters", values)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources without their weights."""
        return tuple(source for source, _ in self.weights)

    def for_each(self, name: str) -> tuple[float, ...]:
        """The value of a parameter for each source."""
        return for_each(self.parameter(name), len(self.weights))

    def select(self, indices: Iterable[int]) -> Mix:
        """The same merge with only these sources, in this order."""
        chosen = list(indices)
        values = tuple(
            (name, tuple(value[i] for i in chosen) if isinstance(value, tuple) else value)
            for name, value in self.parameters
        )
        weights = tuple(self.weights[i] for i in chosen)
        return replace(self, weights=weights, parameters=values)

    def having(self, **values: Value) -> Mix:
        """The same merge with other values for some parameters."""
        return replace(self, parameters=tuple((dict(self.parameters) | values).items()))

    def weighing(self, weights: Iterable[float]) -> Mix:
        """The same merge with other weights, one for each source."""
        pairs = zip(self.sources, weights, strict=True)
        return replace(self, weights=tuple((source, weight) for source, weight in pairs))

    def by(self, method: Method, **values: Value) -> Mix:
        """The merge by another method, with the parameters that both have, `values`, and defaults
        for the rest."""
        known = method.by_name
        kept = {name: value for name, value in self.parameters if name in known} | values
        return replace(self, method=method, parameters=tuple(kept.items()))
