"""Which layers `sparsify` takes, and when their masks are selected."""

import _thread
import collections
import copy
import io
import queue
import re

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from sparsedm.compression import bake, compress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.layers import Linear
from sparsedm.models import build_model
from sparsedm.sparsity import hold_masks, masks, set_masking, sparsify
from tests.tiny import Small
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 32, "depth": 2, "heads": 2}

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
        (lambda: sparsify(Small(), "2:4", ""), "where='' names nothing"),
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


# ---- other models, and models as others use them ---------------------------------------------------------------------


def test_a_replaced_forward_is_not_masked_in_vain():
    """Hooks of accelerate and diffusers put a closure over the old layer in its place."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = type(model[0]).forward.__get__(model[0])
    assert set(masks(sparsify(model, "2:4"))) == {"1"}
    assert "its forward was replaced" in model[0].dense_reason


def test_layers_outside_of_a_known_model_say_so():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.eye = nn.Linear(8, 8), build_model(UVIT)

    model = sparsify(Other(), "2:4")
    assert all(name.startswith("eye.") for name in masks(model))
    assert model.body.dense_reason == "outside the model that this package knows: name it in where="
    assert set(masks(sparsify(Other(), "2:4", ["body"]))) == {"body"}


def test_a_lone_layer_becomes_ours_in_place():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    dense = layer(x)
    assert sparsify(layer, "2:4") is layer
    assert not torch.equal(layer(x), dense)
    model = nn.Sequential(nn.Linear(8, 8))
    model.layers = [model[0]]  # whoever holds it, holds ours
    sparsify(model, "2:4")
    assert torch.equal(model.layers[0](x), model(x))


@pytest.mark.parametrize(
    "settings",
    [{"decay": float("nan")}, {"decay": -1}, {"kept": float("inf")}, {"dropped": "1"}, {"decay": None}, {"kept": True}],
)
def test_gradient_settings_are_finite_numbers(settings):
    (name,) = settings
    with pytest.raises(InputError, match=f"^{name}=.*must be a number of at least 0"):
        set_masking(sparsify(nn.Linear(16, 8), "2:4"), **settings)


def test_gradient_settings_may_be_numbers_of_numpy():
    layer = sparsify(nn.Linear(16, 8), "2:4")
    set_masking(layer, decay=np.float32(0.5))
    assert layer.rule.decay == 0.5


@pytest.mark.parametrize("frozen", ["no", 1, torch.ones(2)], ids=str)
def test_frozen_is_yes_no_or_none(frozen):
    layer = sparsify(nn.Linear(16, 8), "2:4")
    with pytest.raises(InputError, match=re.escape(f"frozen={frozen!r}: must be True, False, or None")):
        set_masking(layer, frozen=frozen)
    assert layer.mask is None


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


@pytest.mark.parametrize(
    ("compute", "compresses"),
    [
        (nn.utils.parametrizations.weight_norm, True),
        (nn.utils.spectral_norm, False),
        (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3), False),
    ],
    ids=["parametrization", "hook", "prune"],
)
def test_a_weight_that_is_computed_is_masked_anew_and_baked_as_a_parameter_only(compute, compresses):
    model, x = sparsify(nn.Sequential(nn.Linear(32, 16)), "2:4").eval(), torch.randn(3, 32)
    compute(model[0])
    with torch.no_grad():
        expected = model(x)
        with hold_masks(model):
            assert torch.equal(model(x), expected)
    with pytest.raises(InputError, match="the weight of 0 is computed from others: make it a parameter again"):
        bake(model)
    if compresses:
        torch.testing.assert_close(compress(model)(x), expected)
    else:
        with pytest.raises(InputError, match="the weight of 0 is computed from others"):
            compress(model)


def test_code_without_a_frame_may_ask_a_layer_for_its_base_layer():
    """The methods of peft that are refused are known by their frames; here is none."""
    layer, answer = sparsify(nn.Linear(8, 8), "2:4"), queue.SimpleQueue()
    _thread.start_new_thread(collections.deque, (map(answer.put, map(hasattr, [layer], ["base_layer"])),))
    assert answer.get(timeout=10) is False


def test_fusing_masked_projections_is_refused():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model = sparsify(nn.Sequential(attention(32, heads=2, dim_head=16)), "2:4", "to_")
    with pytest.raises(InputError, match=r"fuse_qkv_projections\(\) would drop the masks"):
        model[0].fuse_projections()
    sparsify(model, None)
    model[0].fuse_projections()


def test_a_mask_frozen_in_inference_mode_can_be_trained_with():
    layer = sparsify(nn.Linear(16, 8), "2:4")
    with torch.inference_mode():
        layer.freeze_mask()
    set_masking(layer, dropped=0.0)
    layer(torch.randn(2, 16)).sum().backward()
    with torch.inference_mode():
        sparsify(layer, "2:4", calibrate=[torch.randn(2, 16)])
    set_masking(layer, dropped=0.0)
    layer(torch.randn(2, 16)).sum().backward()
