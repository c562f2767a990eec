"""N:M patterns: which weights are kept, ties and signed zeros included, in every way that there is of choosing them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import (
    GROUPS,
    Pattern,
    group_view,
    holds,
    pack_bits,
    select_mask_ref,
    select_of_fours,
    select_untied,
    ungroup,
    unpack_bits,
)

PATTERNS = [Pattern(1, 2), Pattern(2, 4), Pattern(3, 4), Pattern(1, 8), Pattern(7, 16), Pattern(31, 32)]


def mask_by_sorting(weight, pattern):
    """The definition once more, in other words: sort each group by magnitude, then by index, and take the first."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row, kept in zip(weight.tolist(), mask):
        for start in range(0, len(row), pattern.group):
            places = sorted(range(start, start + pattern.group), key=lambda k: (-abs(row[k]), k))
            kept[places[: pattern.keep]] = True
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("chooser", [select_mask_ref, select_untied])
def test_the_largest_are_kept(chooser, pattern):
    weight = torch.randn(5, 64)
    assert torch.equal(chooser(weight, pattern), mask_by_sorting(weight, pattern))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_few_distinct_values_so_that_ties_are_everywhere(data):
    group = data.draw(st.sampled_from(GROUPS))
    pattern = Pattern(data.draw(st.integers(1, group - 1)), group)
    shape = (data.draw(st.integers(0, 3)), group * data.draw(st.integers(1, 3)))
    values = [-0.0, 0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf")]
    numbers = data.draw(st.lists(st.sampled_from(values), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    weight = torch.tensor(numbers, dtype=dtype).view(shape)
    expected = mask_by_sorting(weight, pattern)
    assert torch.equal(select_mask_ref(weight, pattern), expected)
    if group == 4:
        assert torch.equal(select_of_fours(weight, pattern.keep), expected)
    untied = select_untied(weight, pattern)
    assert untied is None or torch.equal(untied, expected)
    assert holds(torch.where(expected, weight, 0), pattern)


def test_ties_go_to_the_lower_index_and_a_negative_zero_is_zero():
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 3.0, -0.0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(select_mask_ref(weight, Pattern(2, 4)), expected)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_every_order_of_four_with_ties(keep):
    weight = torch.cartesian_prod(*[torch.tensor([-2.0, -1.0, -0.0, 1.0])] * 4)
    assert torch.equal(select_of_fours(weight, keep), mask_by_sorting(weight, Pattern(keep, 4)))


def test_the_quick_way_gives_up_on_ties_for_the_last_place_and_on_nan_only():
    half, nan, infinite = Pattern(2, 4), float("nan"), float("inf")
    for row in (
        [1.0, 2.0, 1.0, 0.5],
        [0.0, 0.0, 0.0, 0.0],
        [infinite, 1.0, -infinite, infinite],
        [nan, 1, 2, 3],
    ):
        assert select_untied(torch.tensor([row]), half) is None
    assert select_untied(torch.tensor([[nan, 1, 2, 3], [0, 0, 0, 0]]), half) is None  # as many too few as too many
    for row in ([2.0, 2.0, 1.0, 1.0], [0.0, 1.0, 0.0, -2.0], [infinite, 1.0, -infinite, 2.0]):
        assert select_untied(torch.tensor([row]), half) is not None


def test_groups_of_a_conv_weight_never_straddle_taps_or_filters():
    weight = torch.randn(6, 8, 3, 2)
    rows = group_view(weight)
    assert torch.equal(rows[3 * 2 * 4 + 2 * 2 + 1], weight[4, :, 2, 1])
    assert torch.equal(ungroup(rows, weight.shape), weight)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64])
def test_packed_bits(columns):
    mask = torch.rand(3, columns) < 0.5
    bits = pack_bits(mask)
    assert bits.shape == (3, -(-columns // 32))
    for row in range(3):
        for k in range(32 * bits.shape[1]):
            assert int(bits[row, k // 32]) >> (k % 32) & 1 == (k < columns and bool(mask[row, k]))
    assert torch.equal(unpack_bits(bits, columns), mask)


@pytest.mark.parametrize("text", ["3:2", "0:4", "4:4", "2:5", "1:64", "2-4", "", "half", "-1:4", 24])
def test_impossible_patterns_are_refused(text):
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


def test_holds_counts_non_zeros():
    assert holds(torch.tensor([[1.0, 0.0, -0.0, 2.0]]), Pattern(2, 4))
    assert not holds(torch.tensor([[1.0, 0.0, 3.0, 2.0]]), Pattern(2, 4))


def test_parse():
    assert Pattern.parse("2:4") == Pattern.parse(Pattern(2, 4)) == Pattern(keep=2, group=4)
    assert Pattern.parse("dense") is None
    assert str(Pattern(7, 8)) == "7:8"
    assert Pattern(2, 4).density == 0.5
