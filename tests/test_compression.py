"""Whole models in their other forms: compressed, decompressed, baked."""

import copy
import functools
import io
import types

import pytest
import torch
from torch import nn

import sparsedm
from sparsedm.compressed import CompressedConv2d, CompressedLinear
from sparsedm.compression import bake, compress, decompress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.pattern import Pattern, holds
from sparsedm.kernels.sparse24.format import TORCH_TENSORS
from sparsedm.layers import Linear
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model
from sparsedm.sparsity import masked_layers, masks, set_masking, sparsify
from tests.test_tied_weights import Tied
from tests.tiny import Small
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2}


# ---- compress --------------------------------------------------------------------------------------------------------


def assert_same_network(compressed, model, x):
    """Weights are the same bit for bit; a convolution may round differently, in the other memory format."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_as_good_as_torch(compressed(x), exact, model(x))


def test_compressed_model_is_the_masked_model():
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    small = compress(model)
    assert isinstance(small.head, CompressedLinear)
    assert isinstance(small.conv, CompressedConv2d)
    assert torch.equal(small.head.dense_weight(), model.head.effective_weight())
    assert torch.equal(small.conv.dense_weight(), model.conv.effective_weight())
    assert_same_network(small, model, x)
    assert isinstance(model.head, Linear), "compress must not touch the model it is given"
    state = small.state_dict()
    assert state["head.values"].shape == (30, 16)
    assert state["head.metadata"].view(torch.int16).shape == (30, 2)
    assert state["head.metadata"].dtype == torch.uint8, "collectives have no int16"


def test_a_compressed_weight_is_not_assigned():
    small = compress(sparsify(nn.Sequential(nn.Linear(16, 16)), "2:4"))
    with pytest.raises(InputError, match="a compressed weight is not assigned: decompress"):
        small[0].weight = nn.Parameter(torch.zeros(16, 16))


def test_the_model_in_a_data_parallel_one_is_compressed_and_baked(tmp_path):
    """With all its weights compressed it has no gradients, and DDP takes no such model."""
    model = sparsify(nn.Sequential(nn.Linear(16, 16)), "2:4")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        small, plain = compress(parallel), bake(parallel)
    finally:
        torch.distributed.destroy_process_group()
    assert type(plain) is nn.Sequential
    assert type(plain[0]) is nn.Linear
    assert type(small) is nn.Sequential
    assert isinstance(small[0], CompressedLinear)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "1:16", "3:4"])
def test_compress_holds_every_pattern(pattern):
    model, x = sparsify(Small(), pattern, "head|conv"), torch.randn(2, 3, 8, 8)
    small = compress(model)
    assert isinstance(small.head, CompressedLinear)
    assert holds(small.head.dense_weight(), Pattern.parse(pattern))
    assert_same_network(small, model, x)


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_a_compressed_model_can_be_copied_moved_pickled_and_loaded(backend, monkeypatch):
    """Also with "dense", whose decompressed weights the layers keep."""
    monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    model, x = compress(sparsify(Small(), "2:4")), torch.randn(2, 3, 8, 8)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = compress(sparsify(Small(), "2:4"))
    other(x)
    other.load_state_dict(model.state_dict())
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False), other):
        assert torch.equal(same(x), y)
    assert copy.deepcopy(model).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "conv", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_convolutions_without_a_compressed_form_stay_dense(conv):
    model, x = sparsify(nn.Sequential(nn.Conv2d(16, 8, 3, **conv)), "2:4"), torch.randn(2, 16, 6, 6)
    small = compress(model)
    assert "no compressed form" in small[0].dense_reason
    assert torch.equal(small(x), model(x))


# ---- decompress ------------------------------------------------------------------------------------------------------


def test_decompressed_weights_are_the_masked_ones_bit_for_bit_and_can_be_trained():
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    small = compress(model)
    again = decompress(small)
    assert {n: str(m.pattern) for n, m in masked_layers(again)} == {"conv": "2:4", "head": "2:4"}
    for name, layer in masked_layers(model):
        assert torch.equal(again.get_submodule(name).weight, layer.effective_weight())
        assert torch.equal(again.get_submodule(name).bias, layer.bias)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(compress(again).state_dict().values(), small.state_dict().values()))
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert isinstance(small.head, CompressedLinear), "decompress must not touch the model it is given"


@pytest.mark.parametrize("make", [nn.Linear, functools.partial(Linear, activation="gelu")])
def test_layers_move_to_torchs_sparse_tensors_and_back(make):
    model = sparsify(nn.Sequential(make(64, 32), nn.SiLU(), nn.Linear(32, 4)).bfloat16(), "2:4", ["0"])
    small = compress(model)
    held = decompress(small, "cutlass")
    assert isinstance(held[0].weight, TORCH_TENSORS["cutlass"])
    assert torch.equal(held[0].weight.to_dense(), model[0].effective_weight())
    shared = nn.Sequential(*[model[0]] * 2)
    assert isinstance(decompress(compress(shared), "cutlass")[1].weight, TORCH_TENSORS["cutlass"])
    back = compress(held)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), small.state_dict().values()))
    assert back[0].activation == small[0].activation


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompress(Small()), "holds no compressed layer"),
        (
            lambda: decompress(compress(sparsify(Small(), "2:4")), "csr"),
            "form='csr': one of masked, cutlass, cusparselt",
        ),
        (lambda: decompress(compress(sparsify(Small().half(), "2:4")), "cutlass"), "and 64 columns, not 30 x 32"),
        (lambda: sparsify(compress(sparsify(Small(), "2:4")), "2:4", "head"), "decompress"),
        (
            lambda: decompress(compress(sparsify(nn.Sequential(nn.Linear(64, 32)).half(), "3:4")), "cutlass"),
            "cutlass holds 2:4 weights, and 0 is 3:4",
        ),
    ],
)
def test_what_cannot_be_decompressed_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- what other libraries do to models -------------------------------------------------------------------------------


def test_weights_that_are_swapped_unseen_are_seen_at_the_next_turn():
    """Writes to `weight.data`, as by diffusers' EMAModel.copy_to or merged LoRA, do not move torch's counter."""
    model, x = sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4"), torch.randn(3, 16)
    model(x)
    model[0].weight.data.copy_(torch.randn(8, 16))
    small = compress(model)
    fresh = sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_as_good_as_torch(small(x), copy.deepcopy(fresh).double()(x.double()), fresh(x))
        model[0].weight.data.copy_(torch.randn(8, 16))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(x), fresh(x))


def test_hooks_move_along():
    model, x = sparsify(nn.Sequential(nn.Linear(16, 8), nn.Conv1d(1, 1, 1)), "2:4"), torch.randn(3, 1, 16)
    model[0].register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 0,))
    model[0].register_forward_hook(lambda layer, inputs, y: y + 1)
    small = compress(model)
    with torch.no_grad():
        for form in (small, decompress(small)):
            assert torch.equal(form(x), model(x))


def test_a_bound_hook_moves_along_with_its_module():
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    model.gain = nn.Parameter(torch.ones(()))
    model.head.register_forward_hook(types.MethodType(lambda self, layer, inputs, y: y * self.gain, model))
    small = compress(model)
    with torch.no_grad():
        expected, forms = model(x), (small, decompress(small), bake(model))
        model.gain.zero_()
        for form in forms:
            assert torch.allclose(form(x), expected, atol=1e-5)
            form.gain.zero_()
            assert torch.equal(form(x), form.narrow.bias.expand(2, 5))


def test_a_layer_with_a_forward_of_its_own_stays_dense_and_keeps_it():
    class Doubled(sparsedm.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Doubled(16, 8, pattern="2:4"), sparsedm.Linear(8, 8, pattern="2:4")), torch.randn(3, 16)
    model[1].forward = types.MethodType(lambda self, x: 3 * sparsedm.Linear.forward(self, x), model[1])
    model.append(sparsedm.Linear(8, 8, pattern="2:4"))
    small = compress(model)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)
    assert "not the one that a compressed layer computes" in str(inspect(small, (x,)))
    small[2].forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), small[2])
    with pytest.raises(InputError, match=r"^2.forward was replaced"):
        decompress(small)


def test_gradient_rules_survive_the_compressed_form(tmp_path):
    model = sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4")
    set_masking(model, decay=0.1, kept=2.0)
    file = save_model(tmp_path / "a.safetensors", compress(model))
    small = load_model(file, lambda config: nn.Sequential(nn.Linear(16, 8)), config={}).model
    assert decompress(small)[0].rule == model[0].rule


def test_what_was_frozen_stays_frozen_and_the_mode_is_the_same_everywhere():
    model = sparsify(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3), nn.Dropout()), "2:4", ["0"])
    model[1].bias.requires_grad_(False)
    again = decompress(compress(model))
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {"1.bias"}
    model[0].weight.requires_grad_(False)
    again = decompress(compress(model))
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {"0.weight", "1.bias"}
    held = decompress(compress(sparsify(nn.Linear(64, 32), "2:4").half()), "cutlass")
    held.bias.requires_grad_(False)
    again = decompress(compress(held))
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {"weight": True, "bias": False}
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    tied[1].weight = tied[0].weight
    again = decompress(compress(sparsify(tied, "2:4", ["1"])))
    assert not any(p.requires_grad for p in again.parameters())
    assert not any(module.training for module in again.modules())
    assert all(module.training for module in decompress(compress(model).train()).modules())


class Around(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


@pytest.mark.parametrize("wrap", [Around, lambda m: nn.Sequential(m, nn.Tanh()), torch.compile])
def test_a_compressed_part_of_a_model_keeps_its_ties_and_what_was_frozen(wrap):
    model = sparsify(Tied(), "2:4", "first|second")
    model.first.bias.requires_grad_(False)
    for dense in (decompress(wrap(compress(model))), bake(wrap(compress(model)))):
        part = next(m for m in dense.modules() if isinstance(m, Tied))
        assert part.second.weight is part.first.weight
        assert part.head.weight is part.embed.weight
        assert {n for n, p in part.named_parameters() if not p.requires_grad} == {"first.bias"}
    twins = nn.ModuleList([wrap(compress(model)), wrap(compress(model))])
    one, other = decompress(copy.deepcopy(twins)).parameters(), decompress(twins)[1].parameters()
    assert len(list(one)) == 2 * len(list(other)), "the parts are not tied to each other"
    dense = decompress(wrap(compress(model))).requires_grad_(True)
    assert all(p.requires_grad for p in decompress(compress(dense)).parameters()), "what was frozen is not any more"


def test_what_is_compressed_again_beside_others_keeps_what_it_was():
    first, second = sparsify(Tied(), "2:4", "first|second"), sparsify(nn.Linear(24, 24), "2:4")
    first.first.bias.requires_grad_(False)
    dense = decompress(compress(nn.Sequential(compress(first), second)))
    assert {n for n, p in dense.named_parameters() if not p.requires_grad} == {"0.first.bias"}
    assert dense[0].second.weight is dense[0].first.weight
    small = compress(first)
    small.embed = nn.Embedding(24, 32)
    dense = decompress(small)
    assert torch.equal(dense.embed.weight, small.embed.weight)
    assert not torch.equal(dense.head.weight, dense.embed.weight), "a part that was replaced is tied to nothing"


def test_what_was_thawed_since_it_was_compressed_can_be_trained():
    model = sparsify(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), "2:4")
    model[1].requires_grad_(False)
    small = compress(model)
    beside = sparsify(nn.Linear(16, 16), "2:4")
    held = decompress(compress(nn.Sequential(small, beside)))
    assert {n for n, p in held.named_parameters() if not p.requires_grad} == {"0.1.weight", "0.1.bias"}
    small[1].requires_grad_(True)
    assert all(p.requires_grad for p in decompress(compress(nn.Sequential(small, beside))).parameters())


def test_a_part_of_a_compressed_model_is_tied_and_thawed_in_another():
    old = sparsify(Tied(), "2:4", "first|second")
    old.embed.requires_grad_(False)
    new = Tied()
    new.embed = compress(old).embed.requires_grad_(True)
    new.head.weight = new.embed.weight
    again = decompress(compress(sparsify(new, "2:4", "head")))
    assert again.head.weight is again.embed.weight
    assert again.head.weight.requires_grad


def test_a_baked_model_forgets_what_was_frozen_when_it_was_compressed():
    model = sparsify(nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8)), "2:4")
    model[1].requires_grad_(False)
    baked = bake(compress(model)).requires_grad_(True)
    baked[1].requires_grad_(False)
    baked.append(nn.Conv2d(8, 8, 1))
    again = decompress(compress(sparsify(baked, "2:4", ["2"])))
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {"1.weight", "1.bias"}
    assert not any("_origins" in vars(module) for module in bake(compress(model)).modules())


def test_complex_parameters_can_be_trained_again():
    model = sparsify(nn.Sequential(nn.Linear(16, 8)), "2:4")
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    for dense in (decompress(compress(model)), bake(compress(model))):
        assert all(p.requires_grad for p in dense.parameters())


def test_channels_last_is_kept():
    conv = sparsify(nn.Sequential(nn.Conv2d(16, 8, 3, padding=1)), "2:4").to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
    for form in (conv, compress(conv), decompress(compress(conv)).to(memory_format=torch.channels_last)):
        assert form(x).is_contiguous(memory_format=torch.channels_last)


def test_a_compressed_state_is_half_of_the_dense_one_plus_an_eighth_of_that():
    """Values are half of the entries, two bits for each; a fifth of a U-ViT's state is not masked by default."""
    dense = build_model(UVIT).bfloat16()
    layers = sparsify(dense, "2:4", "all")
    held = sum(t.numel() * t.element_size() for t in compress(layers).state_dict().values())
    masked = sum(layer.weight.numel() for _, layer in masked_layers(layers))
    others = sum(p.numel() for p in dense.parameters()) - masked
    assert held == 2 * others + masked * 2 * 9 // 16


# ---- bake ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "1:8", "7:16"])
def test_a_baked_model_is_torchs_own_and_computes_the_same_bits(pattern):
    model, x = sparsify(Small(), pattern).eval(), torch.randn(2, 3, 8, 8)
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight.requires_grad_(False)
    plain = bake(model)
    assert type(plain) is Small
    assert {type(m) for m in plain.children()} == {nn.Linear, nn.Conv2d}
    assert list(plain.state_dict()) == list(Small().state_dict())
    assert torch.equal(plain(x), model(x))
    assert len(calls) == 2
    assert not plain.training
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in model.parameters()]
    for name, layer in masked_layers(model):
        pruned = plain.get_submodule(name).weight[~layer.current_mask()]
        assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned, dtype=torch.int32)), "+0.0"
    assert masks(model), "bake must not touch the model it is given"
    plain.train()(x).sum().backward()
    assert plain.conv.weight.grad[plain.conv.weight == 0].count_nonzero() > 0


def test_bake_of_a_compressed_or_half_compressed_model_of_others_is_torchs_own():
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    half = copy.deepcopy(model)
    half.head = compress(model).head
    for network in (compress(model), half):
        plain = bake(network)
        assert {type(m) for m in plain.children()} == {nn.Linear, nn.Conv2d}
        assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bake_of_a_model_of_which_compress_leaves_every_layer_dense(dtype):
    model = sparsify(nn.Sequential(nn.Conv2d(16, 16, 3, groups=4)).to(dtype), "2:4")
    plain = bake(compress(model))
    assert type(plain[0]) is nn.Conv2d
    pruned = plain[0].weight[~model[0].current_mask()]
    assert not pruned.signbit().any(), "+0.0"
    assert torch.equal(plain[0].weight, bake(model)[0].weight)


def test_a_baked_model_trains_without_the_decay_of_the_masked_one():
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    expected = bake(model)
    expected(x).sum().backward()
    set_masking(model, decay=2e-4)
    for network in (model, compress(model)):
        plain = bake(network).train()
        plain(x).sum().backward()
        for got, wanted in zip(plain.parameters(), expected.parameters()):
            assert torch.equal(got.grad, wanted.grad)


def test_bake_of_our_own_model_of_a_compressed_one_and_of_tied_weights(tmp_path):
    model = sparsify(build_model(UVIT), "2:4").eval()
    for network in (model, compress(model)):
        plain = bake(network)
        assert not masks(plain)
        with torch.no_grad():
            assert torch.equal(plain(*model.example_inputs()), model(*model.example_inputs()))
        assert load_model(save_model(tmp_path / "m.safetensors", plain), build_model).kind == "dense"
    twice = sparsify(Tied(), "2:4", "first|second")
    twice.second = twice.first
    for network in (twice, compress(twice)):
        plain = bake(network)
        assert plain.second is plain.first
        assert torch.equal(plain(torch.arange(24)), twice(torch.arange(24)))
    tied = sparsify(Tied(), "2:4", "first|second")
    plain = bake(tied)
    assert plain.first.weight is plain.second.weight
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain(torch.arange(24)), tied(torch.arange(24)))
    with pytest.raises(InputError, match=r"embed.weight and head.weight share one weight under different masks"):
        bake(sparsify(tied, "2:4", "head"))
    with pytest.raises(InputError, match="no masked layer"):
        bake(Small())
