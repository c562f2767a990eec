"""Masked training by the C kernels, and the dense layers of a compressed model."""

import copy
import errno
import functools
import hashlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sparsedm.compression import compress, decompress
from sparsedm.errors import InputError
from sparsedm.kernels import tracing
from sparsedm.kernels.cpu import library, products, rules
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.kernels.straight_through import GradientRule
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import set_masking, sparsify
from tests.kernels.cpu.problems import compressed, mask_of, needs_library


def trained(monkeypatch, layer, x, backend, steps=1):
    """The layer after steps of SGD with decay, and the gradient of x in the last."""
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    layer.rule = GradientRule(decay=2e-4)
    layer.hook_decay()
    with monkeypatch.context() as forced:
        if backend:
            forced.setenv("SPARSEDM_BACKEND", backend)
        for _ in range(steps):
            layer.zero_grad()
            gx, *_ = torch.autograd.grad(layer(x).square().mean(), x, retain_graph=True)
            layer(x).square().mean().backward()
            for parameter in layer.parameters():
                parameter.data -= 0.3 * parameter.grad
    return layer, gx


def kernels_pay(monkeypatch):
    """Small layers take the kernels, too, because a call and prepacking cost nothing; 2:4 does on every CPU."""
    monkeypatch.setattr(rules, "OVERHEAD", 0)
    for name in ("PREPACKING", "TRANSPOSING"):
        monkeypatch.setattr(rules, name, dict.fromkeys(getattr(rules, name), 0))


def never_in_training(monkeypatch):
    for name in ("training_serves", "conv_training_serves"):
        monkeypatch.setattr(rules, name, lambda *arguments: False)


LAYERS = {  # name: (layer of a pattern, its input, the product that serves it, its memory format)
    "linear": (lambda **p: Linear(64, 96, **p), (4, 100, 64), "masked_linear", None),
    "conv": (lambda **p: Conv2d(64, 96, 3, padding=1, **p), (8, 64, 8, 16), "conv2d", torch.contiguous_format),
    "channels_last": (lambda **p: Conv2d(64, 96, 3, padding=1, **p), (8, 64, 9, 15), "conv2d", torch.channels_last),
    "stride 2": (lambda **p: Conv2d(64, 96, 3, 2, bias=False, **p), (3, 64, 33, 33), "conv2d", torch.channels_last),
}


@needs_library
@pytest.mark.parametrize("shape", [(256, 64), (4, 64, 64)])
def test_the_product_may_be_changed_in_place(shape, monkeypatch):
    layer, x, served, real = Linear(64, 96, pattern="2:4"), torch.randn(shape), [], products.masked_linear
    kernels_pay(monkeypatch)
    monkeypatch.setattr(products, "masked_linear", lambda *a: served.append(1) or real(*a))
    torch.relu_(layer(x)).square().mean().backward()
    got, layer.weight.grad = layer.weight.grad, None
    torch.relu(layer(x)).square().mean().backward()
    assert served
    assert torch.equal(got, layer.weight.grad)


@needs_library
def test_the_decay_of_a_lent_weight(monkeypatch):
    served, real = [], products.masked_linear
    kernels_pay(monkeypatch)
    monkeypatch.setattr(products, "masked_linear", lambda *a: served.append(1) or real(*a))
    layer, weight = Linear(64, 96, pattern="2:4"), torch.randn(96, 64, requires_grad=True)
    set_masking(layer, decay=0.5)
    torch.func.functional_call(layer, {"weight": weight}, (torch.randn(256, 64),)).mul(0).sum().backward()
    assert served
    assert torch.equal(weight.grad, 0.5 * weight.detach() * ~mask_of(weight, layer.pattern))


@needs_library
@pytest.mark.parametrize("text", ["2:4", "1:4", "3:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_masked_training_by_the_kernel_is_that_of_torch(name, text, monkeypatch):
    build, shape, product, layout = LAYERS[name]
    x, layer, served = torch.randn(shape), build(pattern=text), []
    if layout:
        layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
    real = getattr(products, product)
    kernels_pay(monkeypatch)
    monkeypatch.setattr(products, product, lambda *a, **options: served.append(1) or real(*a, **options))
    gradients, gradient = [], products.masked_gradient
    monkeypatch.setattr(products, "masked_gradient", lambda *a: gradients.append(1) or gradient(*a))
    ours, gx = trained(monkeypatch, layer, x, None)
    assert len(served) == 2
    assert len(gradients) == (2 if name == "linear" else 0)
    torchs, gx_of_torch = trained(monkeypatch, layer, x, "torch")
    assert len(served) == 2
    torch.testing.assert_close(gx, gx_of_torch, rtol=1e-5, atol=1e-8)
    assert gx.stride() == gx_of_torch.stride()
    for mine, other in zip(ours.parameters(), torchs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    y = layer(x)
    assert len(served) == 3
    baked = (
        F.conv2d(x, layer.effective_weight(), layer.bias, layer.stride, layer.padding)
        if layout
        else F.linear(x, layer.effective_weight(), layer.bias)
    )
    assert y.stride() == baked.stride()
    assert torch.equal(layer.eval()(x), baked), "a masked network in eval mode computes the bits of the baked one"
    assert len(served) == 3


OTHER_CONVOLUTIONS = {
    "groups": {"groups": 2},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "dilation": {"dilation": 2},
    "two strides": {"stride": (1, 2)},
}


@needs_library
@pytest.mark.parametrize("how", [*OTHER_CONVOLUTIONS, "one image", "autocast", "double", "compiled"])
def test_a_convolution_that_the_kernel_does_not_serve_trains_by_torch(how, monkeypatch):
    monkeypatch.setattr(products, "conv2d", lambda *a, **options: pytest.fail("the kernel was called"))
    layer = Conv2d(64, 96, 3, **OTHER_CONVOLUTIONS.get(how, {}), pattern="2:4")
    plain = nn.Conv2d(64, 96, 3, **OTHER_CONVOLUTIONS.get(how, {}))
    plain.load_state_dict({"weight": layer.effective_weight(), "bias": layer.bias})
    x = torch.randn(3, 64, 16, 16)
    if how == "double":
        layer, plain, x = layer.double(), plain.double(), x.double()
    x = x[0] if how == "one image" else x
    call = torch.compile(layer, backend="eager", fullgraph=True) if how == "compiled" else layer
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y, expected = call(x), plain(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None


@needs_library
@pytest.mark.parametrize("layout", [None, torch.contiguous_format, torch.channels_last])
def test_masks_and_decay_are_those_of_torch_bit_for_bit(layout, monkeypatch):
    never_in_training(monkeypatch)
    layer, x = Linear(32, 40, pattern="2:4"), torch.randn(300, 32)
    if layout:
        layer, x = Conv2d(32, 40, 3, pattern="2:4").to(memory_format=layout), torch.randn(2, 32, 9, 9)
    decays, real = [], products.decay
    monkeypatch.setattr(products, "decay", lambda *arguments: decays.append(1) or real(*arguments))
    ours, _ = trained(monkeypatch, layer, x, None, steps=20)
    torchs, _ = trained(monkeypatch, layer, x, "torch", steps=20)
    assert len(decays) == 20
    assert torch.equal(ours.weight, torchs.weight)
    assert not torch.equal(ours.current_mask(), layer.current_mask()), "no mask changed: the test shows nothing"


@needs_library
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_second_derivative_and_a_frozen_mask_of_another_pattern(name, monkeypatch):
    kernels_pay(monkeypatch)
    build, shape, product, _ = LAYERS[name]
    layer, x, found, served = build(pattern="2:4"), torch.randn(shape, requires_grad=True), [], []
    real = getattr(products, product)
    monkeypatch.setattr(products, product, lambda *a, **options: served.append(1) or real(*a, **options))
    for serves in (True, False):
        if not serves:
            never_in_training(monkeypatch)
        (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gx.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    assert len(served) == 1
    monkeypatch.undo()
    kernels_pay(monkeypatch)  # and refuse what keeps more
    layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)
    dense = F.linear if name == "linear" else functools.partial(F.conv2d, padding=1)
    torch.testing.assert_close(layer(x), dense(x, layer.weight, layer.bias))


@needs_library
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_frozen_mask_that_breaks_the_pattern_multiplies_as_it_is(kernel_size):
    before = Conv2d(64, 64, kernel_size, padding=kernel_size // 2, pattern="2:4")
    before(torch.full((8, 64, 16, 16), torch.nan))  # what a tile holds from before must not count
    layer = Conv2d(12, 64, kernel_size, padding=kernel_size // 2, pattern="2:4")
    x = torch.randn(8, 12, 16, 16)
    layer.mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    layer.mask[:, 0] = layer.mask[:, -4:] = True
    torch.testing.assert_close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("wrong", ["narrow", "wide", "no axis", "bias of double", "longer bias", "conv's bias"])
def test_shapes_and_dtypes_that_torch_refuses_never_reach_the_kernel(wrong):
    layer, x = Linear(64, 96, pattern="2:4"), torch.randn(4000, {"narrow": 32, "wide": 128}.get(wrong, 64))
    if wrong == "conv's bias":
        layer, x = Conv2d(64, 96, 3, pattern="2:4"), torch.randn(8, 64, 16, 16)
    if "bias" in wrong:
        layer.bias = nn.Parameter(torch.zeros(96).double() if "double" in wrong else torch.zeros(97))
    with pytest.raises((RuntimeError, ValueError)):
        layer(x[0, 0] if wrong == "no axis" else x)


class Tagged(torch.Tensor):
    pass


@needs_library
@pytest.mark.parametrize("wrap", [lambda x: TwoTensor(x, x), lambda x: x.as_subclass(Tagged)], ids=["two", "tagged"])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_tensors_of_a_subclass_are_left_to_torch(name, wrap, monkeypatch):
    layer, shape, *_ = LAYERS[name]
    layer, x = layer(pattern="2:4"), torch.randn(shape)
    kernels_pay(monkeypatch)
    for product in ("masked_linear", "conv2d"):
        monkeypatch.setattr(products, product, None)
    with pytest.raises(TypeError, match="not callable"):
        layer(x)
    assert type(layer(wrap(x))) is type(wrap(x))


@needs_library
def test_a_gradient_of_a_subclass_decays_in_torch(monkeypatch):
    layer, x = Linear(16, 16, pattern="2:4"), torch.randn(8, 16)
    layer.rule = GradientRule(decay=2e-4)
    layer(x).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    monkeypatch.setattr(products, "decay", None)
    with pytest.raises(TypeError, match="not callable"):
        layer(x).sum().backward()
    layer(TwoTensor(x, x)).sum().backward()
    torch.testing.assert_close(layer.weight.grad.a, expected)


@needs_library
def test_a_weight_of_any_strides_trains_under_a_mask_that_is_frozen_or_not(monkeypatch):
    layer, x = Linear(64, 96, pattern="2:4"), torch.randn(300, 128)[:, ::2]
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    other.bias = nn.Parameter(torch.stack((layer.bias.detach(), torch.zeros(96)), 1)[:, 0])
    for frozen in (False, True):
        outcomes = []
        for one in (layer, other):
            one.freeze_mask(frozen)
            leaf = x.detach().requires_grad_()
            y = one(leaf)
            outcomes.append((y, *torch.autograd.grad(y, (leaf, one.weight), torch.ones(1, 1).expand(300, 96))))
        for mine, others in zip(*outcomes):
            assert torch.equal(mine, others)


def test_the_rule_of_training_counts_the_prepacking():
    weight, pattern = torch.empty(512, 512), Pattern(2, 4)
    served = [rows for rows in range(1, 3000) if rules.training_serves(torch.empty(rows, 512), weight, None, pattern)]
    assert bool(served) == (library.library() is not None)
    if served:
        assert min(served) > 50
        assert 2048 in served
    assert not rules.training_serves(torch.empty(2048, 512).double(), weight.double(), None, pattern)


def test_the_rule_of_training_counts_the_prepacking_of_a_convolution_and_its_memory_format():
    def serves(batch, size, layout=torch.contiguous_format, kernel=3, text="2:4", stride=1):
        x = torch.empty(batch, 256, size, size).contiguous(memory_format=layout)
        weight = torch.empty(256, 256, kernel, kernel).contiguous(memory_format=layout)
        rest = (stride, stride), (kernel // 2, kernel // 2), (1, 1)
        return rules.conv_training_serves(x, weight, None, Pattern.parse(text), *rest)

    assert serves(8, 16) == serves(32, 8) == (library.library() is not None)
    assert not serves(1, 4)  # one image of 4 x 4 pixels: prepacking costs more than the product
    assert not serves(8, 16, text="7:8")
    if library.library() is not None:
        assert serves(64, 16, torch.channels_last, text="3:4", stride=2)
        assert not serves(64, 16, text="3:4", stride=2)


class Mixed(torch.nn.Sequential):
    sparse_layers = r"^0$"


def test_dense_layers_of_a_compressed_model_take_the_best_product_and_see_every_change(monkeypatch):
    monkeypatch.setattr(rules, "_mkl_is_slow", lambda: True)
    called, real = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: called.append(1) or real(*a))
    model, x = sparsify(Mixed(Linear(64, 256), Linear(256, 100, activation="gelu")), "2:4"), torch.randn(2, 400, 64)
    with torch.no_grad():
        expected, small = model(x), compress(model)
        assert not called
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
        assert len(called) == 1 + (library.library() is None)
        assert set(small.state_dict()) - {"0.values", "0.metadata"} == {"0.bias", "1.weight", "1.bias"}
        small[1].weight.data.mul_(-1)
        small[1].weight.data[:50] = small[1].weight.data[:50].flip(0).clone()  # the sums of rows and columns stay
        hidden = small[0](x)
        torch.testing.assert_close(small(x), F.gelu(F.linear(hidden, small[1].weight, small[1].bias)))
        small.load_state_dict({**small.state_dict(), "1.weight": torch.zeros(100, 256)})
        torch.testing.assert_close(small(x), F.gelu(small[1].bias).expand(2, 400, 100))
    called.clear()
    back = decompress(small)
    back(x).sum().backward()
    assert not called
    assert not back[1].beside_compressed


@needs_library
def test_a_pattern_that_stays_dense_takes_the_best_dense_product(monkeypatch):
    called, real = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: called.append(1) or real(*a))
    weight, values, bits = compressed(Pattern(7, 8))
    x = torch.randn(300, 96)
    for slow in (False, True):
        monkeypatch.setattr(rules, "_mkl_is_slow", lambda slow=slow: slow)
        torch.testing.assert_close(
            sparse24_linear(x, values, bits, pattern="7:8", backend="dense"), F.linear(x, weight)
        )
        assert bool(called) == slow


@pytest.mark.parametrize(("amd", "tokens"), [(True, 4096), (False, 128)])
def test_on_intels_avx512_torch_is_quicker_beside_ours(amd, tokens, monkeypatch):
    """At 3:4 its dense product is, and its attention over long rows. 2:4 pays on both."""
    monkeypatch.setattr(rules, "_is_amd", lambda: amd)
    monkeypatch.setattr(library, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(rules, "serves", lambda *tensors: True)
    costs = [rules.linear_cost(2048, 512, 512, *pattern, "avx512")[0] for pattern in ((3, 4), (2, 4))]
    assert [cost < 1 for cost in costs] == [amd, True]
    served = [L for L in (64, 128, 130, 1024, 4096) if rules.attention_serves(torch.empty(1, 1, L, 64))]
    assert served[-1] == tokens
    assert [rules.gradient_pays(M, 512, 512, Pattern(2, 4)) for M in (512, 2048)] == [amd, True]


def test_a_cpu_that_cannot_be_told_is_not_amds(monkeypatch):
    def hidden(path):
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))

    monkeypatch.setattr(rules.Path, "read_text", hidden)
    assert rules._is_amd.__wrapped__() is False


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(library, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not rules._mkl_is_slow.__wrapped__()


@pytest.mark.parametrize("rows", [16, 2000])
@pytest.mark.parametrize("rule", [GradientRule(), GradientRule(decay=0.1)], ids=str)
def test_a_mask_of_another_shape_or_dtype_is_refused_at_every_size(rows, rule):
    """The kernel reads a byte for each weight, from an address."""
    row = torch.tensor([1, 1, 0, 0], dtype=torch.bool).repeat(32)
    of_one_row = torch.cat((row[None], torch.zeros(255, 128, dtype=torch.bool)))[:1]
    for wrong in (of_one_row, row.repeat(256, 1).to(torch.uint8)):
        layer = Linear(128, 256, pattern="2:4")
        layer.mask, layer.rule = wrong, rule
        with pytest.raises(InputError, match=r"must have one shape|the mask must be bool"):
            layer(torch.randn(rows, 128))


def test_the_version_tells_whose_constants_the_rules_have(monkeypatch):
    monkeypatch.setattr(library, "serving", lambda: ("avx512", ""))
    monkeypatch.setattr(rules, "forced_backend", lambda: None)
    found = set()
    for amd in (True, False):
        monkeypatch.setattr(rules, "_is_amd", lambda amd=amd: amd)
        found.add(rules.version())
    assert len(found) == 2


@needs_library
def test_a_tensor_of_zeros_without_memory_is_left_to_torch():
    layer, nothing = Linear(128, 256, pattern="1:4"), torch._efficientzerotensor(2000, 128)
    assert not rules.serves(nothing)
    assert not tracing.plain(nothing)
    assert torch.equal(layer(nothing), layer.bias.expand(2000, 256))


def test_a_change_of_any_rule_changes_its_version(monkeypatch):
    """Who changes one raises RULE_VERSION and writes the new digest of constants and of choices over a grid here.

    It does not see `onednn_serves`.
    """
    monkeypatch.delenv("SPARSEDM_BACKEND", raising=False)
    monkeypatch.setattr(rules, "serves", lambda *t: True)
    found, meta, cpu = [], torch.device("meta"), torch.device("cpu")
    grid = [
        *itertools.product((1, 4, 12, 40, 257, 2056), (64, 512, 2048), (128, 512, 2048), ("3:4", "2:4", "1:8", "1:32"))
    ]
    for kind, amd in (("avx512", True), ("avx512", False), ("avx2", True), ("avx2", False), ("neon", False)):
        monkeypatch.setattr(rules, "_is_amd", lambda amd=amd: amd)
        monkeypatch.setattr(library, "instruction_set", lambda kind=kind: kind)
        for M, N, K, p in [(*sizes, Pattern.parse(text)) for *sizes, text in grid]:
            costs = *rules.linear_cost(M, N, K, p.keep, p.group, kind), rules.dense_cost(M, N, K, kind)
            costs += (rules.conv_cost((M, 64), N, K, p.keep, p.group, kind), rules.gradient_pays(M, N, K, p))
            trains = rules.training_serves(torch.empty(M, K, device=meta), torch.empty(N, K, device=meta), None, p)
            found.append([f"{c:.6g}" if isinstance(c, float) else c for c in (*costs, trains)])
        found += [rules.attention_serves(SimpleNamespace(device=cpu, shape=(8, 8, L, 64))) for L in (64, 65, 128, 256)]
    found.append({name: value for name, value in vars(rules).items() if name.isupper() and name != "RULE_VERSION"})
    orders, sizes = (torch.contiguous_format, torch.channels_last), ((1, 8), (64, 128), (64, 256), (8, 16, 32))
    for kind in ("avx512", "avx2", "neon"):
        monkeypatch.setattr(library, "instruction_set", lambda kind=kind: kind)
        for B, C, N, side, text, order in itertools.product(*sizes, ("2:4", "1:16"), orders):
            x, w = (torch.empty(s, device=meta).to(memory_format=order) for s in ((B, C, side, side), (N, C, 3, 3)))
            found.append(rules.conv_training_serves(x, w, None, Pattern.parse(text), (1, 1), (1, 1), (1, 1)))
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
    assert (rules.RULE_VERSION, digest) == (5, "60026c7d7479")
