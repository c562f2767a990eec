"""Masked matmul: outputs and every gradient, in torch and in the kernels (interpreted), against fp64.

The interpreter multiplies bf16 wrongly, so that bf16 kernels are only compiled here and tested on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from emulator.sass import Build, compile_offline
from sparsedm.errors import InputError
from sparsedm.kernels import masked_matmul, masked_matmul_kernels
from sparsedm.kernels.mask import Selection, select_mask
from sparsedm.kernels.masked_matmul import ALGORITHMS, masked_linear, masked_linear_ref
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.straight_through import GradientRule
from tests.tolerance import assert_as_good_as_torch

HALF = Pattern(2, 4)
RULES = [GradientRule(), GradientRule(decay=0.25), GradientRule(kept=0.5, dropped=0.0, decay=2e-4)]
ACTIVATIONS = [None, "gelu", "gelu_tanh", "silu"]


SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
ONE = {"algorithm": "masked"}


@pytest.fixture
def kernels(monkeypatch):
    """The GPU's path on the CPU: interpreted, with small blocks, on memory that is NaN until it is written."""
    monkeypatch.setattr(masked_matmul, "uses_triton", lambda *tensors: True)
    for name in ("FORWARD", "INPUT_GRAD", "WEIGHT_GRAD"):
        configs = getattr(masked_matmul_kernels, name)
        monkeypatch.setattr(masked_matmul_kernels, name, [{**c, **SMALL} if "BLOCK_M" in c else c for c in configs])
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", *ALGORITHMS])
def by(request):
    """An algorithm, for the interpreted kernels; or None, for torch."""
    if request.param == "torch":
        return None
    request.getfixturevalue("kernels")
    return request.param


def inputs(M, N, K, dtype=torch.float32, device="cpu"):
    shapes = (M, K), (N, K), (N,), (M, N)
    x, weight, bias, dy = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [t.to(device, dtype) for t in (x, weight / K**0.5, bias, dy)]


def result(function, x, weight, bias, dy, *arguments, **options):
    """y, dx, dw, db"""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(leaves[0], leaves[1], *arguments[:1], leaves[2], *arguments[1:], **options)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))


def assert_right(out, x, weight, bias, dy, pattern, activation, rule=RULES[0]):
    high = [t if t is None else t.double() for t in (x, weight, bias, dy)]
    reference = result(masked_linear_ref, *high, pattern, activation, rule=rule)
    low = result(masked_linear_ref, x, weight.to(x.dtype), bias, dy, pattern, activation, rule=rule)
    for mine, ref, torchs in zip(out, reference, low):
        assert_as_good_as_torch(mine, ref, torchs)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_algorithm_and_dtype(kernels, algorithm, dtype):
    tensors = inputs(20, 34, 32, dtype)
    out = result(masked_linear, *tensors, HALF, "gelu", algorithm=algorithm, rule=RULES[1])
    assert_right(out, *tensors, HALF, "gelu", RULES[1])


SHAPES = [  # M, N, K; blocks are 16 x 32 x 32
    (16, 32, 32),  # one block
    (37, 70, 48),  # ragged everywhere
    (130, 8, 16),  # tall, smaller than a block
    (1, 33, 64),  # one token
]


@pytest.mark.parametrize("algorithm", ["masked", "bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(kernels, algorithm, shape):
    tensors = inputs(*shape)
    assert_right(result(masked_linear, *tensors, HALF, algorithm=algorithm), *tensors, HALF, None)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sizes_strides_and_pattern(kernels, data):
    group = data.draw(st.sampled_from([2, 4, 8]))
    pattern = Pattern(data.draw(st.integers(1, group - 1)), group)
    M, N, K = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40)), group * data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    x, weight, bias, dy = inputs(M, N, K, dtype)
    x = torch.cat([x, x], 1)[:, data.draw(st.integers(0, K)) :][:, :K]  # rows not of unit stride
    rule, algorithm = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(ALGORITHMS[1:]))
    out = result(masked_linear, x, weight, bias, dy, pattern, "silu", algorithm=algorithm, rule=rule)
    assert_right(out, x, weight, bias, dy, pattern, "silu", rule)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of -z: sigmoid is 0 there, as it should be
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_its_gradient(kernels, activation):
    x, weight, bias, dy = inputs(32, 32, 32)
    x *= 3  # into both tails
    out = result(masked_linear, x, weight, bias, dy, HALF, activation, algorithm="bits")
    assert_right(out, x, weight, bias, dy, HALF, activation)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("algorithm", ["masked", "bits"])
def test_every_rule_in_the_epilogue_and_after_partial_sums(kernels, monkeypatch, algorithm, split, rule):
    monkeypatch.setattr(masked_matmul_kernels, "WEIGHT_GRAD", [{"algorithm": "fused", "SPLIT": split, **SMALL}])
    tensors = inputs(70, 48, 32)
    assert_right(result(masked_linear, *tensors, HALF, algorithm=algorithm, rule=rule), *tensors, HALF, None, rule)


@pytest.mark.parametrize(
    "pattern", [Pattern(1, 2), Pattern(3, 4), Pattern(3, 8), Pattern(15, 16), Pattern(1, 32)], ids=str
)
@pytest.mark.parametrize("algorithm", ["masked", "bits"])
def test_every_pattern(kernels, algorithm, pattern):
    tensors = inputs(16, 16, 32)
    out = result(masked_linear, *tensors, pattern, algorithm=algorithm, rule=RULES[1])
    assert_right(out, *tensors, pattern, None, RULES[1])


def test_x_as_the_identity_returns_the_masked_weight_exactly(by):
    weight = torch.randn(40, 32)
    y = masked_linear(torch.eye(32), weight, HALF, algorithm=by)
    assert torch.equal(y.t(), select_mask(weight, HALF).masked)


def test_a_pruned_weight_cannot_change_y_yet_gets_a_gradient(by):
    x, weight, bias, dy = inputs(5, 8, 32)
    mask = select_mask(weight, HALF).mask
    smaller = torch.where(mask, weight, weight / 2)
    y, _, dw, _ = result(masked_linear, x, weight, bias, dy, HALF, algorithm=by)
    assert torch.equal(y, masked_linear(x, smaller, HALF, bias, algorithm=by))
    assert (dw[~mask] != 0).all()


def test_leading_dimensions_strides_and_an_empty_batch(by):
    wide, weights = torch.randn(2, 3, 5, 50), torch.randn(64, 40)
    x, weight = wide[..., ::2][..., :16], weights[::2, 3:19]  # no unit stride; rows of 40
    y = masked_linear(x, weight, HALF, algorithm=by)
    assert y.shape == (2, 3, 5, 32)
    low = masked_linear_ref(x, weight, HALF)
    assert_as_good_as_torch(y, masked_linear_ref(x.double(), weight.double(), HALF), low)
    mask = select_mask(weight, HALF).mask
    empty, weight = torch.empty(0, 3, 16, requires_grad=True), weight.clone().requires_grad_()
    out = masked_linear(empty, weight, HALF, rule=GradientRule(0.5), algorithm=by)
    assert out.shape == (0, 3, 32)
    dx, dw = torch.autograd.grad(out.sum(), (empty, weight))
    assert dx.shape == (0, 3, 16)
    assert torch.equal(dw, 0.5 * weight * ~mask)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_that_are_needed(kernels, wanted):
    x, weight, bias, dy = inputs(16, 32, 32)
    full = result(masked_linear, x, weight, bias, dy, HALF, "silu", algorithm="masked")
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
    y = masked_linear(x, weight, HALF, bias, "silu", algorithm="masked")
    for i, gradient in zip(wanted, torch.autograd.grad(y, [leaves[i] for i in wanted], dy)):
        assert torch.equal(gradient, full[1 + i])
    with torch.no_grad():
        assert torch.equal(masked_linear(x, weight, HALF, bias, "silu", algorithm="masked"), y)


@pytest.mark.parametrize("by", ["torch", "library", "bits"], indirect=True)
def test_under_torchs_transformations(by):
    algorithm = by
    x, weight, bias, _ = inputs(16, 32, 32)

    def loss(weight, bias):
        options = {"rule": GradientRule(0.1), "algorithm": algorithm}
        return masked_linear(x.to(weight.dtype), weight, HALF, bias, "gelu", **options).square().sum()

    leaves = [t.requires_grad_() for t in (weight, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    with_checkpoint = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    functional = torch.func.grad(loss, argnums=(0, 1))(*(t.detach() for t in leaves))
    for got in (with_checkpoint, compiled):
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    algorithm = by and "masked"  # the kernels have no fp64
    exact = torch.autograd.grad(loss(*doubles), doubles)
    for a, b, c in zip(functional, exact, expected):  # it may be differentiated again, and so adds the decay otherwise
        assert_as_good_as_torch(a, b, c)


class Layer(torch.nn.Linear):
    def forward(self, x):
        return masked_linear(x, self.weight, HALF, self.bias, "gelu")


@pytest.mark.parametrize("by", ["torch", "kernels"])
def test_export(request, by):
    if by == "kernels":
        request.getfixturevalue("kernels")
    layer, x = Layer(16, 8), torch.randn(3, 16)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_the_operators_are_registered_fully(kernels):
    x, weight, bias, dz = inputs(16, 32, 32, torch.float16)
    weight = weight.float()
    masked, _, bits, *_ = select_mask(weight, HALF, torch.float16, bits=True)
    for algorithm, want_z, decay in (("library", True, 0.0), ("library", False, 0.25), ("bits", True, 0.25)):
        arguments = (x, weight, masked, bits, bias, "gelu" if want_z else None, want_z, algorithm)
        torch.library.opcheck(torch.ops.sparsedm.masked_linear, arguments)
        arguments = (dz, x, weight, masked, bits, [decay, 1.0, 1.0], True, True, algorithm)
        torch.library.opcheck(torch.ops.sparsedm.masked_linear_grads, arguments)


def test_gradcheck():
    """Of x and the bias; the weight's straight-through gradient is that of the product, at the masked weight."""
    x, weight, bias, dy = inputs(3, 8, 8, torch.float64)
    leaves = [t.requires_grad_() for t in (x, bias)]
    torch.autograd.gradcheck(lambda x, b: masked_linear(x, weight, HALF, b, "gelu"), leaves)
    torch.autograd.gradgradcheck(lambda x, b: masked_linear(x, weight, HALF, b, "gelu"), leaves)
    _, _, dw, _ = result(masked_linear, x, weight, bias, dy, HALF, "gelu")
    masked = select_mask(weight, HALF).masked.requires_grad_()
    assert torch.equal(dw, torch.autograd.grad(F.gelu(F.linear(x, masked, bias)), masked, dy)[0])


@pytest.mark.parametrize(
    ("by", "dtype"),
    [("torch", torch.bfloat16), ("library", torch.bfloat16), ("bits", torch.float16)],
    indirect=["by"],
    ids=str,
)
def test_autocast_keeps_the_weights_gradient_in_the_weights_dtype(by, dtype):
    x, weight, bias, dy = inputs(16, 32, 32)
    with torch.autocast("cpu", dtype):
        y, dx, dw, db = result(masked_linear, x, weight, bias, dy, HALF, "gelu", algorithm=by)
    assert y.dtype == dtype
    assert dx.dtype == dw.dtype == db.dtype == torch.float32
    low = result(masked_linear_ref, *(t.to(dtype) for t in (x, weight, bias)), dy, HALF, "gelu")
    high = result(masked_linear_ref, *(t.double() for t in (x, weight, bias, dy)), HALF, "gelu")
    for out, ref, torchs in zip((y, dx, dw, db), high, low):
        assert_as_good_as_torch(out, ref, torchs)


@pytest.mark.parametrize("algorithm", [None, "masked"])
def test_every_product_runs_and_is_timed_on_the_device_of_its_operands(kernels, current_device, monkeypatch, algorithm):
    ran_on = []

    def run(tuner_or_kernel):
        return lambda *a, **key: (ran_on.append(current_device[-1].shape), tuner_or_kernel(*a, **key))[1]

    for tuner in (masked_matmul._forward, masked_matmul._input_grad, masked_matmul._weight_grad):
        monkeypatch.setattr(tuner, "best", run(tuner.best))
    for name in ("launch_forward", "launch_input_grad", "launch_weight_grad"):
        monkeypatch.setattr(masked_matmul_kernels, name, run(getattr(masked_matmul_kernels, name)))
    result(masked_linear, *inputs(20, 34, 32), HALF, algorithm=algorithm)
    assert ran_on == 3 * [(20, 32)]


def test_without_an_algorithm_the_tuner_decides(kernels, monkeypatch):
    asked = []

    def best(run, device, **key):
        asked.append(key)
        return {"algorithm": "masked", "SPLIT": 1, **SMALL}

    for tuner in (masked_matmul._forward, masked_matmul._input_grad, masked_matmul._weight_grad):
        monkeypatch.setattr(tuner, "best", best)
    monkeypatch.setattr(masked_matmul_kernels, "launch_weight_grad", lambda *arguments: arguments[-2].fill_(7))
    x, weight, bias, dy = inputs(20, 32, 32)
    _, _, dw, _ = result(masked_linear, x, weight, bias, dy, HALF)
    assert [(key["m"], key["n"], key["k"]) for key in asked] == [(32, 32, 32)] * 6, (
        "before the forward, and in each product"
    )
    assert (dw == 7).all()
    monkeypatch.setenv("SPARSEDM_BACKEND", "dense")  # torch's product, whatever the tuner says
    masked_linear(x, weight, HALF, bias)
    assert len(asked) == 6


def test_rows_have_offsets_of_64_bits_in_every_kernel(kernels, monkeypatch):
    """The stride of a weight times the number of its rows may pass 2^31."""
    found, load = [], masked_matmul_kernels._load
    monkeypatch.setattr(masked_matmul_kernels, "_load", lambda *a: (found.append(str(a[1].dtype)), load(*a))[1])
    for algorithm in ALGORITHMS[1:]:
        result(masked_linear, *inputs(16, 32, 32), HALF, algorithm=algorithm, rule=RULES[1])
    assert len(found) >= 14
    assert set(found) == {"int64"}


@pytest.fixture
def newer_setting():
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_torch_s_newer_setting_of_tf32_is_read_and_has_measurements_of_its_own(kernels, newer_setting, monkeypatch):
    asked = []
    monkeypatch.setattr(masked_matmul._forward, "best", lambda *_, **key: asked.append(key) or {**SMALL, **ONE})
    x, weight, *_ = inputs(16, 32, 32)
    for precision in ("ieee", "tf32"):
        newer_setting.fp32_precision = precision
        with torch.no_grad():
            masked_linear(x, weight, HALF, algorithm="masked")
            masked_linear(x, weight, HALF)
    assert len({key["dtypes"] for key in asked}) == 2
    assert masked_matmul_kernels._constants(torch.float32, ONE)["PRECISION"] == "tf32"
    assert masked_matmul_kernels._constants(torch.bfloat16, ONE)["PRECISION"] == "ieee"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 12)}, r"x \(3, 12\) and weight \(8, 16\) do not share their last axis"),
        ({"x": torch.tensor(1.0)}, r"x \(\) and weight \(8, 16\) do not share"),
        ({"x": torch.ones(3, 16, dtype=torch.int64)}, "x must be floating point, not torch.int64"),
        ({"weight": torch.ones(8, 16, 1, 1)}, r"x \(3, 16\) and weight \(8, 16, 1, 1\) do not share"),
        ({"weight": torch.ones(8, 16).int()}, "masked weights must be fp64, fp32, bf16 or fp16, not torch.int32"),
        ({"weight": torch.ones(8, 0), "x": torch.ones(3, 0)}, "must be a positive multiple of 4"),
        ({"weight": torch.ones(8, 16, device="meta")}, "one device, not on cpu and meta"),
        ({"pattern": Pattern(16, 32)}, r"the input axis of shape \(8, 16\) must be a positive multiple of 32"),
        ({"bias": torch.ones(7)}, r"the bias must be \(8,\) torch.float32 as x is, not \(7,\)"),
        ({"bias": torch.ones(8).half()}, "the bias must be .* not .* torch.float16"),
        (
            {"selection": Selection(torch.ones(8, 8))},
            r"the masked weight must be \(8, 16\) .* torch.float32, not \(8, 8\)",
        ),
        ({"selection": Selection(torch.ones(8, 16).half())}, "the masked weight must be .* not .* torch.float16"),
        (
            {"selection": Selection(torch.ones(8, 16)), "rule": GradientRule(1e-4)},
            r"GradientRule\(decay=0.0001, .*\) reads the mask, and mask is None",
        ),
        (
            {"selection": Selection(torch.ones(8, 16), bits=torch.ones(8, 1))},
            r"the mask's bits must be \(8, 1\) torch.int32, not \(8, 1\) torch.float32",
        ),
        ({"activation": "relu"}, "unknown activation 'relu': it must be one of None, gelu, gelu_tanh, silu"),
        ({"algorithm": "fast"}, "unknown algorithm 'fast': it must be None or one of library, masked, bits"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(InputError, match=message):
        masked_linear(**{"x": torch.ones(3, 16), "weight": torch.ones(8, 16), "pattern": HALF} | change)


def test_autocast_leaves_fp64_alone():
    x, weight, bias = torch.ones(3, 16).double(), torch.randn(8, 16).double(), torch.ones(8).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, HALF, bias)
        with pytest.raises(InputError, match=r"the bias must be .* torch.bfloat16 as x is, not .* torch.float64"):
            masked_linear(x.float(), weight.float(), HALF, bias)
    assert torch.equal(y, masked_linear(x, weight, HALF, bias))


# ---- compiled for a GPU ----------------------------------------------------------------------------------------------

SIZES = dict.fromkeys(["M", "N", "K", "stride_wn"], "i32")
SIGNATURES = {
    "fwd": {"x_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16", "z_ptr": "*bf16", "stride_xm": "i32"},
    "dx": {"dz_ptr": "*bf16", "dx_ptr": "*bf16", "stride_zm": "i32"},
    "dw": {"dz_ptr": "*bf16", "x_ptr": "*bf16", "dw_ptr": "*fp32", "stride_zm": "i32", "stride_xm": "i32"}
    | dict.fromkeys(["decay", "kept", "dropped"], "fp32"),
}


def build(kind, config, capability):
    """bf16 products, of an fp32 weight where the mask is applied inside; sizes and strides divisible by 16 but M."""
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    blocks = {name: value for name, value in config.items() if name.isupper()}
    masked = config["algorithm"] == "masked"
    signature = SIGNATURES[kind] | {"w_ptr": "*bf16" if masked else "*fp32"} | SIZES
    constants = {"PRECISION": "ieee"} | blocks
    if masked:
        constants["bits_ptr"] = None
    else:
        signature["bits_ptr"] = "*i32"
    constants |= {"ACTIVATION": "gelu"} if kind == "fwd" else {}
    divisible = tuple(name for name, kind in signature.items() if name != "M" and kind != "fp32")
    kernel = f"sparsedm.kernels.masked_matmul_kernels:_masked_matmul_{kind}_kernel"
    return Build(kernel, signature, constants, options, divisible, capability)


CONFIGS = [
    (kind, config)
    for kind, configs in [
        ("fwd", masked_matmul_kernels.FORWARD),
        ("dx", masked_matmul_kernels.INPUT_GRAD),
        ("dw", masked_matmul_kernels.WEIGHT_GRAD),
    ]
    for config in configs
    if config["algorithm"] != "library"
]


def assert_on_tensor_cores(builds):
    for build, compiled in zip(builds, compile_offline(builds)):
        assert compiled.spills == compiled.count("LDL") == compiled.count("STL") == 0, build
        assert compiled.count("HGMMA" if build.capability == 90 else "HMMA") > 0, build
        assert not compiled.warnings, build
        assert compiled.shared <= (232448 if build.capability == 90 else 166912), build


def test_it_compiles_to_tensor_core_loops_without_spills():
    def first(kind, algorithm):
        return kind, next(config for k, config in CONFIGS if k == kind and config["algorithm"] == algorithm)

    chosen = [(*first("fwd", algorithm), 90) for algorithm in ("masked", "bits")]
    chosen += [(*first("dx", "bits"), 80), (*first("dw", "fused"), 90)]
    assert_on_tensor_cores([build(*arguments) for arguments in chosen])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_config_compiles_to_tensor_core_loops_without_spills(capability):
    assert_on_tensor_cores([build(kind, config, capability) for kind, config in CONFIGS])


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(128, 128, 128), (1000, 520, 1152), (4096, 1536, 512)], ids=str)
@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_on_a_gpu(algorithm, dtype, shape, rule, monkeypatch):
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")  # the algorithm is given, and the mask may be chosen in any
    x, weight, bias, dy = inputs(*shape, dtype, "cuda")
    weight = weight.float()
    for activation in ACTIVATIONS:
        out = result(masked_linear, x, weight, bias, dy, HALF, activation, algorithm=algorithm, rule=rule)
        assert_right(out, x, weight, bias, dy, HALF, activation, rule)
