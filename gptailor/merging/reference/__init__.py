"""A slow reference implementation of the merge formulas, the oracle for `csrc/formulas.h`.

It uses numpy only. By default everything is computed in float64; `dtype=np.float32` computes the
same steps in the same order as the compiled code, which then agrees to the last bit for the
elementwise methods (sums over a whole tensor or row are float64 in both). Nothing is rounded to a
storage type here.

Shapes: x_SN is S sources of any shape N, base_N the base, w_S the weights. Where rows or columns
matter, R and C are their numbers; a row runs along the last dimension.
NaN is not checked for and passes through.

`merge` takes any method by name. Each formula is also a function of its own, with its equation and
its paper, that registers itself under the names of its methods. All files of this folder are
imported.
"""

import importlib
import pkgutil

from .averages import TINY, Array, average, linear
from .calibrated import fisher, regmean
from .entry import merge
from .formulas import FORMULAS
from .selections import arcee_fusion, nearswap, ram, sce
from .sparsifiers import (
    cut_outliers,
    drop,
    drop_by_magnitude,
    keep_probabilities,
    kept,
    rescaled,
    trim,
)
from .spheres import PARALLEL, karcher, model_stock, multislerp, nuslerp, slerp, slerp_weights
from .task_vectors import breadcrumbs, dare, della, task_arithmetic, ties
from .widening import widen

__all__ = [
    "FORMULAS",
    "PARALLEL",
    "TINY",
    "Array",
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "cut_outliers",
    "dare",
    "della",
    "drop",
    "drop_by_magnitude",
    "fisher",
    "karcher",
    "keep_probabilities",
    "kept",
    "linear",
    "merge",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "regmean",
    "rescaled",
    "sce",
    "slerp",
    "slerp_weights",
    "task_arithmetic",
    "ties",
    "trim",
    "widen",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
