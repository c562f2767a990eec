"""The compressed format: bit-for-bit round trips, words written by hand, torch's own converters."""

import time

import pytest
import torch
from torch.sparse import _semi_structured_conversions as cutlass

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern, select_mask_ref, unpack_bits
from sparsedm.kernels.sparse24 import format as fmt
from tests.tolerance import assert_as_good_as_torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGER = {2: torch.int16, 4: torch.int32}


def bits(tensor):
    return tensor.contiguous().view(INTEGER[tensor.element_size()])


def pruned(rows, columns, dtype=torch.bfloat16, drop=0.0):
    """A random 2:4 weight; `drop` empties further entries, so that groups with one and no non-zero occur."""
    weight = torch.randn(rows, columns).to(dtype)
    keep = select_mask_ref(weight, Pattern(2, 4)) & (torch.rand(rows, columns) >= drop)
    return torch.where(keep, weight, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.6], ids=["full-groups", "sparser-groups"])
def test_round_trip_is_bit_for_bit(dtype, drop):
    weight = pruned(37, 96, dtype, drop)
    values, metadata = fmt.pack(weight)
    assert values.shape == (37, 48)
    assert values.dtype == dtype
    assert metadata.shape == (37, 6)
    assert metadata.dtype == torch.int16
    assert torch.equal(bits(fmt.unpack(values, metadata)), bits(weight))


@pytest.mark.parametrize("columns", [4, 12, 20, 36])
def test_columns_that_do_not_fill_a_word_are_padded_with_zeros(columns):
    weight = pruned(5, columns)
    values, metadata = fmt.pack(weight)
    assert metadata.shape == (5, -(-columns // 16))
    assert torch.equal(fmt.unpack(values, metadata, columns), weight)
    assert not fmt.unpack(values, metadata)[:, columns:].any()


def test_nan_comes_back_and_minus_zero_counts_as_zero():
    weight = torch.tensor([[-0.0, 1.0, -0.0, float("nan"), -0.0, -0.0, -0.0, -0.0] + [0.0] * 8])
    values, metadata = fmt.pack(weight)
    dense = fmt.unpack(values, metadata)
    assert torch.equal(bits(dense), bits(torch.where(weight == 0, 0.0, weight)))


def test_every_group_occupancy_has_an_increasing_legal_pair():
    codes = [c for c in range(16) if bin(c).count("1") <= 2]
    weight = torch.tensor([[float(c >> i & 1) for c in codes for i in range(4)] + [0.0] * 4])
    values, metadata = fmt.pack(weight)
    nibbles = [int(word) >> s & 15 for word in metadata[0] for s in (0, 4, 8, 12)]
    assert set(nibbles) == set(fmt.LEGAL_NIBBLES)
    assert all(nibble & 3 < nibble >> 2 for nibble in nibbles)
    assert torch.equal(fmt.unpack(values, metadata), weight)


# Groups as they stand in a row of sixteen columns; the word has the first group in its lowest four bits.
HAND_WRITTEN = [
    ("1200 1020 1002 0120", 0x9C84),
    ("0102 0012 1200 1200", 0x44ED),
    ("0000 0000 0000 0000", 0x4444),  # nothing to keep: positions 0 and 1
    ("0001 0010 0100 1000", 0x448C),  # one non-zero, and the lowest free position beside it
]


@pytest.mark.parametrize(("row", "word"), HAND_WRITTEN)
def test_words_written_by_hand(row, word):
    weight = torch.tensor([[float(c) for c in row.replace(" ", "")]])
    _, metadata = fmt.pack(weight)
    assert int(metadata[0, 0]) & 0xFFFF == word


def test_agrees_with_the_cutlass_layout_of_torch():
    weight = pruned(64, 256)
    values, metadata = fmt.pack(weight)
    torch_values, torch_metadata = cutlass.sparse_semi_structured_from_dense_cutlass(weight)
    offsets = cutlass._calculate_meta_reordering_scatter_offsets(64, 16, torch.int16, "cpu")
    assert torch.equal(bits(values), bits(torch_values))
    assert torch.equal(metadata, torch_metadata.view(-1)[offsets].view(64, 16))


def test_packing_a_large_weight_takes_well_under_a_second():
    weight = pruned(4096, 4096)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        fmt.check_metadata(fmt.pack(weight)[1])
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1


def test_a_weight_that_is_not_24_is_refused_with_its_place():
    weight = pruned(6, 32)
    weight[4, 8:12] = torch.tensor([1.0, 2.0, float("nan"), 0.0])
    with pytest.raises(InputError, match=r"row 4, group 2 \(columns 8 to 11\) holds 3 non-zeros"):
        fmt.pack(weight)


def test_columns_must_be_groups_of_four():
    with pytest.raises(InputError, match=r"\(8, 6\).*multiple of 4"):
        fmt.pack(torch.zeros(8, 6))


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(fmt.LEGAL_NIBBLES)))
def test_an_illegal_pair_is_refused_with_its_place(nibble):
    metadata = torch.full((3, 4), fmt.ZERO_WORD, dtype=torch.int16)
    metadata[2, 1] = (0x4404 | nibble << 4) - (1 << 16 if 0x4404 | nibble << 4 > 0x7FFF else 0)
    with pytest.raises(InputError, match=rf"row 2, group 5 keeps positions {nibble & 3} and {nibble >> 2}"):
        fmt.check_metadata(metadata)
    with pytest.raises(InputError, match="row 2, group 5"):
        fmt.unpack(torch.zeros(3, 32), metadata)


def test_legal_metadata_passes():
    fmt.check_metadata(fmt.pack(pruned(16, 64, drop=0.5))[1])


def test_values_and_metadata_must_belong_together():
    values, metadata = fmt.pack(pruned(8, 64))
    with pytest.raises(InputError, match=r"\(8, 24\) do not belong to metadata of shape \(8, 4\)"):
        fmt.unpack(values[:, :24], metadata)
    with pytest.raises(InputError, match=r"\(8, 4\) int32"):
        fmt.unpack(values, metadata.int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutlass_holds_the_weight_bit_for_bit(dtype):
    weight = pruned(64, 128, dtype)
    held = fmt.to_torch(weight, "cutlass")
    assert isinstance(held, fmt.TORCH_TENSORS["cutlass"])
    assert held.shape == weight.shape
    assert held.packed.shape == (64, 64)
    assert torch.equal(held.to_dense(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("library", fmt.TORCH_TENSORS)
def test_both_libraries_hold_the_weight_and_multiply_by_it(library):
    weight, x = pruned(128, 256).cuda(), torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    held = fmt.to_torch(weight, library)
    assert torch.equal(held.to_dense(), weight)
    if library == "cutlass" and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("torch's CUTLASS kernels multiply on sm_80 to sm_89 only")
    assert torch.equal(held @ torch.eye(256, device="cuda", dtype=torch.bfloat16), weight)
    assert_as_good_as_torch(torch.nn.functional.linear(x, held), x.double() @ weight.double().t(), x @ weight.t())


@pytest.mark.parametrize(
    ("weight", "library", "message"),
    [
        (pruned(64, 128, torch.float64), "cutlass", "float16 or bfloat16, not torch.float64"),
        (pruned(30, 128), "cutlass", "a multiple of 32 rows and 64 columns, not 30 x 128"),
        (pruned(64, 128, torch.float32), "cusparselt", "float16 or bfloat16, not torch.float32"),
        (pruned(64, 128), "cusparselt", "cuSPARSELt cannot hold the weight here"),
    ],
    ids=["dtype", "shape", "float32", "no GPU"],
)
def test_what_a_library_cannot_hold_is_refused(weight, library, message):
    with pytest.raises(InputError, match=message):
        fmt.to_torch(weight, library)


# ---- other patterns: values and bits ---------------------------------------------------------------------------------

PATTERNS = [Pattern.parse(text) for text in ("1:2", "1:4", "3:4", "3:8", "15:16", "1:32")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bits_bring_the_weight_back_and_say_what_was_kept(pattern):
    weight = torch.randn(7, 96)
    weight = weight * select_mask_ref(weight, pattern)
    weight[3] = 0  # filled up at the lowest places
    weight[4, 0] = -0.0
    values, metadata = fmt.pack(weight, pattern)
    assert values.shape == (7, 96 * pattern.keep // pattern.group)
    assert metadata.shape == (7, 3)
    assert torch.equal(fmt.unpack(values, metadata, 96, pattern), weight)
    mask = unpack_bits(metadata, 96)
    assert (mask.unflatten(1, (-1, pattern.group)).sum(-1) == pattern.keep).all()
    assert (mask | (weight == 0)).all()
    assert mask[3, : pattern.keep].all()


def test_what_is_not_of_the_pattern_is_refused():
    pattern, weight = Pattern(1, 8), torch.randn(4, 16)
    with pytest.raises(InputError, match=r"not 1:8: row 0, group 0 .columns 0 to 7. holds 8 non-zeros and at most 1"):
        fmt.pack(weight, pattern)
    with pytest.raises(InputError, match=r"1:8 needs .N, K. with K a multiple of 8"):
        fmt.pack(torch.zeros(4, 12), pattern)
    values, metadata = fmt.pack(weight * select_mask_ref(weight, pattern), pattern)
    with pytest.raises(InputError, match=r"bits of 1:8 values \(4, 2\) must be \(4, 1\) int32, not \(4, 1\) int16"):
        fmt.unpack(values, metadata.short(), 16, pattern)
    metadata[2] |= 0x30000
    metadata[1] |= 0xFF
    with pytest.raises(InputError, match="illegal 1:8 bits: row 1, group 0 keeps 8 weights"):
        fmt.unpack(values, metadata, 16, pattern)
