import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsedm.compression import compress
from sparsedm.kernels.checksum import checksum_on_gpu, checksum_ref, checksums
from sparsedm.kernels.cpu import library
from sparsedm.sparsity import hold_masks, sparsify

BY_TORCH = {"on a GPU": checksum_on_gpu, "the kernel's": checksum_ref}


@pytest.fixture(params=["C", "no library", *BY_TORCH])
def number(request, monkeypatch):
    """A function: tensor -> its checksum."""
    if request.param == "C" and library.library() is None:
        pytest.skip("no C kernels")
    if request.param == "no library":
        monkeypatch.setattr(library, "library", lambda: None)
    by_torch = BY_TORCH.get(request.param)
    return (lambda t: int(by_torch(t))) if by_torch else (lambda t: checksums(t)[0])


def test_every_flipped_bit_shows(number):
    weight = torch.randn(2, 32)
    before, words = number(weight), weight.view(torch.int32).numpy().reshape(-1).view("uint32")
    for place, bit in itertools.product(range(len(words)), range(32)):
        words[place] ^= 1 << bit
        assert number(weight) != before
        words[place] ^= 1 << bit
    assert number(weight) == before


def test_exchanged_rows_columns_and_entries_show(number):
    weight = torch.randn(4, 32)
    before = number(weight)
    for view in (weight.numpy(), weight.numpy().T, weight.numpy().reshape(-1)):
        for a, b in itertools.combinations(range(min(len(view), 32)), 2):
            view[[a, b]] = view[[b, a]]
            assert number(weight) != before
            view[[a, b]] = view[[b, a]]
    assert number(weight) == before


def test_weights_without_memory_are_held():
    model = sparsify(nn.Sequential(nn.Linear(64, 64)), "2:4")
    small = compress(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = copy.deepcopy(model)
        assert checksums(model[0].weight, model[0].bias) == [0, 0]
        x = torch.randn(4, 64)
        with hold_masks(model, small):
            assert model(x).shape == small(x).shape == (4, 64)


def test_every_part_of_a_large_weight_counts(number):
    weight = torch.randn(1, (1 << 17) + 5)  # the C kernel sums from 256 KB on in 32 parts
    before = number(weight)
    for place in (0, 5000, 1 << 16, (1 << 17) + 4):
        other = weight.clone()
        other[0, place] += 1
        assert number(other) != before


def test_rows_that_move_and_two_signs_that_change_show_at_every_distance(number):
    """Of a power of two, too: what a sum rotates or adds up must not come back to where it was."""
    weight = torch.randn(64, 2048)
    for rows in (weight[:16], weight):  # the C kernel sums these in one part and in 32
        before = number(rows)
        for distance in (1, 2, 4, 8):
            assert number(rows.roll(distance, 0)) != before, distance
            negated = rows.clone()
            negated[: 2 * distance : distance, 5] *= -1
            assert number(negated) != before, distance
            alone, exchanged = torch.zeros(2, *rows.shape)  # nothing is carried between the two
            alone[0, 5] = exchanged[distance, 5] = 1
            alone[distance, 5] = exchanged[0, 5] = 2
            assert number(alone) != number(exchanged), distance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8])
def test_every_dtype_and_an_empty_weight_have_one(number, dtype, request):
    if "the kernel's" in request.node.name and dtype != torch.bfloat16:
        pytest.skip("the kernel takes 16 and 32 bits")
    weight = torch.arange(15).view(3, 5).to(dtype)
    before = number(weight)
    assert number(weight.clone()) == before
    weight[2, 4] = 0
    assert number(weight) != before
    assert number(weight[:0]) == number(weight[:0])
