"""The orders of the kernels hold the same weight, and are kept until it changes."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.sparse import _semi_structured_conversions as cutlass

from sparsedm.kernels.sparse24 import layouts
from sparsedm.kernels.sparse24.format import pack, unpack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack, prepack_once
from tests.kernels.sparse24.kernel_case import pruned

BF16 = torch.bfloat16


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_prepack_keeps_the_weight(layout):
    """Whatever the order, it is the same weight: the prepacked values hold the same numbers, padded with zeros."""
    weight = pruned(24, 72)
    values, metadata = pack(weight)
    tensors = prepack(values, metadata, layout, 72)
    assert len(tensors) == {"torch": 1}.get(layout, 2)
    assert layout != "torch" or not tensors[0].numel(), "nothing is kept, and yet the list is not empty"
    if layout == "dense":
        assert torch.equal(tensors[0], weight)
    elif layout != "torch":
        numbers = tensors[0].view(BF16).flatten().float().sort().values
        expected = F.pad(weight[weight != 0].float(), (0, numbers.numel() - int((weight != 0).sum()))).sort().values
        assert torch.equal(numbers, expected)
    if layout == "tma":
        assert tensors[0].shape == (256, 64)
        assert tensors[1].shape == (2, 512)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("shape", [(24, 72), (256, 128)], ids=["padded", "as-it-is"])
def test_prepack_is_registered_correctly(layout, shape):
    values, metadata = pack(pruned(*shape))
    torch.library.opcheck(torch.ops.sparsedm.sparse24_prepack, (values, metadata, layout, shape[1]))


def test_values_that_need_no_padding_are_not_copied():
    values, metadata = pack(pruned(256, 128))
    prepacked = prepack(values, metadata, "tma", 128)
    assert len(prepacked) == 1
    assert [t.data_ptr() for t in kernel_tensors(values, prepacked)] == [t.data_ptr() for t in (values, *prepacked)]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_weight_at_any_address_is_prepacked_to_what_the_kernels_can_read(layout):
    values, metadata = pack(pruned(256, 128))
    odd = torch.empty(values.numel() + 1, dtype=BF16)[1:].view(values.shape).copy_(values)
    assert odd.data_ptr() % 16 == 2
    expected, found = (kernel_tensors(v, prepack(v, metadata, layout, 128)) for v in (values, odd))
    assert all(map(torch.equal, found, expected))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in found)


class OnAGpu(torch.Tensor):
    is_cuda = True


def test_what_another_stream_may_read_next_was_written(monkeypatch):
    events, stream, cache = [], types.SimpleNamespace(synchronize=lambda: events.append(("waited", "tma" in cache))), {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(layouts, "prepack", lambda *_: events.append("prepacked"))
    values, metadata = (tensor.as_subclass(OnAGpu) for tensor in pack(pruned(256, 128)))
    for _ in range(2):
        prepack_once(values, metadata, "tma", 128, cache)
    assert events == ["prepacked", ("waited", False)]


def test_fragments_hold_what_the_ptx_isa_figures_say():
    """mma.sp.m16n8k32: register r of lane l holds row l/4 + 8 (r%2), kept columns 2 (l%4) + 8 (r/2) and the next."""
    values, metadata = pack(pruned(48, 128))
    fragments = layouts.fragment_values(values).numpy().view(np.uint16)  # (N/16, K/32, 32, 8)
    words = layouts.fragment_metadata(metadata).numpy().view(np.uint16)  # (N/16, K/64, 64)
    value_bits, metadata_bits = values.view(torch.int16).numpy().view(np.uint16), metadata.numpy().view(np.uint16)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for register in range(4):
            row, column = group + 8 * (register % 2), 2 * thread + 8 * (register // 2)
            for half in range(2):
                expected = value_bits[row::16, column + half :: 16]
                np.testing.assert_array_equal(fragments[:, :, lane, 2 * register + half], expected)
        for half in range(2):
            expected = metadata_bits[group + 8 * half :: 16, thread::4]
            np.testing.assert_array_equal(words[:, :, 2 * lane + half], expected)


def test_tma_metadata_is_the_fragments_of_64_rows_side_by_side():
    _, metadata = pack(pruned(128, 192))
    fragments = layouts.fragment_metadata(metadata)  # (8, 3, 32)
    ordered = layouts.tma_metadata(metadata)
    assert ordered.shape == (3, 256)
    for step in range(3):
        for tile in range(8):
            assert torch.equal(ordered[step, 32 * tile : 32 * tile + 32], fragments[tile, step])


def test_padding_is_zero_and_legal():
    weight = pruned(5, 48)
    values, metadata = layouts.pad(*pack(weight), 16, 64)
    assert values.shape == (16, 32)
    assert metadata.shape == (16, 4)
    dense = unpack(values, metadata)
    assert torch.equal(dense[:5, :48], weight)
    assert not dense[5:].any()
    assert not dense[:, 48:].any()


def test_the_metadata_of_a_warp_is_what_cutlass_gives_the_same_instruction():
    """CUTLASS, whose order torch knows, and which runs, is a witness beside the text of the PTX ISA.

    Its lane 4 g + 2 i + c reads word 4 g + 2 i + c of 32 rows, for tile i of two and all steps of 32 columns; ours hold
    one tile and two steps.
    """
    weight = pruned(64, 128, drop=0)
    _, reordered = cutlass.sparse_semi_structured_from_dense_cutlass(weight)
    words = reordered.flatten().view(torch.int32).view(2, 2, 2, 8, 2, 2)  # k64, f, 32 rows, g, tile, c
    ours = layouts.fragment_metadata(pack(weight)[1]).view(2, 2, 2, 8, 2, 2)  # 32 rows, tile, k64, g, f, c
    assert torch.equal(ours, words.permute(2, 4, 0, 3, 1, 5))
