"""The mask of a layer is that of today's weight, whoever wrote it; a cast to fewer bits freezes it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm import MaskedAdamW
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw
from sparsedm.kernels.pattern import group_view, select_mask_ref, ungroup
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import hold_masks, set_masking, sparsify


def reference_mask(weight, pattern):
    return ungroup(select_mask_ref(group_view(weight), pattern), weight.shape)


def changed_by_optimizer(layer, kind, **options):
    layer(torch.randn(4, 64)).square().sum().backward()
    kind(layer.parameters(), lr=1.0, **options).step()


def changed_by_ema(layer):
    average = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    average.update_parameters(Linear(64, 32))  # the first update is a copy
    average.module(torch.randn(4, 64))
    before = average.module.weight.clone()
    average.update_parameters(Linear(64, 32))
    assert not torch.equal(before, average.module.weight)
    return average.module


def changed_with_the_version_kept(layer):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.weight):
        layer.weight.copy_(torch.randn(32, 64))


CHANGES = {
    "in place": lambda m: nn.init.normal_(m.weight),
    "adamw foreach": lambda m: changed_by_optimizer(m, torch.optim.AdamW, foreach=True),
    "adamw fused": lambda m: changed_by_optimizer(m, torch.optim.AdamW, fused=True),
    "adamw for-loop": lambda m: changed_by_optimizer(m, torch.optim.AdamW, foreach=False),
    "sgd": lambda m: changed_by_optimizer(m, torch.optim.SGD),
    "load_state_dict": lambda m: m.load_state_dict(Linear(64, 32).state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(Linear(64, 32).state_dict(), assign=True),
    "ema": changed_by_ema,
    "new parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(32, 64))),
    ".data =": lambda m: setattr(m.weight, "data", torch.randn(32, 64)),
    ".to(float64)": lambda m: m.to(torch.float64),
    "deepcopy": lambda m: copy.deepcopy(m),
    ".data in place": lambda m: m.weight.data.mul_(torch.randn(32, 64)),
    "numpy": lambda m: m.weight.detach().numpy().__imul__(torch.randn(32, 64).numpy()),
    "version kept": changed_with_the_version_kept,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_never_used_with_a_stale_mask(change):
    layer = Linear(64, 32, pattern="2:4")
    layer(torch.randn(4, 64))
    result = change(layer)
    layer = result if isinstance(result, Linear) else layer
    expected = layer.weight * reference_mask(layer.weight, layer.pattern)
    assert torch.equal(layer.effective_weight(), expected)


def test_a_frozen_mask_stays_and_travels_with_the_weights():
    layer = Linear(64, 32, pattern="2:4")
    set_masking(layer, frozen=True)
    mask = layer.current_mask()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 64))
    assert torch.equal(layer.current_mask(), mask)
    assert not torch.equal(mask, reference_mask(layer.weight, layer.pattern))
    other = Linear(64, 32, pattern="2:4")
    set_masking(other, frozen=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(torch.eye(64)), layer(torch.eye(64)))
    set_masking(layer, frozen=False)
    assert torch.equal(layer.current_mask(), reference_mask(layer.weight, layer.pattern))


def test_a_frozen_mask_that_is_loaded_alone_counts_at_once():
    layer = Linear(64, 32, pattern="2:4")
    layer.freeze_mask()
    layer(torch.randn(4, 64))
    other = torch.rand(32, 64) < 0.5
    layer.load_state_dict({"mask": other}, strict=False)
    assert torch.equal(layer.effective_weight(), layer.weight * other)


def test_a_frozen_mask_prunes_infinity_too():
    layer = Linear(64, 32, pattern="2:4")
    layer.freeze_mask()
    with torch.no_grad():
        layer.weight[~layer.mask] = float("inf")
    assert layer(torch.randn(4, 64)).isfinite().all()
    assert compress(layer)(torch.randn(4, 64)).isfinite().all()


def test_a_forward_in_inference_mode_leaves_nothing_to_the_next_training_step():
    layer = Linear(64, 32, pattern="2:4")
    expected = layer(torch.eye(64))
    with torch.inference_mode():
        assert torch.equal(layer(torch.eye(64)), expected)
        block = hold_masks(layer)
        block.__enter__()
    layer(torch.eye(64)).square().sum().backward()
    block.__exit__(None, None, None)
    assert layer.weight.grad.count_nonzero() > 0


def test_an_optimizer_that_writes_through_data_trains_as_one_that_does_not():
    weights = []
    for through_data in (False, True):
        torch.manual_seed(0)
        layer, x = Linear(64, 32, pattern="2:4"), torch.randn(9, 64)
        for _ in range(5):
            layer.zero_grad()
            layer(x).square().sum().backward()
            with torch.no_grad():
                for p in layer.parameters():
                    (p.data if through_data else p).add_(p.grad, alpha=-0.01)
        weights.append(layer.weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("way", ["torch", "kernel"])
@pytest.mark.parametrize("thaw", [lambda m: set_masking(m, frozen=False), lambda m: sparsify(m, "2:4")])
def test_a_mask_that_was_frozen_through_steps_is_no_choice_of_the_next_block(thaw, way, monkeypatch):
    if way == "kernel":
        monkeypatch.setattr(masked_adamw, "uses_triton", lambda *tensors: True)
    torch.manual_seed(0)
    model, x = sparsify(nn.Sequential(nn.Linear(16, 16)), "2:4"), torch.randn(8, 16)
    optimizer = MaskedAdamW(model.parameters(), lr=0.5, model=model)

    def step():
        with hold_masks(model, optimizer=optimizer):
            model(x).square().sum().backward()
        optimizer.step()

    step()
    set_masking(model, frozen=True)
    step(), step()
    frozen = model[0].current_mask()
    thaw(model)
    with hold_masks(model, optimizer=optimizer):
        mask = model[0].current_mask()
    assert torch.equal(mask, reference_mask(model[0].weight, model[0].pattern))
    assert not torch.equal(mask, frozen)


# ---- casts keep the masks of today's weights -------------------------------------------------------------------------

CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "to like": lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    "twice": lambda m: m.to(torch.bfloat16).half(),
}


def cast_of(weight, cast):
    """The weight as the same cast leaves it in a plain layer."""
    plain = nn.Linear(1, 1)
    plain.weight.data = weight
    return cast(plain).weight.detach()


def test_a_mask_that_a_cast_froze_in_eval_mode_is_said_to_be_when_it_trains():
    model = nn.Sequential(Linear(16, 16, pattern="2:4")).eval().half().float()
    with pytest.warns(UserWarning, match="a cast in eval mode froze the masks"):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].freeze_mask(False)
        model.eval().train()
        model[0].freeze_mask()  # by the user
        model.eval().half().train()


def test_gradient_settings_release_what_only_a_cast_froze():
    """A cast's freeze is nobody's choice; the user's own stays, cast or not."""
    model = nn.Sequential(*(Linear(16, 16, pattern="2:4") for _ in range(3))).eval()
    model[1].freeze_mask()
    model.bfloat16()
    model[2].freeze_mask()
    set_masking(model, decay=2e-4)
    assert [layer.mask is not None for layer in model] == [False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16, 16))
    assert torch.equal(model[0].current_mask(), reference_mask(model[0].weight, model[0].pattern))


def test_a_mask_that_is_loaded_after_a_cast_stays():
    model, calibrated = (nn.Sequential(Linear(16, 16, pattern="2:4")).eval() for _ in range(2))
    calibrated[0].freeze_mask()
    calibrated[0].mask = calibrated[0].mask.roll(4, 1)
    model.bfloat16().load_state_dict(calibrated.state_dict())
    set_masking(model, dropped=0.0)
    assert torch.equal(model[0].mask, calibrated[0].mask)


def test_a_mask_that_the_user_freezes_after_a_cast_stays_frozen():
    model = nn.Sequential(Linear(16, 16, pattern="2:4")).eval().bfloat16()
    set_masking(model, frozen=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
    set_masking(model, decay=2e-4)
    assert model[0].mask is not None


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_to_fewer_bits_freezes_the_masks_and_says_so(cast):
    model = nn.Sequential(nn.Sequential(Linear(512, 512, pattern="2:4")), Conv2d(64, 64, 3, pattern="2:4"))
    before = [model[0][0].current_mask(), model[1].current_mask()]
    small = compress(model)
    with pytest.warns(UserWarning, match=r"the cast to torch\.\w+ froze the masks"):
        cast(model)
    assert [layer.mask.dtype for layer in (model[0][0], model[1])] == [torch.bool] * 2
    assert all(map(torch.equal, before, [model[0][0].current_mask(), model[1].current_mask()]))
    assert "1.mask" in model.state_dict()
    for mine, theirs in zip((model[0][0], model[1]), (small[0][0], small[1])):
        assert torch.equal(mine.effective_weight(), cast_of(theirs.dense_weight(), cast))
    model[1].freeze_mask(False)
    assert torch.equal(model[1].current_mask(), reference_mask(model[1].weight, model[1].pattern))


def test_a_cast_to_more_bits_or_another_device_freezes_nothing(recwarn):
    layer = Linear(64, 32, pattern="2:4")
    for other in (layer.double(), layer.to("cpu"), layer.eval().to(torch.float64), Linear(8, 8).half()):
        assert other.mask is None
    with torch.device("meta"):
        assert Linear(8, 8, pattern="2:4").half().mask is None
    assert not recwarn.list
    assert layer.float().mask is not None
    assert not recwarn.list, "in eval mode nobody goes on training"


def test_a_cast_keeps_the_masks_of_a_weight_that_three_layers_share():
    model = nn.Sequential(*(Linear(512, 512, pattern="2:4") for _ in range(3))).eval()
    model[1].weight = model[2].weight = model[0].weight
    mask = model[0].current_mask()
    for _ in range(2):
        model.half()
        assert all(torch.equal(layer.current_mask(), mask) for layer in model)
        model.float()


def test_a_mask_that_a_cast_of_another_module_has_lost_is_refused_by_name():
    model = nn.Sequential(nn.Embedding(64, 64), Linear(64, 64, pattern="2:4")).eval()
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match=r"another module that shares a weight cast it first.*frozen=True"):
        model.half()
    model.float()
    set_masking(model, frozen=True)
    mask = model[1].current_mask()
    assert torch.equal(model.half()[1].current_mask(), mask)


def test_a_weight_that_is_replaced_by_a_rounded_one_has_the_mask_of_that():
    """As by `p.data = p.data.half()`, or by FSDP2, whose layers see bf16 weights in mixed precision."""
    layer, x = Linear(512, 64, bias=False, pattern="2:4"), torch.randn(4, 512)
    before, rounded = layer.current_mask(), layer.weight.detach().bfloat16()
    layer.weight.data = rounded
    expected = reference_mask(rounded, layer.pattern)
    assert layer.mask is None
    assert torch.equal(layer.current_mask(), expected)
    assert not torch.equal(before, expected), "rounding makes ties"
    assert torch.equal(layer(x.bfloat16()), F.linear(x.bfloat16(), rounded * expected))


@pytest.mark.parametrize("later", [lambda m: m.to("cpu"), lambda m: m.float(), lambda m: m.share_memory()])
def test_a_model_of_rounded_weights_can_be_moved_and_cast(later):
    model = nn.Sequential(nn.Linear(64, 64), Linear(64, 64, pattern="2:4"))
    for p in model.parameters():
        p.data = p.data.bfloat16()
    mask = model[1].current_mask()
    later(model)
    assert model[1].mask is None
    assert torch.equal(model[1].current_mask(), mask)
    with pytest.warns(UserWarning, match="froze the masks"):
        model.half()
    assert torch.equal(model[1].current_mask(), mask)


def test_layerwise_casting_keeps_the_masks():
    casting = pytest.importorskip("diffusers.hooks").apply_layerwise_casting
    model = nn.Sequential(Linear(512, 512, pattern="2:4")).eval()
    mask = model[0].current_mask()
    casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 512).bfloat16()
    stored = model[0].weight.detach().bfloat16()
    assert torch.equal(model(x), F.linear(x, stored * mask, model[0].bias.bfloat16()))
    assert model[0].weight.dtype == torch.float8_e4m3fn
