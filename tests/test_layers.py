import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from sparsedm import MaskedAdamW
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern, group_view, select_mask_ref, ungroup
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import hold_masks, set_masking
from tests.tolerance import assert_as_good_as_torch

PATTERNS = ["1:2", "2:4", "3:4", "1:8", "4:16", "31:32"]


def reference_mask(weight, pattern):
    return ungroup(select_mask_ref(group_view(weight), pattern), weight.shape)


def layers_and_inputs(pattern, dtype=torch.float64, **kwargs):
    yield Linear(64, 24, dtype=dtype, pattern=pattern, **kwargs), torch.randn(2, 5, 64, dtype=dtype)
    yield Conv2d(32, 8, 3, padding=1, dtype=dtype, pattern=pattern, **kwargs), torch.randn(2, 32, 6, 6, dtype=dtype)


# ---- outputs and every gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [{}, {"decay": 2e-4}, {"kept": 0.5, "dropped": 0.0, "decay": 0.1}], ids=str)
def test_outputs_and_gradients_are_the_definition(pattern, settings):
    for layer, x in layers_and_inputs(pattern):
        set_masking(layer, **settings)
        x.requires_grad_()
        mask = reference_mask(layer.weight, Pattern.parse(pattern)).double()
        product = F.linear if isinstance(layer, Linear) else layer._conv_forward
        masked = (layer.weight * mask).detach().requires_grad_()
        expected = product(x, masked, layer.bias)
        up = torch.randn_like(expected)
        dx, g, db = torch.autograd.grad(expected, [x, masked, layer.bias], up)
        kept, dropped, decay = (settings.get(k, v) for k, v in [("kept", 1.0), ("dropped", 1.0), ("decay", 0.0)])
        dw = kept * mask * g + dropped * (1 - mask) * g + decay * (1 - mask) * layer.weight.detach()
        y = layer(x)
        y.backward(up)
        assert torch.equal(y, expected)
        assert_as_good_as_torch(x.grad, dx, dx.float())
        assert_as_good_as_torch(layer.weight.grad, dw, dw.float())
        assert_as_good_as_torch(layer.bias.grad, db, db.float())


def test_a_pruned_weight_cannot_change_y_and_yet_gets_a_gradient():
    layer, x = Linear(8, 4, pattern="2:4"), torch.randn(3, 8)
    pruned = ~layer.current_mask()
    before = layer(x)
    before.sum().backward()
    assert (layer.weight.grad[pruned] != 0).all()
    with torch.no_grad():
        layer.weight[pruned] *= 0.5  # smaller still: stays pruned
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", None])
def test_epilogue_is_activation_then_residual(activation):
    act = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu, None: lambda y: y}
    for layer, x in layers_and_inputs("2:4", activation=activation):
        plain = copy.deepcopy(layer)
        plain.activation = None
        y = plain(x)
        assert torch.equal(layer(x, residual=y), act[activation](y) + y)


def test_identity_input_returns_the_masked_weight():
    layer = Linear(16, 12, bias=False, pattern="2:4")
    assert torch.equal(layer(torch.eye(16)).T, layer.weight * layer.current_mask())


def test_autocast_computes_with_the_mask_chosen_from_the_master_weight():
    layer, x = Linear(64, 32, pattern="2:4"), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), (layer.weight * layer.current_mask()).bfloat16(), layer.bias.bfloat16())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_gradients_of_a_channels_last_convolution_are_those_of_the_usual_one():
    layer, x = Conv2d(32, 24, 3, stride=2, padding=1, pattern="2:4"), torch.randn(2, 32, 7, 7)
    set_masking(layer, decay=0.1)

    def gradients(layer, x):
        x = x.detach().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))

    low, high = gradients(layer, x), gradients(copy.deepcopy(layer).double(), x.double())
    nhwc = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for out, ref, torchs in zip(gradients(nhwc, x.to(memory_format=torch.channels_last)), high, low):
        assert_as_good_as_torch(out, ref, torchs)
    assert torch.equal(nhwc.current_mask(), layer.current_mask())
    assert nhwc.effective_weight().is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_under_torchs_transformations(kind):
    torch._dynamo.reset()
    layer, x = dict(zip(("linear", "conv"), layers_and_inputs("2:4", torch.float32)))[kind]
    set_masking(layer, decay=0.1)
    weight = layer.weight.detach()

    def loss(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square().sum()

    (expected,) = torch.autograd.grad(loss(layer.weight, x), layer.weight)
    double = copy.deepcopy(layer).double()
    (exact,) = torch.autograd.grad(double(x.double()).square().sum(), double.weight)
    assert_as_good_as_torch(torch.func.grad(loss)(weight, x), exact, expected)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x[:, None])
    for sample, gradient in zip(x, per_sample):
        alone = torch.func.grad(loss)(weight, sample[None])
        assert_as_good_as_torch(gradient, alone.double(), alone, eps=1e-5 * alone.abs().max().item())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    again = checkpoint(layer, x, use_reentrant=False)
    for y in (compiled(x), again):
        assert_as_good_as_torch(torch.autograd.grad(y.square().sum(), layer.weight)[0], exact, expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


# ---- what traces and transforms operations ---------------------------------------------------------------------------


def test_a_traced_graph_selects_masks_and_hides_nothing_in_c():
    """The graph held uninitialised memory instead of the masked weight, which C had filled unseen."""
    layer, x = Linear(64, 64, pattern="2:4"), torch.randn(64, 64)

    def run(weight, x):
        with torch.no_grad():
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

    graph = make_fx(run)(layer.weight.detach(), x)
    for weight in (layer.weight.detach(), torch.randn(64, 64)):
        torch.testing.assert_close(graph(weight, x), run(weight, x))


def test_stacked_weights_have_masks_of_their_own():
    layer, x, weights = Linear(32, 8, pattern="2:4"), torch.randn(5, 32), torch.randn(3, 8, 32)
    outputs = torch.func.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))(weights)
    for weight, y in zip(weights, outputs):
        torch.testing.assert_close(y, torch.func.functional_call(layer, {"weight": weight}, (x,)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("settings", [{}, {"kept": 0.5, "dropped": 0.25}])
def test_the_forward_derivative_is_the_transpose_of_the_gradient(kind, settings):
    layer, x = dict(zip(("linear", "conv"), layers_and_inputs("2:4", torch.float64)))[kind]
    set_masking(layer, **settings)
    tangent = torch.randn_like(layer.weight)

    def run(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    y, forward = torch.func.jvp(run, (layer.weight.detach(),), (tangent,))
    dy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(run(layer.weight), layer.weight, dy)
    torch.testing.assert_close((forward * dy).sum(), (gradient * tangent).sum())
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(layer.weight.detach(), tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, forward)


# ---- the decay is added once -----------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer that runs twice and another that holds the same weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Linear(32, 32, pattern="2:4"), Linear(32, 32, pattern="2:4")
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x).tanh()).tanh())


CALLS = {
    "eager": lambda m: m,
    "aot_eager": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "inductor": lambda m: torch.compile(m, fullgraph=True),
    "checkpoint": lambda m: lambda x: checkpoint(m, x, use_reentrant=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("copied", [False, True])
def test_every_backward_adds_the_decay_once_per_weight(call, copied):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, x = Shared(), torch.randn(5, 32)
    g = torch.autograd.grad(model(x).square().sum(), model.first.weight)[0]
    set_masking(model, decay=0.25)
    model = copy.deepcopy(model) if copied else model
    weight = model.first.weight
    expected = g + 0.25 * weight.detach() * ~model.first.current_mask()
    run = call(model)
    for _ in range(2):
        weight.grad = None
        run(x).square().sum().backward()
        torch.testing.assert_close(weight.grad, expected)
    with hold_masks(model):
        weight.grad = None
        run(x).square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), weight)[0], expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_compiled_layer_decays_weights_that_are_not_its_own(backend, kind):
    torch._dynamo.reset()
    layer, x = dict(zip(("linear", "conv"), layers_and_inputs("2:4", torch.float32)))[kind]
    set_masking(layer, decay=0.01, kept=0.5, dropped=2.0)
    weight = torch.randn_like(layer.weight, requires_grad=True)

    def gradient(call):
        return torch.autograd.grad(call(weight).square().mean(), weight)[0]

    def call(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    expected = gradient(call)
    torch.testing.assert_close(gradient(torch.compile(call, fullgraph=True, backend=backend)), expected)


def test_the_decay_is_added_to_weights_that_a_layer_holds_only_for_a_while():
    layer, x = Linear(32, 8, bias=False, pattern="2:4"), torch.randn(5, 32)
    set_masking(layer, decay=0.5)
    weights = [torch.randn(8, 32, requires_grad=True) for _ in range(2)]
    sum(torch.func.functional_call(layer, {"weight": weight}, (x,)).sum() for weight in weights).backward()
    for weight in weights:
        decay = 0.5 * weight.detach() * ~reference_mask(weight, layer.pattern)
        torch.testing.assert_close(weight.grad, x.sum(0).expand(8, 32) + decay)
        weight.grad = None
        (weight * 0.0).sum().backward()
        assert not weight.grad.count_nonzero(), "without the layer there is no decay"


def computed(layer, x):
    """(y by a weight that is computed from the layer's own, this own)"""
    weight = layer.weight
    return torch.func.functional_call(layer, {"weight": weight * 1.0}, (x,)), weight


def parametrized(layer, x):
    if not torch.nn.utils.parametrize.is_parametrized(layer):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Times())
    return layer(x), layer.parametrizations.weight.original


class Times(nn.Module):
    def forward(self, weight):
        return weight * 1.0


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", ["", "torch"])
@pytest.mark.parametrize("run", [lambda layer, x: (layer(x), layer.weight), computed, parametrized])
def test_every_derivative_holds_the_decay_once(run, backend, order, monkeypatch):
    """In a layer large enough for the C kernels; the second derivative passes the product twice."""
    monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    torch.manual_seed(0)
    layer, x = Linear(256, 128, bias=False, pattern="1:4"), torch.randn(256, 256, requires_grad=True)
    found = []
    for decay in (0.0, 100.0):
        set_masking(layer, decay=decay)
        y, weight = run(layer, x)
        loss = y.sum()
        if order == 2:
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            loss = loss + 1e-3 * dx.square().sum()
        found.append(torch.autograd.grad(loss, weight)[0])
    mask = reference_mask(weight, layer.pattern)
    torch.testing.assert_close(found[1] - found[0], 100 * weight.detach() * ~mask, atol=2e-2, rtol=1e-4)


def test_a_weight_computed_from_the_layers_own_takes_the_decay_where_it_runs_and_nowhere_twice():
    layer, x = Linear(32, 8, bias=False, pattern="2:4"), torch.zeros(5, 32)
    set_masking(layer, decay=0.5)
    expected = 0.5 * layer.weight.detach() * ~layer.current_mask()
    torch.testing.assert_close(torch.autograd.grad((computed(layer, x)[0] + layer(x)).sum(), layer.weight)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), layer.weight)[0], expected)
    optimizer = MaskedAdamW(layer.parameters(), model=layer)  # its step adds the decay
    assert not torch.autograd.grad(computed(layer, x)[0].sum(), layer.weight)[0].count_nonzero()
    del optimizer


@pytest.mark.parametrize("lent", [lambda v: v, lambda v: v * 1.0], ids=["leaf", "computed"])
@pytest.mark.parametrize("first", [True, False], ids=["own first", "lent first"])
def test_a_lent_weight_of_its_own_and_the_layers_are_both_decayed(lent, first):
    layer, x, v = Linear(32, 8, bias=False, pattern="2:4"), torch.zeros(5, 32), torch.randn(8, 32, requires_grad=True)
    set_masking(layer, decay=0.5)

    def gradients():
        own, other = layer(x), torch.func.functional_call(layer, {"weight": lent(v)}, (x,))
        return torch.autograd.grad((own + other if first else other + own).sum(), (layer.weight, v))

    def decay(weight):
        return 0.5 * weight.detach() * ~reference_mask(weight.detach(), layer.pattern)

    torch.testing.assert_close(gradients(), (decay(layer.weight), decay(v)))
    optimizer = MaskedAdamW(layer.parameters(), model=layer)  # its step adds the decay of the layer's own weight only
    torch.testing.assert_close(gradients(), (torch.zeros(8, 32), decay(v)))
    del optimizer


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["small", "large", "conv"])
def test_gradients_in_batches_are_those_one_by_one(kind, decay):
    """By torch's older vmap, as in `jacobian(vectorize=True)`: it hands out tensors without memory."""
    layer, x = {
        "small": (Linear(16, 16, pattern="2:4"), torch.randn(3, 16)),
        "large": (Linear(256, 128, pattern="1:8"), torch.randn(256, 256)),
        "conv": (Conv2d(16, 16, 3, pattern="1:8"), torch.randn(2, 16, 8, 8)),
    }[kind]
    set_masking(layer, decay=decay)
    leaves = x.requires_grad_(), layer.weight
    y = layer(x).flatten()[:3]
    batched = torch.autograd.grad(y, leaves, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(torch.eye(3)):
        for mine, alone in zip(batched, torch.autograd.grad(y, leaves, g, retain_graph=True)):
            torch.testing.assert_close(mine[i], alone)


def test_the_decay_of_a_shared_weight_is_that_of_the_layer_that_ran():
    first, second = (Linear(32, 8, bias=False, pattern="2:4") for _ in range(2))
    second.weight = first.weight
    set_masking(first, decay=0.25)
    set_masking(second, decay=0.5)
    for layer, decay in ((first, 0.25), (second, 0.5), (first, 0.25)):
        (gradient,) = torch.autograd.grad(layer(torch.zeros(5, 32)).sum(), first.weight)
        torch.testing.assert_close(gradient, decay * first.weight.detach() * ~first.current_mask())


LOST = {
    "swap_tensors": lambda layer: torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(8, 32))),
    "removed": lambda layer: layer.weight._backward_hooks.clear(),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_a_hook_that_is_lost_is_made_again(lose):
    layer, x = Linear(32, 8, bias=False, pattern="2:4"), torch.zeros(5, 32)
    set_masking(layer, decay=0.5)
    lose(layer)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 0.5 * layer.weight.detach() * ~layer.current_mask())


def test_the_decay_goes_where_the_weight_goes():
    layer, x = Linear(32, 8, pattern="2:4"), torch.randn(5, 32)
    set_masking(layer, decay=0.5)

    def decays():
        layer.zero_grad()
        layer(x).mul(0.0).sum().backward()
        return torch.equal(layer.weight.grad, 0.5 * layer.weight.detach() * ~layer.current_mask())

    assert decays()
    layer.weight = nn.Parameter(torch.randn(8, 32))
    assert decays()
    layer.load_state_dict(Linear(32, 8).state_dict(), assign=True)
    assert decays()
    layer.set_pattern(None)
    layer.zero_grad()
    layer(x).mul(0.0).sum().backward()
    assert not layer.weight.grad.count_nonzero()


def test_a_second_source_is_a_concatenation():
    layer = Linear(64, 32, pattern="2:4")
    x, residual = torch.randn(5, 64), torch.randn(5, 32)
    for form in (layer, compress(layer)):
        with torch.no_grad():
            assert torch.equal(form(x[:, :24], residual, skip=x[:, 24:]), form(x, residual))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Linear(6, 4, pattern="2:4"), r"pattern 2:4 does not fit weight \(4, 6\): the input axis 6"),
        (lambda: Linear(8, 4, pattern="2:5"), "group size must be one of 2, 4, 8, 16, 32"),
        (lambda: Linear(8, 4, pattern="3:2"), "keep at least 1 and fewer than 2"),
        (lambda: Linear(8, 4, pattern="0:4"), "keep at least 1"),
        (lambda: Linear(8, 4, pattern="half"), "unknown pattern 'half'"),
        (lambda: Pattern(2.0, 4), "pattern 2.0:4: keep=2.0 must be a whole number"),
        (lambda: Pattern(2, 4.0), "pattern 2:4.0: group=4.0 must be a whole number"),
        (lambda: Pattern(True, 4), "keep=True must be a whole number"),
        (lambda: Pattern("2", 4), "keep='2' must be a whole number"),
        (lambda: Linear(8, 4, activation="relu"), "unknown activation 'relu'"),
    ],
)
def test_bad_input_is_refused_with_the_rule(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_scale_gates_each_image_between_activation_and_residual():
    for form in (Linear(16, 8, activation="silu", pattern="2:4"), Linear(16, 8, activation="silu")):
        x, residual, gate = torch.randn(3, 5, 16), torch.randn(3, 5, 8), torch.randn(3, 8)
        plain = form(x)
        assert torch.equal(form(x, residual, scale=gate), plain * gate[:, None] + residual)
        assert torch.equal(form(x, scale=gate[0]), plain * gate[0])
        assert form(x[:0], residual[:0], scale=gate[:0]).shape == (0, 5, 8)
        if form.pattern:
            with torch.no_grad():
                assert compress(form)(x[:0], residual[:0], scale=gate[:0]).shape == (0, 5, 8)
                assert torch.equal(compress(form)(x, residual, scale=gate), form(x, residual, scale=gate))


def test_loading_a_weight_of_more_bits_keeps_its_mask_as_a_cast_does():
    wide, narrow = Linear(256, 64, pattern="2:4"), Linear(256, 64, pattern="2:4").bfloat16()
    narrow.freeze_mask(False)
    with pytest.warns(UserWarning, match=r"loading torch.float32 into torch.bfloat16 froze the masks"):
        narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow.current_mask(), wide.current_mask())
    assert not torch.equal(narrow.current_mask(), select_mask_ref(narrow.weight, wide.pattern)), "rounding changed it"
    narrow.eval()
    for strict in (True, False):
        other = Linear(256, 64, pattern="2:4")
        narrow.load_state_dict(other.state_dict(), strict=strict)
        assert torch.equal(narrow.current_mask(), other.current_mask()), "the mask of the weight that was loaded last"
    narrow.load_state_dict(Linear(256, 64).bfloat16().state_dict())
    assert narrow.mask is None
    taken = Linear(256, 64, pattern="2:4").bfloat16()
    taken.freeze_mask(False)
    taken.load_state_dict(wide.state_dict(), assign=True)
    assert taken.mask is None, "it holds the loaded weight itself"


def _swapped(model):
    for layer in model.modules():
        if isinstance(layer, Linear):
            torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach().clone()))
            layer.load_state_dict(layer.state_dict())


REPLACED = {
    "double": lambda model: model.double().float(),
    "a new parameter": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().clone())),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "from meta": lambda model: (
        kept := {k: v.clone() for k, v in model.state_dict().items()},
        model.to("meta").to_empty(device="cpu").load_state_dict(kept),
    ),
    "swapped and loaded": _swapped,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", REPLACED)
def test_a_weight_that_was_replaced_decays_once_for_each_backward(name, swap, compiled):
    model = nn.Sequential(Linear(16, 16, bias=False, pattern="2:4"))
    set_masking(model, decay=0.5)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        REPLACED[name](model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x, layer = torch.randn(4, 16), model[0]

    def thrice(x):
        return model(model(model(x))).sum()

    (torch.compile(thrice, backend="aot_eager") if compiled else thrice)(x).backward()
    found, plain = layer.weight.grad, nn.Parameter(layer.masked_weight())
    F.linear(F.linear(F.linear(x, plain), plain), plain).sum().backward()
    torch.testing.assert_close(found, plain.grad + 0.5 * (layer.weight.detach() - layer.masked_weight()))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["dense", "gone"])
def test_a_tied_weight_decays_when_the_first_of_its_layers_is_dense_or_gone(how, compiled):
    first, second = (Linear(16, 16, bias=False, pattern="2:4") for _ in range(2))
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    set_masking(model, decay=0.5)
    if how == "dense":
        first.set_pattern(None)
    else:
        model[0] = nn.Identity()
        set_masking(model, decay=1.0)
    x = torch.randn(4, 16)
    (torch.compile(second, backend="aot_eager") if compiled else second)(x).sum().backward()
    pruned = second.weight.detach() - second.masked_weight()
    torch.testing.assert_close(second.weight.grad, x.sum(0).expand(16, 16) + (0.5 if how == "dense" else 1.0) * pruned)
