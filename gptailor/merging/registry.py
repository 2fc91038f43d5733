"""The merge methods, each declared once; the rest of the program uses these declarations.

A declaration gives a method's sources, its parameters with their bounds, its formula, its paper,
and how the compiled engine computes it: the build generates the engine's table of methods from
these declarations (`engine_table.py`). Names, parameters and defaults are mergekit's where mergekit
has the method; `stock` and `widen` are those of the code published with GPTailor. The formulas
themselves are implemented in `csrc` (fast) and in `reference` (slow, float64).

In the formulas b is the base, xᵢ a source, wᵢ its weight and δᵢ = xᵢ − b.
"""

from __future__ import annotations

from typing import Any, Literal

from gptailor.errors import unknown
from gptailor.merging import simplify
from gptailor.merging.common_parameters import (
    DENSITY,
    EPSILON,
    GAMMA,
    LAMBDA,
    SEED,
    TASK_VECTORS,
    flag,
    normalize,
    part,
    rescale,
)
from gptailor.merging.method import Engine, Method
from gptailor.merging.parameter import (
    WEIGHT_BOUNDS,
    Parameter,
    Value,
    checked_number,
    checked_weight,
    for_each,
)

__all__ = [
    "CALIBRATED",
    "LINEAR",
    "METHODS",
    "TASK_ARITHMETIC",
    "WEIGHT_BOUNDS",
    "Engine",
    "Method",
    "Parameter",
    "Value",
    "checked_number",
    "checked_weight",
    "for_each",
    "get_method",
]

MAX_SOURCES = 16
"""The most sources that the engine takes, not counting the base."""

_SOUPS = "Wortsman et al. 2022, Model soups, arXiv 2203.05482"
_DARE = "Yu et al. 2023, Language Models are Super Mario, arXiv 2311.03099"
_DELLA = "Deep et al. 2024, DELLA-Merging, arXiv 2406.11617"
_BREADCRUMBS = "Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795"
_STOCK = "Jang et al. 2024, Model Stock, arXiv 2403.19522"

_SUM = "b + λ Σ wᵢ dᵢ,  dᵢ = "
_ELECTED = "b + λ Σ_{i ∈ A} wᵢ dᵢ,  A = the sources whose sign is that of Σ wᵢ dᵢ,  dᵢ = "
_DROPPED = "δᵢ with elements dropped at random"
_RANKED = "δᵢ with elements dropped at random, the small ones of a row more often"
_MIDDLE = "δᵢ without its largest and its smallest elements"


def _method(
    name: str,
    formula: str,
    paper: str,
    *parameters: Parameter,
    weighted: bool = True,
    sources: tuple[int, int] = (1, MAX_SOURCES),
    base: Literal["never", "always", "optional"] = "always",
    **traits: Any,
) -> Method:
    return Method(name, formula, paper, parameters, weighted, *sources, base, **traits)


LINEAR = _method(
    "linear", "Σ wᵢ xᵢ / Σ wᵢ", _SOUPS, normalize(True), base="never",
    engine=Engine("linear", on_gpu=True), mean="normalize", simplify=simplify.weighted_sum,
)  # fmt: skip
_AVERAGE = _method(
    "average", "Σ xᵢ / n", _SOUPS, weighted=False, base="never",
    simplify=simplify.mean_by(LINEAR), in_mergekit=False,
)  # fmt: skip
TASK_ARITHMETIC = _method(
    "task_arithmetic",
    "b + λ Σ wᵢ δᵢ",
    "Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089",
    LAMBDA,
    normalize(False),
    engine=Engine("task_arithmetic", on_gpu=True),
    simplify=simplify.added_differences,
)
_SLERP = _method(
    "slerp",
    "(sin((1−t)θ) x₀ + sin(tθ) x₁) / sin θ,  cos θ = x₀·x₁ / (‖x₀‖ ‖x₁‖)",
    "Shoemake 1985, Animating Rotation with Quaternion Curves, SIGGRAPH",
    Parameter(
        "t", None, 0.0, 1.0, (0.5,), "0 is the first model, 1 the second",
        field="sphere.t", is_share=True,
    ),
    weighted=False,
    sources=(2, 2),
    base="never",
    engine=Engine("linear", analysis="sphere", sphere="slerp", on_gpu=True),
    simplify=simplify.shared,
    starts_at_base=True,
)  # fmt: skip
_NUSLERP = _method(
    "nuslerp",
    "slerp with t = w₁ / (w₀ + w₁)",
    "Goddard 2024, NuSLERP, in mergekit",
    flag(
        "nuslerp_flatten", True, "one angle for the tensor, not one for each row",
        field="flatten", gpu_value=1.0,
    ),
    flag(
        "nuslerp_row_wise", False, "angles of columns instead of rows, if not flattened",
        field="row_wise",
    ),
    TASK_VECTORS,
    sources=(2, 2),
    base="optional",
    engine=Engine("linear", analysis="sphere", sphere="nuslerp", on_gpu=True),
    simplify=simplify.arc,
)  # fmt: skip
_MULTISLERP = _method(
    "multislerp",
    "Σ wᵢ ‖xᵢ‖ · exp_m(Σ wᵢ tᵢ),  m = the mean direction of all xᵢ, tᵢ tangents at m",
    "Goddard 2025, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    flag("normalize_weights", True, "divide the weights by their sum"),
    part("eps", 1e-8, 1e-8, "norms below this are taken as zero", field="sphere.eps"),
    TASK_VECTORS,
    base="optional",
    engine=Engine("linear", analysis="sphere", sphere="multislerp", on_gpu=True),
    mean="normalize_weights",
    simplify=simplify.mean_on_sphere,
)
_KARCHER = _method(
    "karcher",
    "Σ ‖xᵢ‖ / n · the point on the sphere with the least Σ angle² to all xᵢ",
    "Karcher 1977, Riemannian center of mass and mollifier smoothing, CPAM 30",
    Parameter(
        "max_iter", 10.0, 0.0, 10_000.0, (10.0,), "maximum number of steps", "integer",
        field="sphere.max_iter",
    ),
    part("tol", 1e-5, 1e-5, "a step shorter than this is the last", field="sphere.tol"),
    weighted=False,
    base="never",
    engine=Engine("linear", analysis="sphere", sphere="karcher", on_gpu=True),
    simplify=simplify.one_of_equals,
)  # fmt: skip
_TIES = _method(
    "ties",
    "b + λ Σ_{i ∈ A} wᵢ dᵢ / Σ_{i ∈ A} wᵢ,  dᵢ = the largest part of δᵢ, "
    "A = the sources whose sign is that of Σ wᵢ dᵢ",
    "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
    DENSITY,
    LAMBDA,
    normalize(True),
    rescale(False, is_late=True),
    engine=Engine("ties", "magnitude", "trim", on_gpu=True),
    simplify=simplify.elected,
)
_DARE_LINEAR = _method(
    "dare_linear", _SUM + _DROPPED, _DARE,
    DENSITY, LAMBDA, normalize(False), rescale(True), SEED,
    engine=Engine("task_arithmetic", "random", "random", on_gpu=True),
    simplify=simplify.sparse(whole=TASK_ARITHMETIC),
)  # fmt: skip
_DARE_TIES = _method(
    "dare_ties", _ELECTED + _DROPPED, _DARE,
    DENSITY, LAMBDA, normalize(False), rescale(True), SEED,
    engine=Engine("ties", "random", "random", on_gpu=True),
    simplify=simplify.sparse_elected(whole=_TIES, alone=_DARE_LINEAR),
)  # fmt: skip
_DELLA_LINEAR = _method(
    "della_linear", _SUM + _RANKED, _DELLA,
    DENSITY, EPSILON, LAMBDA, normalize(False), rescale(True), SEED,
    engine=Engine("task_arithmetic", "ranked", "ranked"),
    simplify=simplify.sparse(whole=TASK_ARITHMETIC),
)  # fmt: skip
_DELLA_TIES = _method(
    "della", _ELECTED + _RANKED, _DELLA,
    DENSITY, EPSILON, LAMBDA, normalize(True), rescale(True), SEED,
    engine=Engine("ties", "ranked", "ranked"),
    simplify=simplify.sparse_elected(whole=_TIES, alone=_DELLA_LINEAR),
)  # fmt: skip
_BREADCRUMBS_LINEAR = _method(
    "breadcrumbs", _SUM + _MIDDLE, _BREADCRUMBS,
    DENSITY, GAMMA, LAMBDA, normalize(False), rescale(False),
    engine=Engine("task_arithmetic", "magnitude", "outliers", on_gpu=True),
    simplify=simplify.sparse(whole=TASK_ARITHMETIC),
)  # fmt: skip
_BREADCRUMBS_TIES = _method(
    "breadcrumbs_ties", _ELECTED + _MIDDLE, _BREADCRUMBS,
    DENSITY, GAMMA, LAMBDA, normalize(False), rescale(False),
    engine=Engine("ties", "magnitude", "outliers", on_gpu=True),
    simplify=simplify.sparse_elected(whole=_TIES, alone=_BREADCRUMBS_LINEAR),
)  # fmt: skip
_SCE = _method(
    "sce",
    "b + Σ_{i ∈ A} vᵢ δᵢ / Σ_{i ∈ A} vᵢ,  vᵢ = mean δᵢ²,  where δ varies most among sources",
    "Wan et al. 2024, FuseChat, arXiv 2408.07990",
    part("select_topk", 1.0, 0.5, "fraction of the elements to merge", field="select_topk"),
    weighted=False,
    engine=Engine("sce", "variance", "sce"),
    simplify=simplify.sce,
)
_RAM = _method(
    "ram",
    "b + the mean of those δᵢ with |δᵢ| > ε",
    "2026, Reinforced Agent Merging, arXiv 2601.13572",
    part("epsilon", 1e-5, 1e-5, "differences up to this are ignored", field="params.epsilon"),
    weighted=False,
    engine=Engine("ram", on_gpu=True),
    simplify=simplify.ram,
)
_MODEL_STOCK = _method(
    "model_stock",
    "t Σ xᵢ / n + (1 − t) b,  t = n c / (1 + (n − 1) c),  c = the mean cosine of pairs of δ",
    _STOCK,
    flag("filter_wise", False, "one t for each row, not one for the tensor", gpu_value=0.0),
    weighted=False,
    sources=(2, MAX_SOURCES),
    engine=Engine("task_arithmetic", analysis="sphere", sphere="model_stock", on_gpu=True),
    simplify=simplify.one_of_equals,
)
_STOCK_WHOLE = _method(
    "stock", "model_stock for whole tensors", _STOCK,
    weighted=False, sources=(2, MAX_SOURCES), engine=_MODEL_STOCK.engine,
    simplify=simplify.same_as(_MODEL_STOCK), in_mergekit=False,
)  # fmt: skip
_NEARSWAP = _method(
    "nearswap",
    "b + min(1, t / |δ|) δ",
    "alchemonaut 2024, QuartetAnemoi-70B-t0.0001",
    Parameter(
        "t", None, 0.0, 1e6, (1e-4,), "differences up to this are taken whole", field="params.t"
    ),
    weighted=False,
    sources=(1, 1),
    engine=Engine("nearswap", on_gpu=True),
    simplify=simplify.swapped_near,
)
_ARCEE_FUSION = _method(
    "arcee_fusion",
    "b + δ where |δ| KL(softmax x ‖ softmax b) ≥ median + 1.5 · interquartile range",
    "Arcee AI 2024, Arcee Fusion, in mergekit",
    weighted=False,
    sources=(1, 1),
    engine=Engine("task_arithmetic", "importance", "fusion"),
    simplify=simplify.one_is_base,
)
_WIDEN = _method(
    "widen",
    "b + Σ sᵢ δᵢ,  sᵢ from how far magnitude and direction of each column moved",
    "Yu et al. 2024, Extend Model Merging via Weight Disentanglement, arXiv 2408.03092",
    Parameter(
        "above_average_value_ratio", 1.0, 0.0, 1000.0, (1.0,),
        "a column that moved more than this many times the average is important",
        field="widen_ratio",
    ),
    Parameter(
        "score_calibration_value", 1.0, -100.0, 100.0, (1.0,), "the score of important columns",
        field="widen_calibration",
    ),
    flag("by_rows", False, "rows instead of columns, as the paper does for embeddings"),
    weighted=False,
    sources=(1, MAX_SOURCES - 1),  # the base is one more vector
    engine=Engine("task_arithmetic", analysis="widen"),
    simplify=simplify.widen,
    in_mergekit=False,
)  # fmt: skip
_FISHER = _method(
    "fisher",
    "Σ wᵢ max(Fᵢ, ε) xᵢ / Σ wᵢ max(Fᵢ, ε),  Fᵢ = the diagonal of the Fisher information",
    "Matena and Raffel 2021, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
    Parameter(
        "floor", 1e-6, 0.0, 1e6, (1e-6,), "lower bound of the information, whose mean is 1",
        field="params.epsilon",
    ),
    base="never",
    engine=Engine("fisher"),
    statistics="elements",
    mean=True,
    simplify=simplify.in_proportion,
    in_mergekit=False,
)  # fmt: skip
_REGMEAN = _method(
    "regmean",
    "(Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ xᵢ,  Gᵢ = the Gram matrix of the inputs; the mean where there is none",
    "Jin et al. 2022, Dataless Knowledge Fusion by Merging Weights, arXiv 2212.09849",
    part("reduce_non_diagonal_ratio", 0.9, 0.9, "factor on G's off-diagonal elements"),
    base="never",
    is_linear_solve=True,
    statistics="inputs",
    mean=True,
    simplify=simplify.in_proportion,
    in_mergekit=False,
)

_TABLE = (
    LINEAR, TASK_ARITHMETIC, _SLERP, _TIES, _AVERAGE, _NUSLERP, _MULTISLERP, _KARCHER, _DARE_LINEAR,
    _DARE_TIES, _DELLA_TIES, _DELLA_LINEAR, _BREADCRUMBS_LINEAR, _BREADCRUMBS_TIES, _SCE, _RAM,
    _MODEL_STOCK, _STOCK_WHOLE, _NEARSWAP, _ARCEE_FUSION, _WIDEN, _FISHER, _REGMEAN,
)  # fmt: skip
"""In the order used by a search with `methods: all` and by messages."""

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
CALIBRATED = tuple(name for name, method in METHODS.items() if method.is_calibrated)
"""The names of the methods that need statistics of a text."""


def get_method(name: object, where: str = "") -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; the message suggests the closest name.
    """
    if name not in METHODS:
        raise unknown("merge method", name, METHODS, where)
    return METHODS[str(name)]
