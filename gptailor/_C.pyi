"""The compiled extension: input files, byte ranges copied between files, and merges of tensors.

No function here knows about models or layers. Offsets and sizes are in bytes unless a name says
`element`. A dtype is a name as safetensors spells it: `BOOL`, `U8`, `I8`, `F8_E4M3`, `F8_E5M2`,
`F8_E8M0`, `I16`, `U16`, `F16`, `BF16`, `I32`, `U32`, `F32`, `I64`, `U64`, `F64`, `C64`, and the
sub-byte `F4`, `F6_E2M3`, `F6_E3M2`. Importing the module starts no thread and touches no GPU.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypedDict

class NanError(ValueError):
    """A NaN in an input of a merge, or one that infinities in the inputs would produce.

    Attributes:
        source: index of the input (0-based), `"base"`, or `"result"` when no input is NaN but the
            result is (an infinity minus an infinity).
        element: index of the first such element in the flattened tensor, 0-based.
    """

    source: int | Literal["base", "result"]
    element: int

class RangeError(ValueError):
    """A finite number that is too large for a result in float16.

    Attributes:
        is_input: True if it is an element of a single input that is cast; otherwise it was
            computed.
        element: index of the first such element in the flattened tensor, 0-based.
    """

    is_input: bool
    element: int

class SupportsDLPack(Protocol):
    """A tensor of any library that implements DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Tensor:
    """A typed, shaped, contiguous view of bytes in CPU memory.

    It owns no bytes, but keeps their owner (file, buffer or foreign tensor) alive. It may start at
    any byte; alignment is not needed. `torch.from_dlpack(t)` views the same bytes and keeps the
    owner alive in turn; writing through it works for a `Buffer` and crashes (SIGSEGV) for a
    `MappedFile`, whose pages are read-only. For a `FileReader`'s tensor it returns a copy.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, outermost first; `()` is a scalar."""
    @property
    def dtype(self) -> str:
        """Name of the element type, as safetensors spells it."""
    @property
    def n_elements(self) -> int:
        """The product of the shape."""
    @property
    def n_bytes(self) -> int:
        """Size of the viewed bytes."""
    @staticmethod
    def from_dlpack(tensor: SupportsDLPack) -> Tensor:
        """View a contiguous CPU tensor of another library (torch, numpy) without a copy.

        Raises:
            BufferError: the tensor is not contiguous, not in CPU memory, or has an unknown dtype.
        """
    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: object = None,
        dl_device: object = None,
        copy: object = None,
    ) -> Any:
        """Return a `dltensor` capsule that keeps the bytes alive. The arguments are ignored.

        Raises:
            BufferError: DLPack has no such dtype (`F4`, `F6_E2M3`, `F6_E3M2`).
            OSError: the bytes of a `FileReader` can't be read.
        """
    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (1, 0): CPU memory."""
    def check_intact(self) -> None:
        """Raise `OSError` if its file has changed, see `InputFile`; no effect for other owners."""

class InputFile:
    """A regular file that stays open for reading until the object and all its tensors are gone.

    It must not change for that long. If it became shorter, or the disk fails, `read`, merges and
    `check_intact` raise an `OSError` (`ESTALE`). There is never a SIGBUS; views read zeros instead,
    which only `check_intact` reports.
    """

    @property
    def path(self) -> str:
        """The path that was given."""
    @property
    def size(self) -> int:
        """Size of the file in bytes when it was opened."""
    @property
    def io(self) -> str:
        """`mmap`, `pread` or `direct`: the way that is actually used."""
    def fileno(self) -> int:
        """The file descriptor, borrowed."""
    def read(self, offset: int, n_bytes: int) -> bytes:
        """Copy a byte range.

        Raises:
            ValueError: the range is not within the file.
            OSError: it can't be read; `ESTALE` if the file became shorter.
        """
    def tensor(self, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """View a byte range as a tensor. Nothing is read yet.

        Raises:
            ValueError: unknown dtype, negative dimension, too many elements, or the range is not
                within the file.
        """
    def check_intact(self) -> None:
        """Raise `OSError` (`ESTALE`) if the file's size or time of change differs from when opened.

        To be called after views of a mapping were read (by torch, say), before the result is used.
        """

class MappedFile(InputFile):
    """A read-only memory map of a whole file; its tensors are views, without a copy.

    The first one installs a handler for SIGBUS in the process. A fault inside a mapping replaces
    the rest of it with zeros and marks it; other faults go to the previous handler, once. A library
    that handles SIGBUS itself should install its handler before the first file is mapped; if it
    does so later, the next mapping puts ours on top again.

    Raises:
        OSError: with errno and path; it is missing, unreadable or not a regular file.
    """

    def __init__(self, path: str | PathLike[str]) -> None: ...

class FileReader(InputFile):
    """A file that is not mapped but read in large pieces, with read-ahead hints.

    Merges read its tensors piece by piece; `torch.from_dlpack` returns a copy in memory.

    Args:
        path: the file.
        direct: bypass the page cache (`O_DIRECT`); `io` is `pread` if that is not possible.

    Raises:
        OSError: as for `MappedFile`.
    """

    def __init__(self, path: str | PathLike[str], *, direct: bool = False) -> None: ...

def open_input(path: str | PathLike[str], io: str = "auto") -> InputFile:
    """Open a file for `mmap`, `pread` or `direct` reading.

    `auto` is pread on network file systems (NFS, Lustre, GPFS, BeeGFS, Ceph, SMB, FUSE, …), where
    each page fault is a round trip, and mmap on all others.

    Raises:
        OSError: as for `MappedFile`.
        ValueError: there is no such `io`.
    """

def io_of_file_system(type: int) -> str:
    """Return what `auto` means for an `f_type` from statfs(2)."""

class Buffer:
    """Anonymous writable memory, zeroed and page-aligned; supports the buffer protocol (`uint8`).

    `memoryview(buffer)` and tensors from it keep it alive.

    Raises:
        MemoryError: there is not enough memory.
        ValueError: `n_bytes` is negative.
    """

    def __init__(self, n_bytes: int) -> None: ...
    @property
    def size(self) -> int:
        """Size in bytes."""
    def tensor(self, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """View a byte range as a tensor, without a copy.

        Raises:
            ValueError: unknown dtype, negative dimension, too many elements, or the range is not
                within the buffer.
        """
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Merge:
    """One merged tensor: values that need the whole inputs are computed at once, slices on demand.

    The methods, their parameters and their formulas are those of `gptailor.merging`. They are
    computed in float32, in the order of the sources, without fused multiply-adds (sums over whole
    tensors in float64, in a fixed order), and rounded once to `out_dtype` (to nearest, ties to
    even; out of range to infinity). The result does not depend on the number of threads, the slices
    in which it is computed, or the CPU. One exception: the few coefficients of methods on spheres,
    and widen's scores, use the C library's sine, arc cosine and exponential, whose last float64 bit
    may differ elsewhere, which rarely changes a coefficient's float32.

    `linear` with one source of weight 1 and without `normalize` computes nothing: it copies the
    bytes, or only casts them.

    Where magnitudes are ranked (`ties`, `breadcrumbs`, `sce`), everything as large as the smallest
    that is kept stays, too, so that the choice depends on values only. Random masks depend only on
    seed, key, source and element.

    Args:
        method: a name; the message about an unknown one lists them.
        sources: 1 to 16 tensors with the same number of elements, each `F32`, `F16` or `BF16`;
            shapes are not compared. Kept alive.
        base: the same kind of tensor, for the methods that take one.
        statistics: fisher only: one of the same kind for each source, its Fisher information.
        out_dtype: `F32`, `F16` or `BF16`.
        weights: one for each source; empty means 1 for each.
        parameters: by name; a number, or a sequence with one for each source. Flags are 0 or 1.
        factor: on the whole result, before it is rounded.
        row_length: the row length of methods that work by row, in elements; 0 means the last
            dimension of the first source.
        key: 64 bits that identify the tensor in random masks.
        check_nan: raise if the result would be NaN. Without it NaN and infinity pass through.
        check_overflow: raise if a finite result is too large for float16. Without it that becomes
            infinity. Infinities in an input may stay.
        threads: the maximum number; 0 means one for each core that the process may use. Small
            tensors are merged in the calling thread.

    Raises:
        NanError: a method that needs the whole inputs found a NaN in them, or an infinity that
            produces one.
        OSError: an input that is not mapped can't be read; ESTALE if its file has changed.
        ValueError: an argument is out of range; sizes or numbers of values differ; the directions
            that multislerp should average cancel out.
    """

    def __init__(
        self,
        method: str,
        sources: Sequence[Tensor],
        base: Tensor | None = None,
        *,
        statistics: Sequence[Tensor] = (),
        out_dtype: str,
        weights: Sequence[float] = (),
        parameters: Mapping[str, float | Sequence[float]] = {},
        factor: float = 1.0,
        row_length: int = 0,
        key: int = 0,
        check_nan: bool = True,
        check_overflow: bool = True,
        threads: int = 0,
    ) -> None: ...
    @property
    def n_elements(self) -> int:
        """Number of elements of the result."""
    def run(self, begin: int, count: int, out: Buffer, out_offset: int = 0) -> None:
        """Write elements [begin, begin + count) of the result to `out` from byte `out_offset`.

        Releases the GIL. Several threads may run one Merge at the same time, into disjoint bytes.

        Raises:
            NanError: an element of the slice is NaN; the contents of `out` are then undefined.
            RangeError: an element is too large for float16; likewise.
            OSError: as above.
            ValueError: the elements are not within the tensor, or the bytes not within `out`, or
                they overlap an input.
        """
    def write(self, begin: int, count: int, fd: int, offset: int) -> None:
        """Write elements [begin, begin + count) of the result to a file, from byte `offset`.

        Each thread writes what it has computed while the others compute: 1 MiB at a time for two
        bytes per element. Otherwise like `run`.

        Raises:
            OSError: with the errno of the write that failed; part of the range may have been
                written.
        """

def copy_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, n_bytes: int) -> str:
    """Copy a byte range between two open files, without moving their positions.

    Tries copy_file_range (which may share blocks or copy on a file server), then sendfile, then
    pread and pwrite. Releases the GIL; checks for signals every 64 MiB, so Ctrl-C ends it.

    Args:
        src_fd, dst_fd: file descriptors, borrowed; `dst_fd` must not be opened for appending.
        src_offset, dst_offset, n_bytes: in bytes. The destination grows if needed.

    Returns:
        The method used last: `copy_file_range`, `sendfile` or `pread/pwrite`.

    Raises:
        OSError: with the errno of the call that failed (`ENOSPC`, …); `EIO` if the source ends
            before `n_bytes`. Part of the range may have been written.
        ValueError: a negative number, ranges that overlap in one file, or a destination that
            appends.
    """

class DeviceTensor:
    """A typed, shaped, contiguous view of GPU memory, for tensors that are passed repeatedly.

    It keeps the foreign tensor alive.
    """

    @staticmethod
    def from_dlpack(tensor: SupportsDLPack) -> DeviceTensor:
        """View a contiguous tensor on a GPU without a copy, and without waiting for any stream.

        Raises:
            BufferError: the tensor is not contiguous, not on a CUDA device, or has an unknown
                dtype.
        """
    @property
    def device(self) -> int:
        """Index of the GPU."""
    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, outermost first."""
    @property
    def dtype(self) -> str:
        """Name of the element type, as safetensors spells it."""
    @property
    def n_bytes(self) -> int:
        """Size of the viewed bytes."""
    def tensor(self, offset: int, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """View a byte range as a tensor.

        Raises:
            ValueError: unknown dtype, negative dimension, too many elements, or the range is not
                within the tensor.
        """

def start_write_back(fd: int, offset: int, n_bytes: int) -> None:
    """Start writing a byte range of a file back to disk, without waiting (sync_file_range).

    Raises:
        OSError: the descriptor or the range is wrong, or an earlier write failed.
    """

def merge_cuda(
    method: str,
    outs: Sequence[SupportsDLPack | DeviceTensor],
    sources: Sequence[Sequence[SupportsDLPack | DeviceTensor]],
    bases: Sequence[SupportsDLPack | DeviceTensor] | None = None,
    *,
    weights: Sequence[float] = (),
    parameters: Mapping[str, float | Sequence[float]] = {},
    factor: float = 1.0,
    keys: Sequence[int] = (),
    found: SupportsDLPack | DeviceTensor | None = None,
    stream: int = 0,
) -> None:
    """Merge a list of tensors on one GPU with one method and one set of parameters.

    The elementwise part is one kernel launch for the whole list; methods that need whole tensors
    run their reductions before it. The call only queues work on `stream` and returns; the
    page-locked and device memory that it needs is kept from call to call.

    Results are bit-identical to those of `Merge` for linear, task_arithmetic, ties, dare_linear,
    dare_ties, breadcrumbs, breadcrumbs_ties, ram and nearswap. slerp, nuslerp, multislerp, karcher,
    model_stock and stock compute the same sums, but derive coefficients from them with the GPU's
    sine and cosine, so these may differ in the last bit. The other methods, and those that work by
    rows or columns, have no GPU path.

    Args:
        method, weights, parameters, factor: as for `Merge`.
        outs: one contiguous CUDA tensor to write for each result; its dtype is the output's.
        sources: the sources of each result, 1 to 16, the same number for all.
        bases: one for each result, for the methods that take one.
        keys: 64 bits for each result, for random masks; empty means 0 for each.
        found: an I32 tensor of two elements for each result: the first is set to 1 if the result
            holds a NaN, the second if a finite number is too large for float16; otherwise they are
            unchanged. Without it neither is checked.
        stream: a CUDA stream handle (`torch.cuda.current_stream().cuda_stream`). All tensors must
            be ready in that stream's order, and stay alive until it has done the work.

    Raises:
        RuntimeError: CUDA's message and the operation that failed; or the extension was built
            without CUDA.
        ValueError: as for `Merge`; the method has no GPU path; or a tensor is not on the same CUDA
            device as the others.
        BufferError: a tensor is not contiguous.
    """

class DeviceLoader:
    """Reads byte ranges of files into tensors on a GPU, or into CPU memory.

    Several threads `pread` large chunks into page-locked buffers, two for each thread; one buffer
    is copied to the GPU while the other is filled. The buffers are allocated once, in the
    constructor. For CPU memory, bytes are read directly to their destination.

    Args:
        device: index of the GPU; None for CPU memory.
        way: `pread`; `direct` bypasses the page cache if the file system supports it (O_DIRECT);
            `pinned` maps files and page-locks them, so that the GPU reads the page cache directly
            (they stay page-locked for as long as the loader lives); `auto` does that with files
            that are in the page cache, within `pin_bytes` and if the driver agrees, and `pread`s
            the others.
        threads: the number of reading threads; 0 means one for each core that the process may use,
            at most 8.
        buffer_bytes: the size of one buffer, and of the largest read.
        pin_bytes: how many bytes of mapped files `auto` may keep page-locked.

    Raises:
        MemoryError: there is no memory for the buffers.
        RuntimeError: CUDA's message and the operation that failed; or the extension was built
            without CUDA.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        device: int | None,
        *,
        way: str = "auto",
        threads: int = 0,
        buffer_bytes: int = 8388608,
        pin_bytes: int = 0,
    ) -> None: ...
    def load(
        self,
        requests: Sequence[tuple[str | PathLike[str], int, SupportsDLPack]],
        *,
        stream: int = 0,
    ) -> None:
        """Fill each tensor with the bytes of a file, starting at an offset.

        Returns when everything is read and the last copy is queued (for CPU memory, done).
        Releases the GIL; one call at a time, others wait. A file that became shorter is an error,
        never a SIGBUS.

        Args:
            requests: (path, offset in bytes, contiguous writable tensor on the loader's device) for
                each range; as many bytes are read as the tensor has. Ranges that are adjacent both
                in the file and in memory are copied together.
            stream: a CUDA stream handle; the tensors must be ready in its order, and stay alive
                until it has done the copies.

        Raises:
            BufferError: a tensor is not contiguous.
            OSError: with errno and path; `ESTALE` if a file became shorter while it was read.
            RuntimeError: CUDA's message and the operation that failed.
            ValueError: a range is not within its file; a tensor is on another device.
        """
    @property
    def loaded(self) -> dict[str, int]:
        """Bytes loaded each way so far: `pinned`, `pread`, `direct`."""

def cuda_device_count() -> int:
    """Return how many GPUs can be used: 0 without a GPU, a driver, or CUDA in the build."""

class BuildInfo(TypedDict):
    """What `build_info` returns."""

    cuda: bool
    cuda_version: str | None
    cuda_archs: str
    compiler: str
    simd: str
    max_sources: int
    methods_digest: str

def build_info() -> BuildInfo:
    """Return how the extension was built.

    `cuda_archs` is like `"80,90"` or empty; `simd` is the instruction set used on this machine:
    `portable`, `avx2` or `avx512` (the environment variable `GPTAILOR_SIMD` can name a lower one).
    `methods_digest` identifies the method declarations that it was built from.
    """
