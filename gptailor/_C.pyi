"""The compiled extension: input files, byte ranges copied between files, and merges of tensors.

No function here knows of models or layers. Offsets and sizes are in bytes unless a name says
`element`. A dtype is a name as safetensors spells it: `BOOL`, `U8`, `I8`, `F8_E4M3`, `F8_E5M2`,
`F8_E8M0`, `I16`, `U16`, `F16`, `BF16`, `I32`, `U32`, `F32`, `I64`, `U64`, `F64`, `C64`, and the
sub-byte `F4`, `F6_E2M3`, `F6_E3M2`. Importing the module starts no thread and touches no GPU.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypedDict

class NanError(ValueError):
    """A NaN in an input of a merge, or one that infinities in the inputs would make.

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
        is_input: it is one of the only input, which is cast; otherwise it was computed.
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
    any byte: alignment is not needed. `torch.from_dlpack(t)` views the same bytes and keeps the
    owner alive in turn; writing through it is right for a `Buffer` and a crash (SIGSEGV) for a
    `MappedFile`, whose pages are read-only. Of a `FileReader`'s tensor it gets a copy.
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
            BufferError: the tensor is not contiguous, not in CPU memory, or of an unknown dtype.
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
        """Raise `OSError` if its file changed, see `InputFile`; nothing for other owners."""

class InputFile:
    """A regular file that is open for reading, until the object and all tensors from it are gone.

    It must stay as it is for that long. What is read of a file that became shorter, or of a disk
    that fails, is an `OSError` (`ESTALE`) from `read`, from merges and from `check_intact`; never a
    SIGBUS, and zeros only for those who look through views and ask nobody.
    """

    @property
    def path(self) -> str:
        """The path as it was given."""
    @property
    def size(self) -> int:
        """Size of the file in bytes when it was opened."""
    @property
    def io(self) -> str:
        """`mmap`, `pread` or `direct`: what is really used."""
    def fileno(self) -> int:
        """The file descriptor, borrowed."""
    def read(self, offset: int, n_bytes: int) -> bytes:
        """Copy a byte range.

        Raises:
            ValueError: the range is not within the file.
            OSError: it can't be read; `ESTALE` if the file became shorter.
        """
    def tensor(self, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
        """A byte range as a tensor. Nothing is read yet.

        Raises:
            ValueError: unknown dtype, negative dimension, too many elements, or the range is not
                within the file.
        """
    def check_intact(self) -> None:
        """Raise `OSError` (`ESTALE`) unless the file has the size and time of change of its open.

        To be called after views of a mapping were read (by torch, say), before the result counts.
        """

class MappedFile(InputFile):
    """A read-only memory map of a whole file: its tensors are views, without a copy.

    With the first one the process gets a handler for SIGBUS. A fault inside a mapping replaces the
    rest of it by zeros and marks it; all others go to the handler that was there before, once:
    a library that handles SIGBUS itself should do so before the first file is mapped, and is put
    below ours again by the next.

    Raises:
        OSError: with errno and path; it is missing, unreadable or no regular file.
    """

    def __init__(self, path: str | PathLike[str]) -> None: ...

class FileReader(InputFile):
    """A file that is read in large pieces, with hints to read ahead, and not mapped.

    Merges read its tensors piece by piece; `torch.from_dlpack` gets a copy in memory.

    Args:
        path: the file.
        direct: read around the page cache (`O_DIRECT`); `io` is `pread` where that is not possible.

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
    """What `auto` means for the `f_type` that statfs(2) tells."""

class Buffer:
    """Anonymous writable memory, zeroed and page-aligned; supports the buffer protocol (`uint8`).

    `memoryview(buffer)` and tensors from it keep it alive.

    Raises:
        MemoryError: the memory cannot be had.
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
    """One merged tensor: what needs the whole inputs is found out at once, slices on demand.

    The methods, their parameters and their formulas are those of `gptailor.merging`. They are
    computed in float32, in the order of the sources, without fused multiply-adds (sums over whole
    tensors in float64, in a fixed order), and rounded once to `out_dtype` (to nearest, ties to
    even; beyond a range to infinity). The result depends neither on the number of threads nor on
    the slices in which it is asked for, nor on the CPU; but the few coefficients of methods on
    spheres, and widen's scores, use the C library's sine, arc cosine and exponential, whose last
    float64 bit may be another one elsewhere, which seldom changes a coefficient's float32.

    `linear` with one source of weight 1 and without `normalize` computes nothing: it copies the
    bytes, or only casts them.

    Where magnitudes are ranked (`ties`, `breadcrumbs`, `sce`), everything as large as the smallest
    that is kept stays, too, so that the choice depends on values only. Random masks depend on
    seed, key, source and element only.

    Args:
        method: a name; the message about an unknown one lists them.
        sources: 1 to 16 tensors with one number of elements, each `F32`, `F16` or `BF16`; shapes
            are not compared. Kept alive.
        base: the same kind of tensor, for the methods that take one.
        statistics: fisher only: one of the same kind for each source, its Fisher information.
        out_dtype: `F32`, `F16` or `BF16`.
        weights: one for each source; empty means 1 for each.
        parameters: by name; a number, or a sequence with one for each source. Flags are 0 or 1.
        factor: on the whole result, before it is rounded.
        row_length: of the rows of methods that work by row, in elements; 0 means the last
            dimension of the first source.
        key: 64 bits that stand for the tensor in random masks.
        check_nan: raise where the result would be NaN. Without it NaN and infinity pass through.
        check_overflow: raise where a finite result is too large for float16. Without it that
            becomes infinity. What is infinite in an input may stay so.
        threads: at most that many; 0 means one for each core that the process may use. Small
            tensors are merged in the calling thread.

    Raises:
        NanError: a method that looks at the whole inputs first found a NaN in them, or an infinity
            that makes one.
        OSError: an input that is read, not mapped, can't be; ESTALE if its file has changed.
        ValueError: an argument is out of its range; sizes or numbers of values differ; the
            directions that multislerp is to average cancel each other.
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
            NanError: an element of the slice is NaN; what `out` then holds there is undefined.
            RangeError: one is too large for float16; the same.
            OSError: as above.
            ValueError: the elements are not within the tensor, or the bytes not within `out`, or
                they overlap an input.
        """
    def write(self, begin: int, count: int, fd: int, offset: int) -> None:
        """Write elements [begin, begin + count) of the result to a file, from byte `offset`.

        Each thread writes what it has computed while the others compute: 1 MiB at a time for two
        bytes per element. Otherwise like `run`.

        Raises:
            OSError: with the errno of the write that failed; part of the range may be written.
        """

def copy_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, n_bytes: int) -> str:
    """Copy a byte range between two open files, without moving their positions.

    Tries copy_file_range (which may share blocks or copy on a file server), then sendfile, then
    pread and pwrite. Releases the GIL; looks at signals every 64 MiB, so that Ctrl-C ends it.

    Args:
        src_fd, dst_fd: file descriptors, borrowed; `dst_fd` not opened for appending.
        src_offset, dst_offset, n_bytes: in bytes. The destination grows where needed.

    Returns:
        What was used last: `copy_file_range`, `sendfile` or `pread/pwrite`.

    Raises:
        OSError: with the errno of the call that failed (`ENOSPC`, …); `EIO` where the source ends
            before `n_bytes`. Part of the range may have been written.
        ValueError: a negative number, ranges that overlap in one file, or a destination that
            appends.
    """

class DeviceTensor:
    """A typed, shaped, contiguous view of GPU memory, for calls that see the same tensor often.

    It keeps the foreign tensor alive.
    """

    @staticmethod
    def from_dlpack(tensor: SupportsDLPack) -> DeviceTensor:
        """View a contiguous tensor on a GPU without a copy, and without waiting for any stream.

        Raises:
            BufferError: the tensor is not contiguous, not on a CUDA device, or of an unknown dtype.
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
    """Have the disk begin to write a byte range of a file, without waiting (sync_file_range).

    Raises:
        OSError: the descriptor or the range is wrong, or earlier writing failed.
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
    """Merge a whole list of tensors on one GPU with one method and one set of parameters.

    The elementwise part is one kernel launch for the list; methods that look at whole tensors run
    their reductions before it. Only queues work on `stream` and returns; page-locked and device
    memory that it needs is kept from call to call.

    The bits are those of `Merge` for linear, task_arithmetic, ties, dare_linear, dare_ties,
    breadcrumbs, breadcrumbs_ties, ram and nearswap. slerp, nuslerp, multislerp, karcher,
    model_stock and stock add up the same sums, but the coefficients that follow from them use the
    GPU's sine and cosine, so that they may differ in the last bit. The other methods, and those
    that work by rows or columns, have no GPU path.

    Args:
        method, weights, parameters, factor: as for `Merge`.
        outs: one contiguous CUDA tensor for each result, written; its dtype is the output's.
        sources: for each result its sources, 1 to 16, the same number everywhere.
        bases: one for each result, for the methods that take one.
        keys: 64 bits for each result, for random masks; empty means 0 for each.
        found: an I32 tensor of two elements for each result: the first becomes 1 where the result
            holds a NaN, the second where a finite number is too large for its float16; else they
            stay. Without it neither is looked for.
        stream: a CUDA stream handle (`torch.cuda.current_stream().cuda_stream`). All tensors must
            be ready in that stream's order, and stay alive until it has done the work.

    Raises:
        RuntimeError: CUDA's message and the operation that failed; or the extension was built
            without CUDA.
        ValueError: as for `Merge`; a method without a GPU path; a tensor is not on the same CUDA
            device as the others.
        BufferError: a tensor is not contiguous.
    """

class DeviceLoader:
    """Reads byte ranges of files into tensors on a GPU, or into CPU memory.

    Several threads `pread` large chunks into page-locked buffers, two for each thread, and what one
    has read is on its way to the GPU while the next is being read. The buffers are allocated once,
    here. In CPU memory bytes are read straight to their place.

    Args:
        device: index of the GPU; None for CPU memory.
        way: `pread`; `direct` reads past the page cache where the file system can (O_DIRECT);
            `pinned` maps files and page-locks them, so that the GPU reads the page cache by itself
            (they stay so for as long as the loader lives); `auto` does that with files that lie in
            the page cache, as far as `pin_bytes` go and the driver agrees, and `pread`s the others.
        threads: that read; 0 means one for each core that the process may use, at most 8.
        buffer_bytes: of one buffer, and of the largest read.
        pin_bytes: how many bytes of mapped files `auto` may keep page-locked.

    Raises:
        MemoryError: no memory for the buffers.
        RuntimeError: CUDA's message and the operation that failed; or the extension was built
            without CUDA.
        ValueError: an argument is out of its range.
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
        """Fill each tensor with the bytes of a file from an offset on.

        Returns when all is read and the last copy is queued; in CPU memory, when all is there.
        Releases the GIL; one call at a time, others wait. A file that became shorter is an error,
        never a SIGBUS.

        Args:
            requests: (path, offset in bytes, contiguous writable tensor on the loader's device) of
                each range; as many bytes are read as the tensor has. Neighbours in a file that are
                also neighbours in memory are copied at once.
            stream: a CUDA stream handle; the tensors must be ready in its order, and stay alive
                until it has done the copies.

        Raises:
            BufferError: a tensor is not contiguous.
            OSError: with errno and path; `ESTALE` where a file became shorter while it was read.
            RuntimeError: CUDA's message and the operation that failed.
            ValueError: a range is not within its file; a tensor is on another device.
        """
    @property
    def loaded(self) -> dict[str, int]:
        """Bytes that went each way so far: `pinned`, `pread`, `direct`."""

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

    `cuda_archs` is like `"80,90"` or empty; `simd` is the instruction set that this machine uses:
    `portable`, `avx2` or `avx512` (the environment variable `GPTAILOR_SIMD` can name a lower one).
    `methods_digest` stands for the declarations of methods that it was built from.
    """
