"""N:M patterns: which weights are kept, ties and signed zeros included, in every way that there is of choosing them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm.errors import InputError
from sparsedm.kernels.pattern import (
    GROUPS,
    Pattern,
    choose,
    choose_mask,
    choose_mask_ref,
    group_view,
    holds,
    ungroup,
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
@pytest.mark.parametrize("chooser", [choose_mask_ref, choose_mask])
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
    assert torch.equal(choose_mask_ref(weight, pattern), expected)
    assert torch.equal(choose_mask(weight, pattern), expected)
    masked, mask = choose(weight, pattern)
    assert torch.equal(mask, expected)
    assert torch.equal(masked, torch.where(expected, weight, 0))
    assert holds(masked, pattern)


def test_ties_go_to_the_lower_index_and_a_negative_zero_is_zero():
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 3.0, -0.0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(choose_mask_ref(weight, Pattern(2, 4)), expected)
    assert torch.equal(choose_mask(weight, Pattern(2, 4)), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_groups_of_a_conv_weight_never_straddle_taps_or_filters(memory_format):
    weight = torch.randn(6, 8, 3, 2).to(memory_format=memory_format)
    rows = group_view(weight)
    assert torch.equal(rows[3 * 2 * 4 + 2 * 2 + 1], weight[4, :, 2, 1])
    assert torch.equal(ungroup(rows, weight.shape), weight)
    masked, mask = choose(weight, Pattern(2, 4))
    for out in range(6):
        for i in range(3):
            for j in range(2):
                kept = mask_by_sorting(weight[out, :, i, j][None], Pattern(2, 4))[0]
                assert torch.equal(mask[out, :, i, j], kept)
    assert masked.stride() == mask.stride() == weight.stride()


def test_choose_casts_reads_any_strides_and_is_detached():
    weight = torch.randn(16, 40, requires_grad=True)
    for view in (weight[:, 8:40:2], weight.t()[8:], weight[::3]):
        masked, mask = choose(view, Pattern(2, 4), torch.bfloat16)
        assert torch.equal(mask, choose_mask_ref(view, Pattern(2, 4)))
        assert torch.equal(masked, torch.where(mask, view, 0).bfloat16())
        assert not masked.requires_grad
        assert not mask.requires_grad


@pytest.mark.parametrize("text", ["3:2", "0:4", "4:4", "2:5", "1:64", "2-4", "", "half", "-1:4", 24])
def test_impossible_patterns_are_refused(text):
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


def test_parse():
    assert Pattern.parse("2:4") == Pattern.parse(Pattern(2, 4)) == Pattern(keep=2, group=4)
    assert Pattern.parse("dense") is None
    assert str(Pattern(7, 8)) == "7:8"
    assert Pattern(2, 4).density == 0.5


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 6), r"fc1: the input axis of shape \(4, 6\) must be a positive multiple of 4"),
        (torch.ones(4, 0), r"fc1: the input axis of shape \(4, 0\) must be a positive multiple of 4"),
        (torch.ones(8, 3, 3, 3), r"fc1: the input axis of shape \(8, 3, 3, 3\) must be a positive multiple of 4"),
        (torch.ones(8), r"fc1: a masked weight has 2 .* dimensions, not shape \(8,\)"),
        (torch.ones(4, 8, dtype=torch.int32), "fc1: .*floating-point weights, not torch.int32"),
        (torch.tensor([[1.0, float("nan"), 0.0, float("nan")]]), "fc1: 2 weights are NaN"),
        (torch.full((2, 4), float("nan")), "fc1: 8 weights are NaN"),
    ],
)
def test_choose_refuses(weight, message):
    with pytest.raises(InputError, match=message):
        choose(weight, Pattern(2, 4), name="fc1")


def test_choose_is_an_operator_without_graph_breaks():
    weight = torch.randn(8, 16)
    torch.library.opcheck(torch.ops.sparsedm.choose, (weight, 2, 4, torch.float16, "w"))
    compiled = torch.compile(lambda w: choose(w, Pattern(2, 4)), fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(weight), choose(weight, Pattern(2, 4))):
        assert torch.equal(out, expected)
