"""Whether anybody has written to a tensor: checksums of its bits, which any change changes in all likelihood."""

import torch
import torch.nn.functional as F

from sparsedm import files
from sparsedm.kernels.cpu import library, products
from sparsedm.kernels.pattern import group_view


def checksum_ref(weight):
    """weight (out, in, ...) of 16 or 32 bits -> int64 (): the specification of what `masked_adamw` sums up.

    Each entry's bits and place are hashed together, so that exchanged entries and flipped signs show. The 32 hashes of
    a word are added in int32, words in int64.
    """
    rows = group_view(weight).contiguous()
    bits = rows.view(torch.int32) if rows.element_size() == 4 else rows.view(torch.int16).int()
    place = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
    code = bits + group_view(place.as_strided(weight.shape, weight.stride())) * -1640531535
    code = (code ^ (code >> 15)) * -2048144777
    code = F.pad(code ^ (code >> 13), (0, -code.shape[-1] % 32))
    return code.unflatten(-1, (code.shape[-1] // 32, 32)).sum(-1, dtype=torch.int32).sum(dtype=torch.int64)


def checksum_on_gpu(tensor):
    """int64 (), on the tensor's device: of a tensor of any dtype and layout. Nothing waits for the GPU."""
    stored = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return checksum_ref(F.pad(stored, (0, -len(stored) % 4)).view(torch.int32)[None])


def checksums(*tensors):
    """One int for each tensor on the CPU: by the C library, or without it a CRC-32.

    All are 0 if one of the tensors dispatches in Python, as a FakeTensor does: it may have no memory.
    """
    if any(type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in tensors):
        return [0] * len(tensors)
    if library.library() is not None:
        return products.checksum(*tensors)
    return [int(files.checksum(t.detach().resolve_neg())) for t in tensors]


def stamp(*tensors, held=None):
    """What changes when one of the tensors is moved, replaced or written to.

    It holds address and version. These miss a write that torch does not count, through `.data` or by a collective. On a
    CPU a checksum of the bits is added, which sees that, too. held: this checksum, if the caller vouches that nobody
    writes.
    """
    if tensors[0].device.type != "cpu" or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return [(t.device, t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    known = [(t.dtype, t.shape, t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
    return known + (held or checksums(*tensors))
