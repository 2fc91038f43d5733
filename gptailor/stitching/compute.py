"""A computed tensor: merged, cast or scaled by the compiled engine, from the mapped sources.

The one place where a plan meets `_C.Merge`. The writer computes a tensor in slices and the
resident model as a whole, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptailor.errors import ModelError, UsageError
from gptailor.models.checkpoint import read_error
from gptailor.models.family import Family
from gptailor.recipe import NO_LAYER, Merge
from gptailor.stitching.plan import OutTensor, Source

if TYPE_CHECKING:
    from gptailor import _C


class ComputedTensor:
    """One tensor of a plan that is not a plain copy.

    Args:
        tensor: what to compute.
        family: holds the sources.
        threads: 0 for as many as there are cores; their number changes no bit.
        opened: gives the tensor of a source; default: a view on its mapped file.

    Raises:
        ModelError: a source of a merge holds NaN (the message names file and tensor), or a file
            changed or can't be read.
    """

    def __init__(
        self,
        tensor: OutTensor,
        family: Family,
        threads: int = 0,
        opened: Callable[[Source], _C.Tensor] | None = None,
    ) -> None:
        from gptailor import _C

        opened = opened or (lambda source: _open(source, family))
        self.tensor = tensor
        method, arguments = merge_arguments(tensor)
        base = None if tensor.base is None else opened(tensor.base)
        try:
            self._job = _C.Merge(
                method,
                [opened(source) for source in tensor.sources],
                base,
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
            ModelError: a source of a merge holds NaN, or a file changed or can't be read.
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
            return UsageError(f"{self.tensor.name} can't be built: {error}.")
        index = getattr(error, "source", None)
        source = self.tensor.base if index == "base" else self.tensor.sources[0]
        if isinstance(index, int):
            source = self.tensor.sources[index]
        info = (source or self.tensor.sources[0]).info
        return ModelError(f"{info.path}: {info.name} can't be merged: {error}.")


def merge_arguments(tensor: OutTensor) -> tuple[str, dict[str, Any]]:
    """The engine's method for a tensor, and its arguments `weights`, `parameters` and `factor`.

    Rows of methods that work by row are the last dimension of the sources, as the engine has it.
    """
    merge = tensor.merge or Merge("linear", NO_LAYER, (("", 1.0),), (("normalize", 0.0),))
    return merge.method, {
        "weights": [weight for _, weight in merge.weights],
        "parameters": dict(merge.parameters),
        "factor": tensor.factor,
    }


def _open(source: Source, family: Family) -> _C.Tensor:
    return family.candidates[source.model].checkpoint.tensor(source.info.name)
