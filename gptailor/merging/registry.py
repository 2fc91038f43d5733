"""The merge methods, each declared once: for the recipe, for the stitcher and for the search.

A method says which sources it takes, which parameters with which bounds, what it computes and who
published it. Names, parameters and defaults are mergekit's where mergekit has the method;
`stock` and `widen` are those of the code published with GPTailor. The formulas themselves stand in
`csrc` (fast) and in `reference.py` (slow, float64).

In the formulas b is the base, xᵢ a source, wᵢ its weight and δᵢ = xᵢ − b.
"""

from __future__ import annotations

from typing import Literal

from gptailor.errors import unknown
from gptailor.merging.method import (
    WEIGHT_BOUNDS,
    Method,
    Parameter,
    Value,
    checked_number,
    checked_weight,
    for_each,
)

__all__ = [
    "METHODS",
    "WEIGHT_BOUNDS",
    "Method",
    "Parameter",
    "Value",
    "checked_number",
    "checked_weight",
    "for_each",
    "get_method",
]

MAX_SOURCES = 16
"""How many sources the engine takes, the base not among them."""


def _flag(name: str, default: bool, doc: str, is_late: bool = False) -> Parameter:
    value = float(default)
    return Parameter(name, value, 0.0, 1.0, (value,), doc, kind="flag", is_late=is_late)


def _normalize(default: bool) -> Parameter:
    return _flag("normalize", default, "divide by the sum of the weights that took part")


def _rescale(default: bool, is_late: bool = False) -> Parameter:
    doc = "multiply what is kept of a difference, so that the sum of its magnitudes stays"
    return _flag("rescale", default, doc, is_late)


def _part(name: str, default: float, search: float, doc: str, per_source: bool = True) -> Parameter:
    return Parameter(name, default, 0.0, 1.0, (search,), doc, per_source=per_source)


_LAMBDA = Parameter("lambda", 1.0, -100.0, 100.0, (1.0,), "factor on the merged difference")
_DENSITY = _part("density", 1.0, 0.5, "part of each difference that is kept")
_EPSILON = _part("epsilon", 0.15, 0.15, "how far probabilities lie around the density")
_GAMMA = _part("gamma", 0.01, 0.01, "part of each difference, its largest values, that is dropped")
_SEED = Parameter("seed", 0.0, 0.0, 2.0**53, (0.0,), "of the random choice", kind="integer")
_TASK_VECTORS = _flag("task_vectors", False, "merge the differences from the base instead")

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


def _weighted(
    name: str,
    formula: str,
    paper: str,
    *parameters: Parameter,
    sources: tuple[int, int] = (1, MAX_SOURCES),
    base: Literal["never", "always", "optional"] = "always",
) -> Method:
    return Method(name, formula, paper, parameters, True, *sources, base)


def _listed(
    name: str,
    formula: str,
    paper: str,
    *parameters: Parameter,
    sources: tuple[int, int] = (1, MAX_SOURCES),
    base: Literal["never", "always", "optional"] = "always",
) -> Method:
    return Method(name, formula, paper, parameters, False, *sources, base)


def _calibrated(name: str, formula: str, paper: str, *parameters: Parameter) -> Method:
    sources = (1, MAX_SOURCES)
    return Method(name, formula, paper, parameters, True, *sources, "never", is_calibrated=True)


_TABLE = (
    _weighted("linear", "Σ wᵢ xᵢ / Σ wᵢ", _SOUPS, _normalize(True), base="never"),
    _weighted(
        "task_arithmetic",
        "b + λ Σ wᵢ δᵢ",
        "Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089",
        _LAMBDA,
        _normalize(False),
    ),
    _listed(
        "slerp",
        "(sin((1−t)θ) x₀ + sin(tθ) x₁) / sin θ,  cos θ = x₀·x₁ / (‖x₀‖ ‖x₁‖)",
        "Shoemake 1985, Animating Rotation with Quaternion Curves, SIGGRAPH",
        Parameter("t", None, 0.0, 1.0, (0.5,), "0 is the first model, 1 the second"),
        sources=(2, 2),
        base="never",
    ),
    _weighted(
        "ties",
        "b + λ Σ_{i ∈ A} wᵢ dᵢ / Σ_{i ∈ A} wᵢ,  dᵢ = the largest part of δᵢ, "
        "A = the sources whose sign is that of Σ wᵢ dᵢ",
        "Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
        _DENSITY,
        _LAMBDA,
        _normalize(True),
        _rescale(False, is_late=True),
    ),
    _listed("average", "Σ xᵢ / n", _SOUPS, base="never"),
    _weighted(
        "nuslerp",
        "slerp with t = w₁ / (w₀ + w₁)",
        "Goddard 2024, NuSLERP, in mergekit",
        _flag("nuslerp_flatten", True, "one angle for the tensor, not one for each row"),
        _flag("nuslerp_row_wise", False, "angles of columns instead of rows, if not flattened"),
        _TASK_VECTORS,
        sources=(2, 2),
        base="optional",
    ),
    _weighted(
        "multislerp",
        "Σ wᵢ ‖xᵢ‖ · exp_m(Σ wᵢ tᵢ),  m = the mean direction of all xᵢ, tᵢ tangents at m",
        "Goddard 2025, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        _flag("normalize_weights", True, "divide the weights by their sum"),
        _part("eps", 1e-8, 1e-8, "norms below this are taken as zero", per_source=False),
        _TASK_VECTORS,
        base="optional",
    ),
    _listed(
        "karcher",
        "Σ ‖xᵢ‖ / n · the point on the sphere with the least Σ angle² to all xᵢ",
        "Karcher 1977, Riemannian center of mass and mollifier smoothing, CPAM 30",
        Parameter("max_iter", 10.0, 0.0, 10_000.0, (10.0,), "steps at most", kind="integer"),
        _part("tol", 1e-5, 1e-5, "a step shorter than this is the last", per_source=False),
        base="never",
    ),
    _weighted(
        "dare_linear", _SUM + _DROPPED, _DARE,
        _DENSITY, _LAMBDA, _normalize(False), _rescale(True), _SEED,
    ),
    _weighted(
        "dare_ties", _ELECTED + _DROPPED, _DARE,
        _DENSITY, _LAMBDA, _normalize(False), _rescale(True), _SEED,
    ),
    _weighted(
        "della", _ELECTED + _RANKED, _DELLA,
        _DENSITY, _EPSILON, _LAMBDA, _normalize(True), _rescale(True), _SEED,
    ),
    _weighted(
        "della_linear", _SUM + _RANKED, _DELLA,
        _DENSITY, _EPSILON, _LAMBDA, _normalize(False), _rescale(True), _SEED,
    ),
    _weighted(
        "breadcrumbs", _SUM + _MIDDLE, _BREADCRUMBS,
        _DENSITY, _GAMMA, _LAMBDA, _normalize(False), _rescale(False),
    ),
    _weighted(
        "breadcrumbs_ties", _ELECTED + _MIDDLE, _BREADCRUMBS,
        _DENSITY, _GAMMA, _LAMBDA, _normalize(False), _rescale(False),
    ),
    _listed(
        "sce",
        "b + Σ_{i ∈ A} vᵢ δᵢ / Σ_{i ∈ A} vᵢ,  vᵢ = mean δᵢ²,  where δ varies most among sources",
        "Wan et al. 2024, FuseChat, arXiv 2408.07990",
        _part("select_topk", 1.0, 0.5, "part of the elements that is merged", per_source=False),
    ),
    _listed(
        "ram",
        "b + the mean of those δᵢ with |δᵢ| > ε",
        "2026, Reinforced Agent Merging, arXiv 2601.13572",
        _part("epsilon", 1e-5, 1e-5, "differences up to this are none", per_source=False),
    ),
    _listed(
        "model_stock",
        "t Σ xᵢ / n + (1 − t) b,  t = n c / (1 + (n − 1) c),  c = the mean cosine of pairs of δ",
        _STOCK,
        _flag("filter_wise", False, "one t for each row, not one for the tensor"),
        sources=(2, MAX_SOURCES),
    ),
    _listed("stock", "model_stock for whole tensors", _STOCK, sources=(2, MAX_SOURCES)),
    _listed(
        "nearswap",
        "b + min(1, t / |δ|) δ",
        "alchemonaut 2024, QuartetAnemoi-70B-t0.0001",
        Parameter("t", None, 0.0, 1e6, (1e-4,), "differences up to this are taken whole"),
        sources=(1, 1),
    ),
    _listed(
        "arcee_fusion",
        "b + δ where |δ| KL(softmax x ‖ softmax b) ≥ median + 1.5 · interquartile range",
        "Arcee AI 2024, Arcee Fusion, in mergekit",
        sources=(1, 1),
    ),
    _listed(
        "widen",
        "b + Σ sᵢ δᵢ,  sᵢ from how far magnitude and direction of each column moved",
        "Yu et al. 2024, Extend Model Merging via Weight Disentanglement, arXiv 2408.03092",
        Parameter(
            "above_average_value_ratio", 1.0, 0.0, 1000.0, (1.0,),
            "a column that moved more than so many times the average is important",
        ),
        Parameter(
            "score_calibration_value", 1.0, -100.0, 100.0, (1.0,), "the score of important columns"
        ),
        _flag("by_rows", False, "rows in the place of columns, as the paper does for embeddings"),
        sources=(1, MAX_SOURCES - 1),  # the base is one more vector
    ),
    _calibrated(
        "fisher",
        "Σ wᵢ max(Fᵢ, ε) xᵢ / Σ wᵢ max(Fᵢ, ε),  Fᵢ = the diagonal of the Fisher information",
        "Matena and Raffel 2021, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832",
        Parameter("floor", 1e-6, 0.0, 1e6, (1e-6,), "no information is less; the mean is 1"),
    ),
    _calibrated(
        "regmean",
        "(Σ wᵢ Gᵢ)⁻¹ Σ wᵢ Gᵢ xᵢ,  Gᵢ = the Gram matrix of the inputs; the mean where there is none",
        "Jin et al. 2022, Dataless Knowledge Fusion by Merging Weights, arXiv 2212.09849",
        _part(
            "reduce_non_diagonal_ratio", 0.9, 0.9, "factor on what is off G's diagonal",
            per_source=False,
        ),
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def get_method(name: object, where: str = "") -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; the message has the nearest right name.
    """
    if name not in METHODS:
        raise unknown("merge method", name, METHODS, where)
    return METHODS[str(name)]
