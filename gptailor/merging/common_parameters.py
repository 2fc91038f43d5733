"""Parameters that several methods share, and helpers to declare one."""

from __future__ import annotations

from gptailor.merging.parameter import BASE_FLAG, Parameter


def flag(
    name: str,
    default: bool,
    doc: str,
    *,
    field: str = "",
    is_late: bool = False,
    in_mergekit: bool = True,
    gpu_value: float | None = None,
) -> Parameter:
    """A parameter that is true or false; the engine's field has the same name unless given."""
    value = float(default)
    return Parameter(
        name, value, 0.0, 1.0, (value,), doc, "flag", is_late=is_late, field=field or name,
        in_mergekit=in_mergekit, gpu_value=gpu_value,
    )  # fmt: skip


def normalize(default: bool) -> Parameter:
    """Whether a weighted sum is divided by the sum of the weights."""
    doc = "divide by the sum of the weights used"
    return flag("normalize", default, doc, field="params.normalize")


def rescale(default: bool, is_late: bool = False) -> Parameter:
    """Whether a sparse difference is rescaled to the sum of magnitudes of the whole."""
    doc = "rescale what is kept of a difference to its original sum of magnitudes"
    return flag("rescale", default, doc, is_late=is_late)


def part(
    name: str, default: float, search: float, doc: str, *, field: str = "", per_source: bool = False
) -> Parameter:
    """A number from 0 to 1."""
    return Parameter(name, default, 0.0, 1.0, (search,), doc, per_source=per_source, field=field)


LAMBDA = Parameter(
    "lambda", 1.0, -100.0, 100.0, (1.0,), "factor on the merged difference", field="params.lambda"
)
DENSITY = part(
    "density", 1.0, 0.5, "fraction of each difference to keep", field="densities", per_source=True
)
EPSILON = part(
    "epsilon", 0.15, 0.15, "how far probabilities deviate from the density",
    field="epsilons", per_source=True,
)  # fmt: skip
GAMMA = part(
    "gamma", 0.01, 0.01, "fraction of each difference to drop, its largest values",
    field="gammas", per_source=True,
)  # fmt: skip
SEED = Parameter(
    "seed", 0.0, 0.0, 2.0**53, (0.0,), "seed of the random choice", "integer",
    field="seed", in_mergekit=False,
)  # fmt: skip
TASK_VECTORS = flag(
    BASE_FLAG, False, "merge the differences from the base instead", in_mergekit=False
)
