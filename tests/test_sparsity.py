import copy
import io
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsedm
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels import mask as mask_file
from sparsedm.kernels.pattern import Pattern, holds
from sparsedm.kernels.sparse24.format import TORCH_TENSORS
from sparsedm.layers import CompressedConv2d, CompressedLinear, Linear
from sparsedm.model_files import load_model, save_model
from sparsedm.models import build_model
from sparsedm.sparsity import bake, compress, decompress, hold_masks, masked_layers, masks, set_masking, sparsify
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2}


class Small(nn.Module):
    """A convolution with 3 input channels (never 2:4), one with 32, and two linears, one of them narrow."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.head, self.narrow = nn.Linear(32, 30), nn.Linear(30, 5)

    def forward(self, x):
        return self.narrow(F.gelu(self.head(self.conv(F.silu(self.stem(x))).mean((2, 3)))))


# ---- sparsify --------------------------------------------------------------------------------------------------------


def test_sparsify_swaps_plain_layers_and_keeps_everything_they_hold():
    model, x = Small(), torch.randn(2, 3, 8, 8)
    keys, before = list(model.state_dict()), dict(model.named_parameters())
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(model.parameters())
    dense = model(x)
    assert sparsify(model, "2:4") is model
    assert list(model.state_dict()) == keys
    assert all(p is before[n] for n, p in model.named_parameters())
    assert {n: str(m.pattern) for n, m in model.named_modules() if getattr(m, "pattern", None)} == {
        "conv": "2:4",
        "head": "2:4",
    }
    assert model.stem.dense_reason == "the input axis 3 is not a multiple of 4"
    assert model.narrow.dense_reason == "the input axis 30 is not a multiple of 4"
    y = model(x)
    assert not torch.equal(y, dense)
    assert len(calls) == 2
    y.sum().backward()
    weight = model.head.weight.clone()
    optimizer.step()
    assert not torch.equal(weight, model.head.weight)
    sparsify(model, "dense")
    assert masks(model) == {}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("all", {"conv", "head"}),
        (r"hea", {"head"}),
        (["conv"], {"conv"}),
        (lambda name, module: isinstance(module, nn.Conv2d), {"conv"}),
    ],
    ids=["all", "regex", "list", "predicate"],
)
def test_where_selects(where, expected):
    model = sparsify(Small(), "2:4", where)
    assert set(masks(model)) == expected


def test_a_model_names_its_own_sparse_layers():
    model = Small()
    model.sparse_layers = r"^conv$"
    assert set(masks(sparsify(model, "2:4"))) == {"conv"}
    assert model.head.dense_reason == "not selected"
    assert set(masks(sparsify(model, "2:4", "all"))) == {"conv", "head"}


def test_a_model_inside_a_wrapper_has_its_own_default_and_one_of_a_known_name_only_has_none():
    class UNet2DModel(nn.Module):  # as diffusers names its layers
        def __init__(self):
            super().__init__()
            self.conv_in, self.conv_mid = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    class VisionTransformer(nn.Module):  # of somebody else
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)

    model = UNet2DModel()
    two = nn.Sequential(model, copy.deepcopy(model))
    inside = [(model, [""]), (nn.Sequential(nn.Identity(), model), ["1."]), (nn.DataParallel(model), ["module."])]
    for wrapped, prefixes in [*inside, (two, ["0.", "1."])]:
        assert set(masks(sparsify(copy.deepcopy(wrapped), "2:4"))) == {f"{prefix}conv_mid" for prefix in prefixes}
    assert set(masks(sparsify(VisionTransformer(), "2:4"))) == {"first"}


def test_shared_and_special_layers():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    model["b"] = model["a"]
    sparsify(model, "2:4")
    assert model["a"] is model["b"]
    assert isinstance(model["a"], Linear)
    out = model["attention"].out_proj
    assert type(out) is nn.modules.linear.NonDynamicallyQuantizableLinear
    assert out.dense_reason == "MultiheadAttention reads its weight without calling it"


def quantised(layer):
    """A linear layer with an int8 weight: the tensor subclass that quantisation libraries leave behind."""

    class Int8Tensor(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Int8Tensor))
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "computed from other tensors"),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), "computed from other tensors"),
        (quantised(nn.Linear(8, 8)), "its weight is a Int8Tensor"),
        (type("LoRALinear", (nn.Linear,), {})(8, 8), "LoRALinear is a special kind of Linear"),
        (nn.ModuleDict({"lora_A": nn.Linear(8, 4, bias=False)}), "a LoRA factor"),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "TransformerEncoderLayer reads its weight"),
    ],
    ids=["weight_norm", "spectral_norm", "quantised", "subclass", "lora", "encoder layer"],
)
def test_what_cannot_be_masked_stays_as_it_is_and_says_why(layer, reason):
    model = sparsify(nn.Sequential(nn.Linear(8, 8), layer), "2:4")
    assert list(masks(model)) == ["0"]
    reasons = [m.dense_reason for n, m in model.named_modules() if n.startswith("1") and hasattr(m, "dense_reason")]
    assert any(reason in r for r in reasons)


def test_an_encoder_layer_computes_the_same_on_its_fast_path():
    """In eval mode TransformerEncoderLayer multiplies its layers' weights itself: a mask there would be passed over."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model, x = sparsify(nn.Sequential(layer, nn.Linear(8, 8)), "2:4"), torch.randn(2, 3, 8)
    with torch.no_grad():
        y = model.train()(x)
        assert_as_good_as_torch(model.eval()(x), copy.deepcopy(model).double().train()(x.double()), y)


def test_a_tied_weight_has_one_mask_and_stays_tied():
    table, head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
    head.weight = table.weight
    model = sparsify(nn.Sequential(table, nn.Linear(8, 8), head), "2:4")
    assert model[2].weight is table.weight
    small, ids = compress(model), torch.arange(5)
    with torch.no_grad():
        assert torch.equal(small[0](ids), table(ids)), "the embedding is not pruned by the layer it shares with"
        assert_as_good_as_torch(small(ids), copy.deepcopy(model).double()(ids), model(ids))


def test_a_bare_layer_is_sparsified_too():
    layer = sparsify(nn.Linear(8, 8), "2:4")
    assert str(layer.pattern) == "2:4"


def test_saving_copying_and_pickling_a_masked_model():
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsify(Small(), "2:4", "nothing"), "where='nothing' selects none of the 4"),
        (lambda: sparsify(Small(), "2:4", "("), "not a regular expression"),
        (lambda: sparsify(Small(), "2:4", ["conv", "tail"]), "does not have: tail"),
        (lambda: sparsify(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), "2:4", ["0", "1"]), "does not have: 0"),
        (lambda: sparsify(Small(), "2:4", 3), "where=3: an expression, a list of names, or a predicate"),
        (lambda: sparsify(Small(), "2:4", [3]), "does not have: 3"),
        (lambda: sparsify(nn.Linear(8, 8, dtype=torch.complex64), "2:4"), "its weight is complex64"),
        (lambda: sparsify(Small(), "2:4", "narrow"), "no selected layer can hold 2:4: the input axis 30"),
        (lambda: compress(Small()), "holds no masked layer"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_inputs_may_be_named_as_in_torch():
    """In every state of a layer."""
    for layer, x in ((nn.Linear(8, 8), torch.randn(2, 8)), (nn.Conv2d(8, 8, 1), torch.randn(1, 8, 2, 2))):
        model = sparsify(nn.Sequential(layer), "2:4")
        for form in (model, compress(model), bake(model)):
            assert torch.equal(form[0](input=x), form[0](x))


# ---- calibrated masks ----


class Called(nn.Module):
    """Layers that meet their inputs in every way: twice, in two parts, by keyword, in groups, unbatched."""

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1, groups=2)
        self.twice, self.parts = nn.Linear(12, 12), Linear(20, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, shift=0.0):
        x = self.dropout(x)
        h = self.grouped(input=self.conv(x) + shift).mean((-2, -1))
        return self.parts(self.twice(self.twice(h)), skip=x.mean((-2, -1)))


def wanda_by_hand(weight, x, groups=1):
    """bool mask of 2:4 from inputs x (rows, channels), one score after the other."""
    keep, per = torch.zeros_like(weight, dtype=torch.bool), weight.shape[1]
    for out, *tap in torch.ones_like(weight[:, 0]).nonzero().tolist():
        first = out // (weight.shape[0] // groups) * per
        for start in range(0, per, 4):
            scores = [
                abs(weight[(out, start + i, *tap)].item()) * x[:, first + start + i].norm().item() for i in range(4)
            ]
            for i in sorted(range(4), key=lambda i: -scores[i])[:2]:
                keep[(out, start + i, *tap)] = True
    return keep


def test_calibrated_masks_are_wandas_and_stay():
    torch.manual_seed(0)
    model = Called().train()
    batches = [torch.randn(3, 8, 6, 6), {"x": torch.randn(2, 8, 6, 6), "shift": 0.5}, (torch.randn(8, 6, 6), 1.0)]
    batches[0][:, 2] *= 30  # an outlier, which Wanda keeps
    inputs = {name: [] for name in ("conv", "grouped", "twice", "parts")}
    with torch.no_grad():
        for batch, shift in zip((batches[0], batches[1]["x"], batches[2][0][None]), (0.0, 0.5, 1.0)):
            c = model.conv(batch) + shift
            h = model.grouped(c).mean((2, 3))
            inputs["conv"].append(batch.movedim(1, -1).reshape(-1, 8))
            inputs["grouped"].append(c.movedim(1, -1).reshape(-1, 8))
            inputs["twice"] += [h, model.twice(h)]
            inputs["parts"].append(torch.cat((model.twice(model.twice(h)), batch.mean((2, 3))), -1))
    assert sparsify(model, "2:4", calibrate=iter(batches)) is model
    assert all(module.training for module in model.modules())
    found = masks(model)
    for name, x in inputs.items():
        layer = model.get_submodule(name)
        assert torch.equal(found[name], wanda_by_hand(layer.weight, torch.cat(x), getattr(layer, "groups", 1))), name
        assert found[name] is layer.mask, "frozen"
        assert not layer._forward_pre_hooks
    assert not torch.equal(found["conv"], masks(sparsify(copy.deepcopy(model), "2:4"))["conv"])
    assert all(row.holds for row in inspect(model.eval(), (batches[0],)).rows if row.pattern == "2:4")


@torch.no_grad()
def test_a_calibrated_mask_keeps_more_of_the_output_and_survives_a_file(tmp_path):
    torch.manual_seed(0)
    dense = build_model(UVIT).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.05)
    inputs = (torch.randn(16, 3, 8, 8), torch.linspace(0, 999, 16))
    errors, models = [], [sparsify(copy.deepcopy(dense), "2:4", calibrate=c) for c in (None, [inputs])]
    for model in models:
        errors.append((model(*inputs) - dense(*inputs)).square().mean().item())
    assert errors[1] < errors[0]
    save_model(tmp_path / "m.safetensors", models[1])
    assert torch.equal(load_model(tmp_path / "m.safetensors", build_model).model(*inputs), models[1](*inputs))
    assert_as_good_as_torch(
        compress(models[1])(*inputs), models[1].double()(*(x.double() for x in inputs)), models[1].float()(*inputs)
    )


def test_inputs_that_were_always_zero_leave_the_choice_to_the_magnitudes():
    model = nn.Sequential(nn.Linear(8, 4))
    by_magnitude = masks(sparsify(copy.deepcopy(model), "2:4"))["0"]
    half = torch.zeros(2, 8)
    half[:, 4:] = torch.tensor([9.0, 1, 1, 1])
    found = masks(sparsify(copy.deepcopy(model), "2:4", calibrate=[half]))["0"]
    assert torch.equal(found[:, :4], by_magnitude[:, :4])
    assert torch.equal(masks(sparsify(model, "2:4", calibrate=[torch.zeros(2, 8)]))["0"], by_magnitude)


@pytest.mark.parametrize(
    ("batches", "rule"),
    [
        ([], "no batch of calibrate reaches conv"),
        ([torch.randn(0, 8, 6, 6)], r"empty batch: the input of conv is \(0, 8, 6, 6\)"),
        ([torch.full((1, 8, 6, 6), torch.nan)], "inputs of conv in calibrate hold NaN"),
        (torch.randn(2, 8, 6, 6), "calibrate is a Tensor: a list of batches"),
    ],
)
def test_calibration_that_says_nothing_is_refused_and_changes_nothing(batches, rule):
    model = Called()
    with pytest.raises(InputError, match=rule):
        sparsify(model, "2:4", calibrate=batches)
    assert type(model.conv) is nn.Conv2d
    assert not model.conv._forward_pre_hooks
    with pytest.raises(InputError, match="without a pattern there are none"):
        sparsify(model, None, calibrate=[torch.randn(1, 8, 6, 6)])


# ---- masks of compiled models ----------------------------------------------------------------------------------------


@pytest.fixture
def choices(monkeypatch):
    """How often a mask was chosen, in eager code or inside of a graph."""
    calls, choose = [], mask_file._select_in_torch
    monkeypatch.setattr(mask_file, "_select_in_torch", lambda *a: (calls.append(1), choose(*a))[1])
    return calls


def gradients(model, compiled, x):
    model.zero_grad()
    loss = compiled(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("amp", [False, True])
def test_a_compiled_model_whose_masks_are_held_chooses_once_per_step(choices, amp):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    set_masking(model, decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for _ in range(3):
        choices.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            with hold_masks(model, model):
                for _ in range(2):
                    found = gradients(model, compiled, x)
            assert len(choices) == 2, "one for each masked layer"
            expected = gradients(model, model, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        optimizer.step()
    assert graphs.frame_count == 1


def test_outside_of_the_block_and_for_other_weights_a_compiled_model_chooses_by_itself(choices):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    call = torch.compile(lambda w: torch.func.functional_call(model, w, (x,)), fullgraph=True, backend="aot_eager")
    with hold_masks(model):
        held = compiled(x)
        exported_there = torch.export.export(model, (x,)).module()
        assert torch.equal(call(others), torch.func.functional_call(model, others, (x,)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), held)
    exported_there.load_state_dict(model.state_dict())
    assert torch.equal(exported_there(x), model(x))
    with hold_masks(model):
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.zeros_(model.head.weight),
        lambda model: model.load_state_dict(Small().state_dict()),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(30, 32))),
        lambda model: torch.optim.AdamW(model.parameters(), 0.1, fused=True).step(),
        lambda model: model.double(),
        lambda model: model.head.weight.data.neg_(),
        lambda model: model.conv.weight.data.copy_(model.conv.weight.flip(0)),
        lambda model: model.conv.weight.data.copy_(model.conv.weight.flip(1)),
        lambda model: model.head.weight.detach().numpy().__iadd__(1e-7),
    ],
    ids=[
        "in place",
        "load_state_dict",
        "new parameter",
        "fused step",
        ".double()",
        "signs",
        "rows",
        "columns",
        "numpy",
    ],
)
def test_a_weight_that_changes_while_its_mask_is_held_is_refused(change):
    model, x = sparsify(Small(), "2:4"), torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    with pytest.raises(InputError, match=r"the weight of (conv|head) was changed while its mask"), hold_masks(model):
        change(model)
    with hold_masks(model):
        pass  # and it can be held again


def test_a_mask_that_is_set_while_it_is_held_counts(choices):
    torch._dynamo.reset()
    model, x = sparsify(Small(), "2:4").eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with hold_masks(model):
        before = compiled(x)
        sparsify(model, "1:4")
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(before, model(x))


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


def test_layers_move_to_torchs_sparse_tensors_and_back():
    model = sparsify(nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 4)).bfloat16(), "2:4", ["0"])
    small = compress(model)
    held = decompress(small, "cutlass")
    assert isinstance(held[0].weight, TORCH_TENSORS["cutlass"])
    assert torch.equal(held[0].weight.to_dense(), model[0].effective_weight())
    back = compress(held)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), small.state_dict().values()))


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


def test_a_replaced_forward_is_not_masked_in_vain():
    """Hooks of accelerate and diffusers put a closure over the old layer in its place."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = type(model[0]).forward.__get__(model[0])
    assert set(masks(sparsify(model, "2:4"))) == {"1"}
    assert "its forward was replaced" in model[0].dense_reason


def test_weights_that_are_swapped_unseen_are_seen_at_the_next_turn():
    """`weight.data` writes, as of diffusers' EMAModel.copy_to or merged LoRA, do not move torch's counter."""
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
    assert not any(module.training for module in again.modules())
    assert all(module.training for module in decompress(compress(model).train()).modules())


def test_layers_outside_of_a_known_model_say_so():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.eye = nn.Linear(8, 8), build_model(UVIT)

    model = sparsify(Other(), "2:4")
    assert all(name.startswith("eye.") for name in masks(model))
    assert model.body.dense_reason == "outside the model that this package knows: name it in where="
    assert set(masks(sparsify(Other(), "2:4", ["body"]))) == {"body"}


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


# ---- other models, and models as others use them ---------------------------------------------------------------------


def test_a_lone_layer_becomes_ours_in_place():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    dense = layer(x)
    assert sparsify(layer, "2:4") is layer
    assert not torch.equal(layer(x), dense)
    model = nn.Sequential(nn.Linear(8, 8))
    model.layers = [model[0]]  # whoever holds it, holds ours
    sparsify(model, "2:4")
    assert torch.equal(model.layers[0](x), model(x))


def test_gradients_of_a_model_without_masks_cannot_be_set():
    with pytest.raises(InputError, match=r"no masked layer .*: call sparsify first"):
        set_masking(Small(), decay=2e-4)


def test_dora_on_a_masked_layer_is_refused_and_plain_lora_is_not():
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 32)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.conv = nn.Linear(32, 32), nn.Conv2d(32, 32, 3)

        def forward(self, x):
            return self.fc(x)

    for name in ("fc", "conv"):
        config = peft.LoraConfig(r=4, target_modules=[name], use_dora=True)
        with pytest.raises(InputError, match="DoRA"):
            peft.get_peft_model(sparsify(Net(), "2:4"), config)
    before = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["fc"], use_dora=True))
    assert "DoRA reads its weight" in inspect(sparsify(before, "2:4", "conv|base_layer"), (x,)).rows[0].why
    plain = sparsify(Net(), "2:4").eval()
    expected = plain(x)
    assert torch.equal(peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["fc"]))(x), expected)


def test_fusing_masked_projections_is_refused():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model = sparsify(nn.Sequential(attention(32, heads=2, dim_head=16)), "2:4", "to_")
    with pytest.raises(InputError, match=r"fuse_qkv_projections\(\) would drop the masks"):
        model[0].fuse_projections()
    sparsify(model, None)
    model[0].fuse_projections()


# ---- tied weights ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that holds the embedding's weight, and two layers that hold one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24, bias=False)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head.weight, self.second.weight = self.embed.weight, self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x)).tanh()))


def test_tied_weights_stay_tied_through_every_form_and_file(tmp_path):
    model, x = sparsify(Tied(), "2:4").eval(), torch.arange(24)[None]
    small = compress(model)
    again = decompress(small)
    assert again.head.weight is again.embed.weight
    assert again.second.weight is again.first.weight
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(again(x), expected)
        for number, network in enumerate((model, small, again)):
            file = save_model(tmp_path / f"{number}.safetensors", network)
            loaded = load_model(file, lambda config: Tied(), config={}).model
            assert torch.equal(loaded(x), expected)
    model.second.bias, model.again = model.first.bias, model.first  # a bias is shared, too, and a whole layer
    again = decompress(compress(model))
    assert again.second.bias is again.first.bias
    assert again.again is again.first
    with torch.no_grad():
        assert torch.allclose(again(x), model(x), atol=1e-6)
    loose = sparsify(Tied(), "2:4")
    loose.second.weight = nn.Parameter(torch.randn(32, 32))
    file = save_model(tmp_path / "loose.safetensors", loose)
    with pytest.raises(InputError, match=r"1 tied in the model but different in the file \(second.weight\)"):
        load_model(file, lambda config: Tied(), config={})
    with torch.no_grad():
        small.embed.weight.mul_(2)
    with pytest.raises(InputError, match=r"head.weight was tied to embed.weight, but their values now differ"):
        decompress(small)


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
    tied = sparsify(Tied(), "2:4", "first|second")
    plain = bake(tied)
    assert plain.first.weight is plain.second.weight
    assert plain.head.weight is plain.embed.weight
    assert torch.equal(plain(torch.arange(24)), tied(torch.arange(24)))
    with pytest.raises(InputError, match=r"embed.weight and head.weight share one weight under different masks"):
        bake(sparsify(tied, "2:4", "head"))
    with pytest.raises(InputError, match="no masked layer"):
        bake(Small())
