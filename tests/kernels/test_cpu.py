"""The C kernels for CPUs: against fp64 with guard pages around all arrays, masks bit for bit, and every way to fail."""

import copy
import ctypes
import errno
import functools
import hashlib
import math
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsedm.errors import InputError
from sparsedm.kernels.attention import self_attention
from sparsedm.kernels.cpu import library, products, rules
from sparsedm.kernels.masked_matmul import GradientRule
from sparsedm.kernels.pattern import GROUPS, Pattern, group_view, memory_format, select_mask_ref, ungroup
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.conv import sparse24_conv2d
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import compress, decompress, sparsify

HARNESS = Path(__file__).with_name("cpu_harness.c")
COMPUTE = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
TOLERANCE = 5e-6  # largest error over largest result; up to 2,500 products are summed in one register

needs_library = pytest.mark.skipif(library.library() is None, reason=f"no C kernels: {library.unavailable_because()}")


# ---- guard pages -----------------------------------------------------------------------------------------------------


class Guarded:
    """Hands out memory that ends, or begins, at a page which no program may touch."""

    def __init__(self, rng):
        self.rng, self.maps = rng, []
        self.protect = ctypes.CDLL(None).mprotect
        self.protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def empty(self, *shape, dtype=torch.float32, memory_format=torch.contiguous_format):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        size = shape.numel() * torch.empty(0, dtype=dtype).element_size()
        if not size:
            return torch.empty(shape, dtype=dtype)
        page, pages = mmap.PAGESIZE, -(-size // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 2) * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for edge in (0, pages + 1):
            assert self.protect(base + edge * page, page, 0) == 0
        self.maps.append(memory)
        at = base + page + (pages * page - size if self.rng.random() < 0.5 else 0)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=dtype)
        if dtype.is_floating_point:
            flat.fill_(math.nan)
        if memory_format == torch.channels_last:
            return flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return flat.view(shape)

    def copy(self, tensor):
        if tensor is None:
            return None
        copy = self.empty(tensor.shape, dtype=tensor.dtype, memory_format=memory_format(tensor))
        return copy.copy_(tensor)


@pytest.fixture
def guarded(monkeypatch):
    def start(seed):
        guard = Guarded(random.Random(seed))
        monkeypatch.setattr(products, "_empty", guard.empty)
        return guard

    threads = torch.get_num_threads()
    yield start
    torch.set_num_threads(threads)


def mask_of(weight, pattern):
    return ungroup(select_mask_ref(group_view(weight).contiguous(), pattern), weight.shape).contiguous()


def a_pattern(rng):
    group = rng.choice(GROUPS)
    return Pattern(rng.randint(1, group - 1), group)


def close(y, exact, *what):
    assert y.shape == exact.shape, what
    error = (y.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
    assert error < TOLERANCE, (float(error), *map(str, what))  # NaN is not


def check_linear(rng, guard):
    pattern, M = a_pattern(rng), rng.choice([rng.randint(1, 16), rng.randint(1, 200)])
    N, K = rng.randint(1, 300), pattern.group * rng.randint(1, 300 // pattern.group)
    weight, x, few = torch.randn(N, K) / K**0.5 * 2, torch.randn(M, K), M <= 16 and rng.random() < 0.6
    mask, activation = mask_of(weight, pattern), rng.choice(list(COMPUTE))
    bias, residual = rng.choice([None, torch.randn(N)]), rng.choice([None, torch.randn(M, N)])
    scale = rng.choice([None, torch.randn(rng.choice([G for G in range(1, M + 1) if M % G == 0]), N)])
    exact = COMPUTE[activation](F.linear(x.double(), (weight * mask).double(), None if bias is None else bias.double()))
    if scale is not None:
        exact = (exact.view(len(scale), -1, N) * scale[:, None]).view(M, N)
    if residual is not None:
        exact = exact + residual
    sources = x.split([first := rng.randint(1, K), K - first], 1) if rng.random() < 0.4 else (x, None)
    if sources[1] is not None and not sources[1].numel():
        sources = x, None
    torch.set_num_threads(rng.choice([1, 2]))
    prepacked = products.prepack("few" if few else "linear", weight, mask, pattern)
    x, skip = (guard.copy(source) for source in sources)
    epilogue = {"bias": bias, "residual": residual, "scale": scale, "skip": skip}
    epilogue = {name: guard.copy(tensor) for name, tensor in epilogue.items()}
    y = products.linear(x, prepacked, pattern, N, activation=activation, few=few, **epilogue)
    close(y, exact, pattern, (M, N, K), few, activation)


def check_training(rng, guard):
    """Forward product and gradient of x. A frozen mask may keep less, and a kept weight may be zero."""
    pattern, M = a_pattern(rng), rng.choice([rng.randint(1, 16), rng.randint(1, 200)])
    N, K = rng.randint(1, 300), pattern.group * rng.randint(1, 600 // pattern.group)
    weight, x, dy, bias = torch.randn(N, K) / K**0.5 * 2, torch.randn(M, K), torch.randn(M, N), torch.randn(N)
    mask = mask_of(weight, pattern) & (torch.rand(N, 1) < rng.choice([0.3, 1, 1]))
    weight *= torch.rand(N, K) < rng.choice([0.5, 1, 1])
    torch.set_num_threads(rng.choice([1, 2]))
    masked, mask, x, dy, bias = map(guard.copy, (weight * mask, mask, x, dy, rng.choice([None, bias])))
    exact = F.linear(x.double(), masked.double(), None if bias is None else bias.double())
    close(products.masked_linear(x, masked, mask, pattern, bias), exact, pattern, (M, N, K))
    close(products.masked_gradient(dy, masked), dy.double() @ masked.double(), pattern, (M, N, K))


def check_conv(rng, guard):
    pattern, (size, stride) = a_pattern(rng), rng.choice([(3, 1), (3, 1), (3, 2), (1, 1), (1, 2), (5, 1)])
    B, C, N = rng.randint(1, 3), pattern.group * rng.randint(1, max(1, 100 // pattern.group)), rng.randint(1, 70)
    padding, H, W = rng.choice([size // 2, 0]), rng.randint(5, 20), rng.choice([rng.randint(5, 37), 8, 16, 32, 48])
    layout = rng.choice([torch.contiguous_format, torch.channels_last])
    x = torch.randn(B, C, H, W).contiguous(memory_format=layout)
    weight, bias = torch.randn(N, C, size, size) / (C * size * size) ** 0.5, rng.choice([None, torch.randn(N)])
    mask, activation = mask_of(weight, pattern), rng.choice(list(COMPUTE))
    double_bias = None if bias is None else bias.double()
    exact = COMPUTE[activation](F.conv2d(x.double(), (weight * mask).double(), double_bias, stride, padding))
    residual = rng.choice([None, torch.randn(exact.shape).contiguous(memory_format=layout)])
    if residual is not None:
        exact = exact + residual
    geometry = (size, size), (stride, stride), (padding, padding)
    halo = rules.halo_serves(*geometry, W, pattern.group, library.instruction_set()) and rng.random() < 0.7
    torch.set_num_threads(rng.choice([1, 2]))
    prepacked = products.prepack("halo" if halo else "conv", weight, mask, pattern, W)
    epilogue = {"bias": guard.copy(bias), "residual": guard.copy(residual), "activation": activation}
    y = products.conv2d(guard.copy(x), prepacked, pattern, N, geometry, halo=halo, **epilogue)
    assert y.is_contiguous(memory_format=memory_format(x))  # of one channel or pixel it may also be the other
    close(y, exact, pattern, x.shape, weight.shape, geometry, halo, layout, activation)


def check_attention(rng, guard):
    B, H, L, D = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 100), 16 * rng.randint(1, 4)
    qkv = guard.copy(torch.randn(B, L, 3 * H * D) * 2)
    q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    torch.set_num_threads(rng.choice([1, 2]))
    close(products.attention(q, k, v), exact, (B, H, L, D))


def check_mask(rng, guard):
    pattern = a_pattern(rng)
    small = rng.randint(1, 40), pattern.group * rng.randint(1, 4)
    shape = rng.choice([small, (*small, 3, 3), (*small, 1, 1), (*small, 5, 5), (300, 128)])
    weight = torch.randn(shape) if rng.random() < 0.5 else torch.randint(-2, 3, shape).float()
    if weight.dim() == 4 and rng.random() < 0.5:
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight = guard.copy(weight)
    masked, mask, nan = products.select_mask(weight, pattern)
    expected = mask_of(weight, pattern)
    assert not nan
    assert torch.equal(mask, expected), (str(pattern), shape)
    assert torch.equal(masked, weight * expected), (str(pattern), shape)
    gradient = guard.copy(torch.randn_like(weight))
    decayed = products.decay(gradient, weight, mask, 2e-4)
    assert torch.equal(decayed, gradient + 2e-4 * weight.masked_fill(mask, 0)), shape


CHECKS = {"linear": check_linear, "conv": check_conv, "attention": check_attention, "mask": check_mask}
CHECKS["training"] = check_training


@needs_library
@pytest.mark.parametrize("check", CHECKS)
def test_random_problems_agree_with_fp64_and_touch_nothing_outside(check, guarded):
    guard = guarded(1)
    for _ in range(40):
        CHECKS[check](guard.rng, guard)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_ten_thousand_random_problems(check, guarded):
    guard = guarded(2)
    for _ in range(10_000):
        CHECKS[check](guard.rng, guard)
        if len(guard.maps) > 1000:
            guard.maps.clear()


# ---- exact properties ------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("few", [False, True])
def test_the_identity_returns_the_masked_weight(few):
    pattern, weight = Pattern(1, 4), torch.randn(40, 16)
    mask = mask_of(weight, pattern)
    prepacked = products.prepack("few" if few else "linear", weight, mask, pattern)
    assert torch.equal(products.linear(torch.eye(16), prepacked, pattern, 40, few=few), (weight * mask).t())


@needs_library
def test_results_do_not_depend_on_the_number_of_threads():
    pattern, weight, x = Pattern(2, 4), torch.randn(300, 128), torch.randn(333, 128)
    prepacked = products.prepack("linear", weight, mask_of(weight, pattern), pattern)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products.linear(x, prepacked, pattern, 300)
        torch.set_num_threads(2)
        assert torch.equal(products.linear(x, prepacked, pattern, 300), one)
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_infinity_and_nan_at_a_kept_weight_are_those_of_a_dense_product(few, value, keep):
    pattern, weight, x = Pattern(keep, 8), torch.randn(20, 24), torch.randn(5, 24)
    mask = mask_of(weight, pattern)
    x[:, 9] = value
    prepacked = products.prepack("few" if few else "linear", weight, mask, pattern)
    y, dense = products.linear(x, prepacked, pattern, 20, few=few), F.linear(x, weight * mask)
    kept = mask[:, 9]
    assert kept.any()
    assert torch.equal(y[:, kept], dense[:, kept]) or (y[:, kept].isnan().all() and dense[:, kept].isnan().all())
    assert y[:, ~kept].isfinite().all()


@needs_library
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("N", [61, 64, 70])
def test_infinity_and_nan_in_a_gradient_meet_the_weights_that_a_dense_product_shows(value, N):
    weight, dy = torch.randn(N, 16), torch.randn(5, N)
    weight[:, :4] *= mask_of(weight, Pattern(1, 4))[:, :4]
    weight[:, 5] = 0  # a column of zeros, and others of nothing but weights
    dy[:, N - 2] = value
    dx, dense = products.masked_gradient(dy, weight), dy @ weight
    kept = weight[N - 2] != 0
    assert torch.equal(dx[:, kept].isnan(), dense[:, kept].isnan())
    torch.testing.assert_close(dx[:, kept], dense[:, kept], equal_nan=True)
    assert dx[:, 5].isfinite().all() or dx[:, 5].isnan().all()


@needs_library
def test_a_column_of_pruned_weights_has_no_gradient_and_one_of_kept_weights_has_all():
    weight = torch.zeros(70, 24)
    weight[:, 3], weight[64:, 9] = torch.randn(70), 1.0
    dx = products.masked_gradient(torch.eye(70), weight)
    assert torch.equal(dx, weight)


@needs_library
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_extreme_values(activation):
    pattern, weight = Pattern(1, 2), torch.tensor([[1.0, 0.0]])
    values = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 200.0, -200.0, 7.0, -7.0, 1e-30, 88.0]
    )
    x = torch.stack((values, torch.zeros_like(values)), 1)
    prepacked = products.prepack("linear", weight, weight != 0, pattern)
    y = products.linear(x, prepacked, pattern, 1, activation=activation)[:, 0]
    torch.testing.assert_close(y, COMPUTE[activation](values), rtol=1e-6, atol=1e-8, equal_nan=True)


@needs_library
def test_a_group_that_keeps_fewer_weights_is_filled_up_and_one_that_keeps_more_is_refused():
    pattern, weight, x = Pattern(2, 4), torch.randn(9, 8), torch.randn(30, 8)
    mask = mask_of(weight, pattern)
    mask[3, :4] = False
    y = products.linear(x, products.prepack("linear", weight, mask, pattern), pattern, 9)
    torch.testing.assert_close(y, F.linear(x, weight * mask))
    mask[3, :4] = True
    for order in products.ORDERS:
        shape = (9, 8, 3, 3) if order == "halo" else (9, 8)
        wide = mask[..., None, None].expand(shape) if order == "halo" else mask
        with pytest.raises(InputError, match="keeps more than 2 of 4"):
            products.prepack(order, torch.randn(shape), wide, pattern, 16)


@needs_library
def test_a_weight_that_is_nan_is_reported():
    for shape in ((5, 8), (5, 8, 3, 3)):
        weight = torch.randn(shape)
        weight[4, 7] = math.nan
        assert products.select_mask(weight, Pattern(2, 4))[2]
        assert not products.select_mask(weight.nan_to_num(), Pattern(2, 4))[2]


@needs_library
def test_the_rules_know_where_the_halo_way_serves():
    same = (3, 3), (1, 1), (1, 1)
    for width in range(1, 300):
        for group in GROUPS:
            serves = rules.halo_serves(*same, width, group, library.instruction_set())
            assert serves == (library.library().nm_halo_channels(width, group) > 0), (width, group)
    assert not rules.halo_serves((3, 3), (2, 2), (1, 1), 32, 4, "avx2")


# ---- as a back end ---------------------------------------------------------------------------------------------------


def compressed(pattern, N=128, K=96):
    weight = torch.randn(N, K)
    weight = weight * mask_of(weight, pattern)
    return weight, *pack(weight, pattern)


@needs_library
@pytest.mark.parametrize("text", ["2:4", "1:4", "1:2", "3:8", "1:32"])
@pytest.mark.parametrize("rows", [2, 300])
def test_the_dispatcher_takes_the_kernel_for_every_pattern(text, rows):
    pattern, cache, x = Pattern.parse(text), {}, torch.randn(2, rows // 2, 96)
    weight, values, metadata = compressed(pattern)
    skip, bias, residual, scale = x[..., 64:], torch.randn(128), torch.randn(2, rows // 2, 128), torch.randn(2, 128)
    options = {"skip": skip, "scale": scale, "cache": cache, "pattern": text, "backend": "cpu"}
    y = sparse24_linear(x[..., :64], values, metadata, bias, "gelu", residual, **options)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double())) * scale[:, None] + residual
    close(y, exact, text, rows)
    assert [name.split()[0] for name in cache if name != "choices"] == ["cpu"]


@needs_library
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_dispatcher_takes_the_kernel_for_a_convolution(size, layout):
    pattern, cache, x = Pattern(1, 4), {}, torch.randn(3, 32, size, size).contiguous(memory_format=layout)
    weight, bias = torch.randn(64, 32, 3, 3), torch.randn(64)
    weight = weight * mask_of(weight, pattern)
    values, metadata = pack(group_view(weight).reshape(64, -1), pattern)
    options = {"padding": 1, "cache": cache, "pattern": "1:4", "backend": "cpu"}
    y = sparse24_conv2d(x, values, metadata, 3, bias, "silu", **options)
    close(y, F.silu(F.conv2d(x.double(), weight.double(), bias.double(), padding=1)), size)
    halo = size % products.lanes() == 0
    assert [name.split()[:2] for name in cache if name != "choices"] == [["cpu", "halo" if halo else "conv"]]


@pytest.mark.parametrize("why", ["forced", "double", "no library"])
def test_where_the_kernel_cannot_run_torch_computes_the_same(why, monkeypatch):
    if why == "forced":
        monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
    if why == "no library":
        monkeypatch.setattr(library, "_loaded", lambda: (None, "no C compiler"))
    pattern, cache, dtype = Pattern(1, 4), {}, torch.float64 if why == "double" else torch.float32
    weight, values, metadata = compressed(pattern)
    x = torch.randn(300, 96, dtype=dtype)
    y = sparse24_linear(x, values.to(dtype), metadata, cache=cache, pattern="1:4")
    torch.testing.assert_close(y, F.linear(x, weight.to(dtype)))
    assert "dense" in cache


@needs_library
def test_a_compiled_and_an_exported_model():
    x = torch.randn(300, 96)
    weight, values, metadata = compressed(Pattern(2, 4))

    class Product(torch.nn.Module):
        def forward(self, x):
            return sparse24_linear(x, values, metadata)

    graphs = []
    compiled = torch.compile(Product(), backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x, weight))
    assert " cpu," not in str(graphs[0].graph)  # a graph serves every batch, and the kernels win for some
    program = torch.export.export(Product(), (x,))
    assert " cpu," not in str(program.graph)
    torch.testing.assert_close(program.module()(x), F.linear(x, weight))


def test_attention_of_a_model_in_inference_and_in_training(monkeypatch):
    monkeypatch.setattr(rules, "ATTENTION_TOKENS", dict.fromkeys(rules.ATTENTION_TOKENS, 1000))
    qkv, called = torch.randn(2, 100, 3 * 4 * 32, requires_grad=True), []
    real = products.attention
    monkeypatch.setattr(products, "attention", lambda *tensors: called.append(1) or real(*tensors))
    trained = self_attention(qkv, 4)
    trained.sum().backward()
    assert not called
    with torch.no_grad():
        y = self_attention(qkv, 4)
    assert bool(called) == (library.library() is not None)
    torch.testing.assert_close(y, trained.detach())
    turned = qkv.detach().mT.contiguous().mT  # as a product leaves it that computes y^T
    torch.testing.assert_close(self_attention(turned, 4), y)
    monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
    called.clear()
    self_attention(qkv.detach(), 4)
    assert not called


# ---- the same call once more -----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The requests that reach the dispatcher."""
    requests, real = [], dispatch.serve
    monkeypatch.setattr(dispatch, "serve", lambda request, *rest: requests.append(request) or real(request, *rest))
    return requests


def small_layer(text="1:4", N=128, K=96, activation=None):
    return compress(torch.nn.Sequential(Linear(K, N, pattern=text, activation=activation)))[0]


def check_layer(layer, x, exact=None, **options):
    y = layer(x, **options)
    exact = F.linear(x, layer.dense_weight(), layer.bias) if exact is None else exact
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("text", ["1:4", "7:8"])
@pytest.mark.parametrize("rows", [1, 300])
def test_a_repeated_call_is_not_decided_again_and_sees_every_change(text, rows, asked):
    layer, x = small_layer(text), torch.randn(rows, 96)
    for count in (1, 1):
        check_layer(layer, x)
        assert len(asked) == count
    other = small_layer(text)
    layer.bias.add_(1)
    check_layer(layer, x)
    layer.bias.data = other.bias.clone()
    check_layer(layer, x)
    assert len(asked) == 1, "the bias is read at every call"
    layer.values.mul_(2)
    check_layer(layer, x)
    layer.load_state_dict(other.state_dict())
    check_layer(layer, x)
    layer.values.data = layer.values * 3
    check_layer(layer, x)
    layer.values = layer.values / 5
    check_layer(layer, x)
    check_layer(layer, torch.randn(rows + 1, 96))
    check_layer(layer, torch.randn(1, rows, 96))
    check_layer(copy.deepcopy(layer), x)
    assert len(asked) == 8
    with torch.inference_mode():
        check_layer(small_layer(text), x.clone())
    layer.bias = torch.zeros(5)
    with pytest.raises(InputError, match="bias"):
        layer(x)
    for wrong in (torch.randn(rows, 97), torch.randn(rows, 96).double()):
        with pytest.raises(InputError):
            layer(wrong)


@torch.no_grad()
@pytest.mark.parametrize("text", ["1:4", "7:8"])
def test_a_repeated_call_with_every_epilogue(text, asked):
    layer, x, skip = small_layer(text, activation="gelu"), torch.randn(4, 75, 64), torch.randn(4, 75, 32)
    for scale in (None, torch.randn(128), torch.randn(4, 128)):
        for residual in (None, torch.randn(4, 75, 128)):
            y = F.gelu(F.linear(torch.cat((x, skip), -1), layer.dense_weight(), layer.bias))
            y = y if scale is None else y * (scale if scale.dim() == 1 else scale[:, None])
            y = y if residual is None else y + residual
            for _ in range(2):
                check_layer(layer, x, y, residual=residual, skip=skip, scale=scale)
    assert len(asked) == 6


ODD = {
    "rows apart": lambda x: torch.randn(300, 200)[:, :96].copy_(x),
    "columns apart": lambda x: x.t().contiguous().t(),
    "repeated by stride 0": lambda x: x[:1].expand(300, 96),
    "negated lazily": torch._neg_view,
    "a view from the middle": lambda x: torch.cat((x[:1, :1].flatten(), x.flatten()))[1:].view(300, 96),
    "a parameter": torch.nn.Parameter,
}


@torch.no_grad()
@pytest.mark.parametrize("odd", ODD)
def test_inputs_of_every_kind_after_a_plain_one(odd):
    layer, x = small_layer("1:4"), torch.randn(300, 96)
    layer(x)
    check_layer(layer, ODD[odd](x))


def test_calls_that_torch_watches_do_not_reach_the_kernel(monkeypatch):
    layer, x = small_layer("1:4"), torch.randn(300, 96)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.setattr(products, "_Linear", None)  # any launch fails
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        monkeypatch.setenv("SPARSEDM_BACKEND", "rubbish")
        with pytest.raises(InputError, match="rubbish"):
            layer(x)
    monkeypatch.undo()
    with torch.no_grad():
        mapped = torch.func.vmap(layer)(x.expand(3, 300, 96))
        torch.testing.assert_close(mapped, expected.expand(3, 300, 128))
        called = torch.func.functional_call(layer, {"values": layer.values * 2, "bias": layer.bias * 2}, (x,))
        torch.testing.assert_close(called, 2 * expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), expected)
    with torch.device("meta"):
        assert layer.to("meta")(torch.empty(300, 96)).is_meta


@torch.no_grad()
def test_another_default_dtype_and_many_threads(monkeypatch):
    layers, inputs = [small_layer(text) for text in ("1:4", "7:8")], [torch.randn(60, 96) for _ in range(10)]
    expected = [[layer(x) for x in inputs] for layer in layers]
    monkeypatch.setattr(rules, "OVERHEAD", 0)
    torch.set_default_dtype(torch.float64)
    try:
        check_layer(layers[0], inputs[0], expected[0][0])
        masked = Linear(96, 128, pattern="1:4", dtype=torch.float32)
        y = masked(inputs[0].repeat(10, 1))
        torch.testing.assert_close(y, F.linear(inputs[0].repeat(10, 1), masked.effective_weight(), masked.bias))
    finally:
        torch.set_default_dtype(torch.float32)
    wrong = []

    def work(i):
        for _ in range(50):
            for layer, exact in zip(layers, expected):
                if not torch.equal(layer(inputs[i]), exact[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- masked training, and the dense layers of a compressed model -----------------------------------------------------


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
@pytest.mark.parametrize("text", ["2:4", "1:4", "3:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_masked_training_by_the_kernel_is_that_of_torch(name, text, monkeypatch):
    build, shape, product, layout = LAYERS[name]
    x, layer, served = torch.randn(shape), build(pattern=text), []
    if layout:
        layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
    real = getattr(products, product)
    monkeypatch.setattr(rules, "OVERHEAD", 0)
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
    monkeypatch.setattr(rules, "OVERHEAD", 0)
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
    layer.mask = torch.ones_like(layer.weight, dtype=torch.bool)
    dense = F.linear if name == "linear" else functools.partial(F.conv2d, padding=1)
    torch.testing.assert_close(layer(x), dense(x, layer.weight, layer.bias))


@pytest.mark.parametrize("wrong", ["narrow", "wide", "no axis", "bias of double", "longer bias", "conv's bias"])
def test_shapes_and_dtypes_that_torch_refuses_never_reach_the_kernel(wrong):
    layer, x = Linear(64, 96, pattern="2:4"), torch.randn(4000, {"narrow": 32, "wide": 128}.get(wrong, 64))
    if wrong == "conv's bias":
        layer, x = Conv2d(64, 96, 3, pattern="2:4"), torch.randn(8, 64, 16, 16)
    if "bias" in wrong:
        layer.bias = nn.Parameter(torch.zeros(96).double() if "double" in wrong else torch.zeros(97))
    with pytest.raises((RuntimeError, ValueError)):
        layer(x[0, 0] if wrong == "no axis" else x)


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


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(library, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not rules._mkl_is_slow.__wrapped__()


# ---- the compiler, the cache, other machines -------------------------------------------------------------------------

FAKE_COMPILER = """#!/bin/sh
# writes what it is given instead of compiling: a library to a .so, nothing to a .o
echo "$@" >> {calls}
while [ "$1" != -o ]; do shift; done
case "$2" in *.so) {make_library} ;; *) : > "$2" ;; esac
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(command): put a `cc` in the place of the real one; it runs `command` to make its output "$2"."""
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("sh", "cp", "sleep", "kill"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    library._loaded.cache_clear()

    def put(command):
        (folder / "cc").write_text(FAKE_COMPILER.format(calls=calls, make_library=command))
        (folder / "cc").chmod(0o755)

    put.calls = lambda: len(calls.read_text().splitlines()) if calls.exists() else 0
    yield put
    library._loaded.cache_clear()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A library as the compiler would make it, without our checksum."""
    if library.library() is None:
        pytest.skip("no C kernels")
    data = Path(library.library()._name)
    if not data.exists():  # loaded from a temporary folder
        pytest.skip("the library is not kept on this machine")
    path = tmp_path_factory.mktemp("built") / "library.so"
    path.write_bytes(data.read_bytes()[:-32])
    return path


def test_without_a_compiler_there_is_a_reason_and_one_line_of_log(compiler, caplog):
    assert library.library() is None
    assert library.library() is None
    assert "no C compiler" in library.unavailable_because()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [("echo product.c:1: error: no such thing; exit 1", "no such thing"), ("kill -9 $$", "ended with -9"),
     ("echo not a library > $2", "cannot be loaded")],
)  # fmt: skip
def test_a_compiler_that_fails_is_killed_or_writes_nonsense(compiler, caplog, tmp_path, command, reason):
    compiler(command)
    assert library.library() is None
    assert reason in library.unavailable_because()
    assert len(caplog.records) == 1
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_compiler_that_hangs_ends_with_what_it_has_started(compiler, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "TIMEOUT", 1)
    compiler(f"sleep 30 & echo $! > {tmp_path / 'child'}; sleep 30")
    start = time.monotonic()
    assert library.library() is None
    assert time.monotonic() - start < 20
    assert "did not end within 1 seconds" in library.unavailable_because()
    assert len(caplog.records) == 1
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]


def test_without_a_place_to_compile_in_there_is_a_reason(compiler, caplog, monkeypatch):
    def full(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    compiler("exit 1")
    monkeypatch.setattr(library.tempfile, "TemporaryDirectory", full)
    assert library.library() is None
    assert "no place to compile in" in library.unavailable_because()
    assert len(caplog.records) == 1


def test_the_library_is_compiled_once_and_then_read_from_the_cache(compiler, built):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    calls = compiler.calls()
    library._loaded.cache_clear()
    assert library.library() is not None
    assert compiler.calls() == calls


@pytest.mark.parametrize("damage", ["truncated", "empty", "another system's", "another user's"])
def test_a_cached_file_that_is_not_ours_or_not_whole_is_made_anew(compiler, built, tmp_path, monkeypatch, damage):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    # a path that is loaded already would not be read again
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "moved"))
    path = next((tmp_path / "moved").rglob("*.so"))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    if damage == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: os.stat(path).st_uid + 1)
        if os.stat(path).st_uid == 0:
            os.chown(path, 12345, -1)
            monkeypatch.setattr(os, "getuid", lambda: 0)
    elif damage == "another system's":
        foreign = b"\x7fELF of another machine"
        path.write_bytes(foreign + hashlib.sha256(foreign).digest())
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    calls = compiler.calls()
    library._loaded.cache_clear()
    assert library.library() is not None
    assert compiler.calls() > calls
    assert path.read_bytes() == data


def test_a_pipe_in_the_place_of_the_library_is_not_read(compiler, built, tmp_path):
    compiler(f"cp {built} $2")
    assert library.library() is not None
    (path,) = (tmp_path / "cache").rglob("*.so")
    path.unlink()
    os.mkfifo(path)
    library._loaded.cache_clear()
    assert library.library() is not None


def test_a_cache_that_cannot_be_written_costs_one_line_of_log(compiler, built, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    compiler(f"cp {built} $2")
    assert library.library() is not None
    assert library.unavailable_because() is None
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the compiled CPU kernels are not kept for the next process"
    ]


def test_a_library_without_threads_is_taken_where_no_openmp_is_loaded(compiler, built, monkeypatch):
    compiler(f"""case "$*" in *none*) exit 1 ;; esac; cp {built} $2""")
    real, flags = library._load, []

    def load(given):
        flags.append(given)
        if "-fopenmp" in given:
            raise library._Unavailable("undefined symbol: GOMP_parallel")
        return real(given)

    monkeypatch.setattr(library, "_load", load)
    assert library.library() is not None
    assert ["-fopenmp" in given for given in flags] == [True, False]


def test_two_processes_at_once(compiler, built, tmp_path):
    compiler(f"sleep 1; cp {built} $2")
    program = "from sparsedm.kernels.cpu import library; assert library.library() is not None"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 1


# ---- without Python --------------------------------------------------------------------------------------------------


def run_harness(tmp_path, compiler, flags, problems, runner=()):
    program = tmp_path / "harness"
    base = ["-ffp-contract=fast", "-fopenmp", "-w", str(HARNESS), "-o", str(program), "-lm"]
    subprocess.run([compiler, *flags, *base], check=True)
    return subprocess.run([*runner, program, str(problems), "7"], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@needs_library
def test_the_kernels_under_sanitizers(tmp_path):
    instructions = library.INSTRUCTIONS[library.instruction_set()]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    assert "lanes" in run_harness(tmp_path, "gcc", ["-O1", "-g", *sanitize, *instructions], 1000)


@pytest.mark.slow
@needs_library
def test_the_code_of_sixteen_lanes_in_generic_vectors(tmp_path):
    flags = ["-O1", "-DGENERIC", "-DLANES=16", *library.INSTRUCTIONS[library.instruction_set()]]
    assert "16 lanes" in run_harness(tmp_path, "gcc", flags, 200)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")), reason="no emulator")
def test_neon_under_an_emulator(tmp_path):
    out = run_harness(tmp_path, "aarch64-linux-gnu-gcc", ["-O3", "-static"], 200, ["qemu-aarch64"])
    assert "4 lanes" in out
