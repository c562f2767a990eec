"""The orders in which the kernels read a 2:4 weight, made from values and metadata once per layer and device."""

import torch

from sparsedm.errors import InputError
from sparsedm.kernels.sparse24.format import (
    check_metadata,
    check_shapes,
    fragment_metadata,
    fragment_values,
    pad,
    tma_metadata,
    unpack,
)

PADDING = {"wgmma": (256, 128), "mma": (128, 64), "few": (128, 64)}  # multiples of rows and columns: the largest tiles


@torch.library.custom_op("sparsedm::sparse24_arrange", mutates_args=())
def arrange(values: torch.Tensor, metadata: torch.Tensor, backend: str, columns: int) -> list[torch.Tensor]:
    """The tensors that `backend` reads instead of values and metadata; for wgmma, where no padding is needed, instead
    of the metadata alone. columns: K.

    An operator, because it looks at the metadata and refuses illegal pairs, which torch.compile could not follow.
    """
    check_shapes(values, metadata)
    check_metadata(metadata)
    if backend == "torch":
        return [metadata.new_empty(0)]  # AOTInductor cannot hand an empty list to an operator
    if backend == "dense":
        return [unpack(values, metadata, columns).contiguous()]
    if backend == "wgmma":
        padded, metadata = pad(values, metadata, *PADDING[backend])
        return ([] if padded is values and values.is_contiguous() else [padded.contiguous()]) + [tma_metadata(metadata)]
    values, metadata = pad(values, metadata, *PADDING[backend])
    return [fragment_values(values), fragment_metadata(metadata)]


@arrange.register_fake
def _(values, metadata, backend, columns):
    if backend == "torch":
        return [metadata.new_empty(0)]
    if backend == "dense":
        return [values.new_empty(values.shape[0], columns)]
    multiple_n, multiple_k = PADDING[backend]
    N, K = values.shape[0], 2 * values.shape[1]
    n, k = N + -N % multiple_n, K + -K % multiple_k
    words = lambda *shape: values.new_empty(shape, dtype=torch.int32)  # noqa: E731
    if backend == "wgmma":
        same = (n, k) == (N, K) and values.is_contiguous()
        return ([] if same else [values.new_empty(n, k // 2)]) + [words(k // 64, 2 * n)]
    return [words(n // 16, k // 32, 32, 4), words(n // 16, k // 64, 32)]


def kernel_tensors(values, arranged):
    """What the launchers take: the values, those of `arrange` if it made any, and the metadata."""
    return arranged if len(arranged) == 2 else [values, *arranged]


def arrange_once(values, metadata, backend, columns, kept):
    """`arrange`, unless `kept`, the caller's dict or None, still holds what it gave for these very values."""
    if kept is None:
        return arrange(values, metadata, backend, columns)
    family = "fragments" if backend in ("mma", "few") else backend
    # while tracing there are no addresses, and then the weight cannot change either
    stamp = None if torch.compiler.is_compiling() else [_stamp(values), _stamp(metadata)]
    if family not in kept or (stamp is not None and kept[family][0] != stamp):
        if stamp and values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InputError("a layer with a 2:4 weight must be called once before a CUDA graph of it is captured")
        kept[family] = stamp, arrange(values, metadata, backend, columns)
    return kept[family][1]


def _stamp(tensor):
    """Changes when the tensor is moved, replaced or written to."""
    return tensor.device, tensor.data_ptr(), None if tensor.is_inference() else tensor._version
