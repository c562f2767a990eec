"""A layer takes the kernels only where they were measured to be right and quicker, on an imaginary GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparsedm import layers
from sparsedm.errors import InputError
from sparsedm.kernels import masked_matmul, masked_matmul_kernels
from sparsedm.kernels.pattern import select_mask_ref
from sparsedm.kernels.tuning import Autotuner
from sparsedm.layers import Linear
from sparsedm.sparsity import set_masking
from tests.tolerance import assert_as_good_as_torch

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
SETTINGS = [{}, {"decay": 0.25}, {"kept": 0.5, "dropped": 0.0, "decay": 2e-4, "frozen": True}]
PRODUCTS = {"_forward": "bits", "_input_grad": "bits", "_weight_grad": "fused"}


class Gpu:
    """A GPU on which each product takes so many microseconds; timed: how often one was measured."""

    def __init__(self):
        self.microseconds, self.timed = {"library": 9.0, "bits": 4.0, "fused": 4.0}, 0

    def time(self, run):
        self.timed += 1
        return self.microseconds[run.args[0]["algorithm"]]


@pytest.fixture
def gpu(imaginary_gpu, monkeypatch):
    """What a layer asks the kernels for, interpreted, is measured on an imaginary GPU."""
    monkeypatch.setattr(masked_matmul, "uses_triton", lambda *tensors: True)
    imaginary, device = Gpu(), torch.device("cuda", 0)
    for product, algorithm in PRODUCTS.items():
        candidates = [{"algorithm": "library"}, {"algorithm": algorithm, "SPLIT": 1, **SMALL}]
        if algorithm != "fused":
            del candidates[1]["SPLIT"]
        tuner = Autotuner(product, candidates, [masked_matmul_kernels], imaginary.time)
        monkeypatch.setattr(tuner, "best", lambda run, _, t=tuner, **key: Autotuner.best(t, run, device, **key))
        monkeypatch.setattr(masked_matmul, product, tuner)
    torch.use_deterministic_algorithms(True)  # new memory is NaN until it is written
    yield imaginary
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """Which kernels were launched."""
    found = []
    for name in ("launch_forward", "launch_input_grad", "launch_weight_grad"):
        run = getattr(masked_matmul_kernels, name)
        monkeypatch.setattr(
            masked_matmul_kernels, name, lambda *a, run=run, name=name: (found.append(name), run(*a))[1]
        )
    return found


def layer_and_input(dtype=torch.float32, **options):
    return Linear(64, 40, dtype=dtype, pattern="2:4", **options), torch.randn(2, 9, 64, dtype=dtype)


def step(layer, x, dy, **epilogue):
    """y, dx, dw, db"""
    x = x.detach().requires_grad_()
    y = layer(x, **epilogue)
    return y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy.to(y.dtype))


def by_torch(layer, x, dy, monkeypatch, **epilogue):
    """The same without any kernel."""
    with monkeypatch.context() as context:
        context.setattr(layers, "kernels_serve", lambda weight: False)
        return step(copy.deepcopy(layer), x, dy, **epilogue)


def assert_same_step(layer, x, dy, monkeypatch, **epilogue):
    out = step(layer, x, dy, **epilogue)
    low = by_torch(layer, x, dy, monkeypatch, **epilogue)
    double = {k: v.double() for k, v in epilogue.items()}
    high = by_torch(copy.deepcopy(layer).double(), x.double(), dy.double(), monkeypatch, **double)
    for mine, ref, torchs in zip(out, high, low):
        assert mine.dtype == torchs.dtype
        assert_as_good_as_torch(mine, ref, torchs)


@pytest.mark.parametrize("rates", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_by_kernels_every_gradient_is_that_of_torchs_way(gpu, launches, monkeypatch, dtype, rates):
    layer, x = layer_and_input(dtype, activation="gelu")
    set_masking(layer, **rates)
    if "frozen" in rates:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(40, 64))  # the mask is no longer the pattern's choice
    residual, gate = torch.randn(2, 9, 40, dtype=dtype), torch.randn(2, 40, dtype=dtype)
    assert_same_step(layer, x, torch.randn(2, 9, 40), monkeypatch, residual=residual, scale=gate)
    assert set(launches) == {"launch_forward", "launch_input_grad", "launch_weight_grad"}
    before = len(launches)
    step(layer, x, torch.randn(2, 9, 40))
    assert len(launches) == before + 3, "once measured, only the step itself runs"


def test_the_decay_of_a_lent_weight(gpu, launches):
    layer, x = layer_and_input()
    set_masking(layer, decay=0.5)
    weight = torch.randn(40, 64, requires_grad=True)
    torch.func.functional_call(layer, {"weight": weight}, (x,)).mul(0).sum().backward()
    assert launches
    assert torch.equal(weight.grad, 0.5 * weight.detach() * ~select_mask_ref(weight, layer.pattern))


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_weights(gpu, launches, monkeypatch):
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.float16):
        out = step(layer, x, dy := torch.randn(2, 9, 40))
        low = by_torch(layer, x, dy, monkeypatch)
    assert launches
    high = by_torch(copy.deepcopy(layer).double(), x.double(), dy.double(), monkeypatch)
    for mine, ref, torchs in zip(out, high, low):
        assert mine.dtype == torchs.dtype
        assert_as_good_as_torch(mine, ref, torchs, eps=torch.finfo(torch.float16).eps * ref.abs().max().item())


def broken(*arguments):
    raise RuntimeError("out of resources: registers")


def wrong(dz, x, weight, bits, rule, dw, config):
    dw.copy_(1.1 * (dz.t() @ x))


@pytest.mark.parametrize(
    ("name", "kernel"), [("launch_forward", broken), ("launch_weight_grad", broken), ("launch_weight_grad", wrong)]
)
@pytest.mark.parametrize("known", ["nothing is", "by the table"])
def test_a_kernel_that_fails_or_errs_never_trains(gpu, monkeypatch, name, kernel, known):
    layer, x = layer_and_input(activation="silu")
    dy = torch.randn(2, 9, 40)
    if known == "by the table":
        step(layer, x, dy)
        for product in PRODUCTS:
            getattr(masked_matmul, product)._known.clear()  # as in another process
    monkeypatch.setattr(masked_matmul_kernels, name, kernel)
    step(layer, x, dy)
    monkeypatch.setattr(masked_matmul_kernels, name, None)  # from now on nobody may call it
    assert_same_step(layer, x, dy, monkeypatch)


@pytest.mark.parametrize("reason", ["slower", "off", "forced"])
def test_torchs_way_is_taken_where_it_is_quicker_unknown_or_asked_for(gpu, launches, monkeypatch, reason):
    layer, x = layer_and_input()
    if reason == "slower":
        gpu.microseconds = {"library": 4.0, "bits": 9.0, "fused": 9.0}
    elif reason == "off":
        monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    else:
        monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
    dy = torch.randn(2, 9, 40)
    step(layer, x, dy)
    launches.clear()
    for mine, torchs in zip(step(layer, x, dy), by_torch(layer, x, dy, monkeypatch)):
        assert torch.equal(mine, torchs)
    assert not launches
    assert gpu.timed == (6 if reason == "slower" else 0)


def test_dtypes_that_torch_does_not_mix_are_not_mixed_by_the_kernels(gpu, launches):
    layer, x = Linear(64, 40, bias=False, pattern="2:4"), torch.randn(3, 64)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(InputError, match=r"the masked weight must be .* in x's dtype"):
            layer(x.to(dtype))
    assert not launches


def test_training_and_inference_are_measured_apart(gpu, launches):
    layer, x = layer_and_input()
    with torch.no_grad():
        layer(x)
    assert set(launches) == {"launch_forward"}
    assert gpu.timed == 2
    layer(x.requires_grad_())
    assert gpu.timed == 6, "without an activation the forward of training is that of inference"


def test_under_torchs_transformations_the_product_is_torchs(gpu, launches, monkeypatch):
    layer, x = layer_and_input()
    dy = torch.randn(2, 9, 40)
    _, _, expected, _ = by_torch(layer, x, dy, monkeypatch)

    def loss(weight):
        return (torch.func.functional_call(layer, {"weight": weight}, (x,)) * dy).sum()

    assert torch.equal(torch.func.grad(loss)(layer.weight.detach()), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, torchs in zip(step(compiled, x, dy), by_torch(layer, x, dy, monkeypatch)):
        assert torch.equal(mine, torchs)
    program = torch.export.export(layer, (x,)).module()
    assert torch.equal(program(x), F.linear(x, layer.weight * layer.current_mask(), layer.bias))
    assert not launches
    assert not gpu.timed


def test_a_measurement_inside_of_activation_checkpointing_leaves_no_trace(gpu, launches):
    layer, x = layer_and_input(activation="gelu")
    first = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), layer.weight)
    assert launches
    assert torch.equal(*first, *torch.autograd.grad(layer(x).sum(), layer.weight))


def test_the_second_derivative_is_that_of_torchs_way(gpu, launches, monkeypatch):
    layer, x = layer_and_input(activation="silu")
    set_masking(layer, decay=0.1)

    def penalty(layer):
        inner = x.detach().requires_grad_()
        gradients = torch.autograd.grad(layer(inner).square().sum(), (inner, layer.weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (layer.weight, layer.bias))

    out = penalty(layer)
    assert launches
    with monkeypatch.context() as context:
        context.setattr(layers, "kernels_serve", lambda weight: False)
        low, high = penalty(layer), None
        x = x.double()
        high = penalty(copy.deepcopy(layer).double())
    for mine, ref, torchs in zip(out, high, low):
        assert_as_good_as_torch(mine, ref, torchs)


@pytest.mark.gpu
@pytest.mark.parametrize("rates", SETTINGS, ids=str)
def test_on_a_gpu_as_in_torch(tmp_path, monkeypatch, rates):
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))
    layer = Linear(512, 1536, pattern="2:4", activation="gelu", device="cuda", dtype=torch.bfloat16)
    set_masking(layer, **rates)
    x, dy = (torch.randn(4, 257, n, device="cuda", dtype=torch.bfloat16) for n in (512, 1536))
    assert_same_step(layer, x, dy, monkeypatch)
    monkeypatch.setattr(masked_matmul, "_is_best_in_torch", lambda *arguments: False)
    assert_same_step(layer, x, dy, monkeypatch)
