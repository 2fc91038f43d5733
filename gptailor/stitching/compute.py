"""A computed tensor: merged, cast or scaled by the compiled engine, from the mapped sources.

Only this module calls `_C.Merge`, or `RegMean` for the method that is a linear solve. The writer
computes a tensor in slices and the resident model as a whole, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptailor.errors import ModelError, UsageError
from gptailor.merging.registry import LINEAR, get_method
from gptailor.models.checkpoint import read_error
from gptailor.models.family import Family
from gptailor.recipe import DTYPES, NO_LAYER, Merge
from gptailor.stitching.copying import write_all
from gptailor.stitching.plan import OutTensor, Source

if TYPE_CHECKING:
    import torch

    from gptailor import _C

_TORCH_NAMES = {name: torch_name for torch_name, name in DTYPES.items()}


class ComputedTensor:
    """One tensor of a plan that is not a plain copy.

    Args:
        tensor: the tensor to compute.
        family: the candidates with the sources.
        threads: 0 for as many as there are cores; the number does not change the result.
        opened: returns the tensor of a source; default: a view of its mapped file.

    Raises:
        ModelError: a source of a merge holds NaN, or a number becomes too large for float16 (the
            message names file and tensor), or a file has changed or can't be read.
        GptailorError: the engine was built for other merge methods.
    """

    def __init__(
        self,
        tensor: OutTensor,
        family: Family,
        threads: int = 0,
        opened: Callable[[Source], _C.Tensor] | None = None,
    ) -> None:
        from gptailor import _C
        from gptailor.merging.engine_table import check_engine

        check_engine()
        opened = opened or (lambda source: _open(source, family))
        self.tensor = tensor
        method, arguments = merge_arguments(tensor)
        base = None if tensor.base is None else opened(tensor.base)
        sources = [opened(source) for source in tensor.sources]
        statistics = [
            family.candidates[source.model].checkpoint.tensor_at(info)
            for source, info in zip(tensor.sources, tensor.statistics, strict=False)
        ]
        self._job: _C.Merge | RegMean
        if get_method(method).is_linear_solve:
            self._job = RegMean(sources, statistics, out_dtype=tensor.dtype, **arguments)
            return
        try:
            self._job = _C.Merge(
                method,
                sources,
                base,
                statistics=statistics,
                out_dtype=tensor.dtype,
                key=tensor.key,
                check_nan=tensor.merge is not None,
                threads=threads,
                **arguments,
            )
        except ValueError as error:
            raise self._explained(error) from error
        except OSError as error:
            raise read_error(error) from error

    @property
    def n_elements(self) -> int:
        """The number of elements."""
        return self._job.n_elements

    def run(self, begin: int, count: int, out: _C.Buffer) -> None:
        """Computes elements [begin, begin + count) into the start of `out`.

        Raises:
            ModelError: a source of a merge holds NaN, a number is too large for float16, or a file
                has changed or can't be read.
        """
        try:
            self._job.run(begin, count, out, 0)
        except ValueError as error:
            raise self._explained(error) from error
        except OSError as error:
            raise read_error(error) from error

    def write(self, fd: int, offset: int) -> None:
        """Computes the whole tensor into an open file, computing and writing at the same time.

        Raises:
            ModelError: as for `run`.
            OSError: writing failed.
        """
        try:
            self._job.write(0, self.n_elements, fd, offset)
        except ValueError as error:
            raise self._explained(error) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise read_error(error) from error

    def _explained(self, error: ValueError) -> Exception:
        from gptailor import _C

        if not isinstance(error, _C.NanError):
            if isinstance(error, _C.RangeError):
                return ModelError(f"{origin(self.tensor)}: {error}: use dtype bfloat16.")
            return UsageError(f"{self.tensor.name} can't be built: {error}.")
        index = getattr(error, "source", None)
        source = self.tensor.base if index == "base" else self.tensor.sources[0]
        if isinstance(index, int):
            source = self.tensor.sources[index]
        info = (source or self.tensor.sources[0]).info
        return ModelError(f"{info.path}: {info.name} can't be merged: {error}.")


def origin(tensor: OutTensor) -> str:
    """Where a tensor of a result comes from, for errors."""
    info = tensor.sources[0].info
    if tensor.merge is None:
        return f"{info.path}: {info.name}"
    models = [source.model for source in (*tensor.sources, tensor.base) if source is not None]
    return f"{info.name}, merged from {', '.join(models)}"


class RegMean:
    """The counterpart of `_C.Merge` for the method that is a linear solve, done on first use.

    Args:
        sources, statistics: the matrices and the Gram matrices of their inputs.
        out_dtype, weights, parameters, factor: as for `_C.Merge`.
    """

    def __init__(
        self,
        sources: Sequence[_C.Tensor],
        statistics: Sequence[_C.Tensor],
        *,
        out_dtype: str,
        weights: Sequence[float],
        parameters: Mapping[str, Any],
        factor: float,
    ) -> None:
        self.n_elements = sources[0].n_elements
        self._inputs = (sources, statistics, weights)
        self._ratio: float = parameters["reduce_non_diagonal_ratio"]
        self._factor = factor
        self._out_dtype = out_dtype
        self._solved: torch.Tensor | None = None

    def run(self, begin: int, count: int, out: _C.Buffer, out_offset: int) -> None:
        """Like `_C.Merge.run`.

        Raises:
            NanError: an input holds NaN or infinity.
            RangeError: the result is too large for float16.
            ValueError: the Gram matrices do not determine the result.
        """
        data = self._bytes(begin, count)
        memoryview(out)[out_offset : out_offset + len(data)] = data

    def write(self, begin: int, count: int, fd: int, offset: int) -> None:
        """Like `_C.Merge.write`; raises as `run` does, or OSError."""
        write_all(fd, self._bytes(begin, count), offset)

    def _bytes(self, begin: int, count: int) -> memoryview:
        import torch

        from gptailor import _C

        if self._solved is None:
            self._solved = self._solve()
        exact = self._solved[begin : begin + count]
        rounded = exact.to(getattr(torch, _TORCH_NAMES[self._out_dtype]))
        if (rounded.isinf() & exact.isfinite()).any():
            place = int((rounded.isinf() & exact.isfinite()).nonzero()[0])
            raise _C.RangeError(
                f"element {begin + place} is {float(exact[place]):g}, but the largest number in "
                "float16 is 65504"
            )
        data: memoryview = rounded.view(torch.uint8).numpy().data
        return data

    def _solve(self) -> torch.Tensor:
        """The flattened result in float32, from which it is rounded like everything else."""
        import torch.utils.dlpack

        from gptailor import _C
        from gptailor.merging.regmean import regmean

        sources, statistics, weights = self._inputs
        x_SOI, gram_SII = (
            [torch.utils.dlpack.from_dlpack(t) for t in some] for some in (sources, statistics)
        )
        for index, pair in enumerate(zip(x_SOI, gram_SII, strict=True)):
            for what, data in zip(("a weight", "a Gram matrix"), pair, strict=True):
                if not torch.isfinite(data).all():
                    error = _C.NanError(f"{what} is NaN or infinite")
                    error.source = index
                    raise error
        y_OI = regmean(x_SOI, gram_SII, weights, self._ratio)
        return (y_OI * self._factor).float().flatten()


def merge_arguments(tensor: OutTensor) -> tuple[str, dict[str, Any]]:
    """The engine's method for a tensor, and its arguments `weights`, `parameters` and `factor`.

    For methods that work by row, a row is the last dimension of the sources, the engine's default.
    """
    merge = tensor.merge or Merge(LINEAR.name, NO_LAYER, (("", 1.0),), (("normalize", 0.0),))
    return merge.method, {
        "weights": [weight for _, weight in merge.weights],
        "parameters": dict(merge.parameters),
        "factor": tensor.factor,
    }


def _open(source: Source, family: Family) -> _C.Tensor:
    return family.candidates[source.model].checkpoint.tensor_at(source.info)
