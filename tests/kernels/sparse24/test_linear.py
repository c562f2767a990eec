"""The operator: reference against plain torch, dispatch, refusals, torch.compile and export, and the launch path."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedm.compressed import CompressedLinear
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import Pattern
from sparsedm.kernels.sparse24 import dispatch, layouts
from sparsedm.kernels.sparse24 import format as format_file
from sparsedm.kernels.sparse24.dispatch import LINEAR, Choice, Request
from sparsedm.kernels.sparse24.format import ZERO_WORD, decompress, pack, unpack
from sparsedm.kernels.sparse24.linear import _rows, sparse24_linear
from sparsedm.layers import Linear
from tests.kernels.sparse24.kernel_case import Convolution, Problem, layout_of, pruned

BF16 = torch.bfloat16


def linear(problem, **other):
    p = problem
    arguments = dict(bias=p.bias, activation=p.activation, residual=p.residual, skip=p.skip, scale=p.scale) | other
    return sparse24_linear(p.x, p.values, p.metadata, **arguments)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_equals_torch_on_the_decompressed_weight(activation, dtype):
    torch.manual_seed(1)
    weight, x, skip = pruned(24, 60, dtype), torch.randn(2, 6, 40).to(dtype), torch.randn(2, 6, 20).to(dtype)
    bias, residual, gate = torch.randn(24).to(dtype), torch.randn(2, 6, 24).to(dtype), torch.randn(2, 24).to(dtype)
    act = {None: lambda y: y, "gelu": F.gelu, "silu": F.silu}.get(activation, lambda y: F.gelu(y, approximate="tanh"))
    expected = act(F.linear(torch.cat((x, skip), -1), weight, bias)) * gate[:, None] + residual
    y = sparse24_linear(x, *pack(weight), bias, activation, residual, skip=skip, scale=gate)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_a_scale_of_one_row_serves_all_rows():
    p = Problem(M=6, N=16, K=32, dtype=torch.float32)
    gate = torch.randn(16)
    assert torch.equal(linear(p, scale=gate), linear(p) * gate)


@pytest.mark.parametrize("backend", ["", "cpu", "torch"])
def test_no_rows(backend, monkeypatch):
    monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    p = Problem(M=3, N=16, K=32, dtype=torch.float32)
    for scale in (None, torch.ones(16), torch.ones(0, 16), torch.ones(2, 16)):
        assert sparse24_linear(p.x[:0], p.values, p.metadata, scale=scale, cache={}).shape == (0, 16)


def test_out_dtype():
    p = Problem(M=3, N=16, K=32)
    assert linear(p, out_dtype=torch.float32).dtype == torch.float32


def test_arranged_tensors_are_kept_until_the_weight_changes(monkeypatch):
    monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
    p, cache = Problem(M=3, N=16, K=32), {}
    first = linear(p, cache=cache)
    assert torch.equal(linear(p), first)
    dense, _ = cache["dense"][1]
    assert torch.equal(dense, unpack(p.values, p.metadata))
    dense.zero_()
    assert not linear(p, cache=cache).any(), "what is kept is used"
    p.values.mul_(2)
    assert torch.equal(linear(p, cache=cache), 2 * first)
    p.values = p.values.clone()
    cache["dense"][1][0].zero_()
    assert torch.equal(linear(p, cache=cache), 2 * first)


def test_the_dispatcher_is_told_of_the_product_and_decides(monkeypatch):
    p = Problem(M=3, N=16, K=32, skip=16, groups=1, bias=True, activation="gelu", residual=True, dtype=torch.float32)
    expected, plain, cache = linear(p), linear(p, residual=None, scale=None), {}

    def serve(request, run, cache):
        assert request == Request(
            LINEAR, None, torch.float32, 3, 16, 48, device=p.x.device, out_dtype=torch.float32, activation="gelu",
            bias=True, scale=True, residual=torch.float32, skip=16, backend="mma", instructions=library.serving()[0],
        )  # fmt: skip
        assert torch.equal(run(Choice("dense"), {}, True), expected)
        assert torch.equal(run(Choice("dense"), {}, True, neutral=True), plain)
        return run(Choice("torch"), cache, False)

    monkeypatch.setattr(dispatch, "serve", serve)
    assert torch.equal(linear(p, cache=cache, backend="mma"), expected)
    assert set(cache) == {"torch"}


def test_the_environment_names_a_back_end_where_the_call_does_not(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "serve", lambda request, *_: asked.append(request.backend))
    monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
    p = Problem(M=3, N=16, K=32)
    linear(p), linear(p, backend="torch")
    assert asked == ["dense", "torch"]


def test_a_kernel_that_does_not_run_is_computed_in_torch_unless_it_was_asked_for(monkeypatch):
    p = Problem(M=3, N=16, K=32, skip=16, bias=True, activation="gelu")
    expected, stricts = linear(p), []
    choice = Choice("splitk")
    monkeypatch.setattr(dispatch, "rule_of_thumb", lambda request: (choice, ""))
    monkeypatch.setattr(dispatch, "launch", lambda *arguments, **_: stricts.append(arguments[3]))
    assert torch.equal(linear(p), expected)
    assert torch.equal(linear(p, backend="splitk"), expected)
    assert stricts == [False, True]


class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", ()), str(function)]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("text", ["2:4", "1:4"])
def test_torch_decompresses_at_every_call_as_a_cuda_graph_can_hold_it(monkeypatch, text):
    """Nothing is copied from the CPU's memory or read back: the metadata were checked when they were prepacked."""
    weight = torch.randn(16, 32)
    values, metadata = pack(select_mask(weight, Pattern.parse(text)).masked, Pattern.parse(text))
    with Recorder() as recorder:
        assert decompress(values, metadata, 32, Pattern.parse(text)).shape == (16, 32)
    assert len(recorder.seen) > 3
    assert not [op for op in recorder.seen if "lift_fresh" in op or "_local_scalar_dense" in op or "is_nonzero" in op]
    cache, checks = {}, []
    monkeypatch.setattr(layouts, "check_metadata", lambda *_: checks.append(1))
    monkeypatch.setattr(format_file, "check_metadata", lambda *_: checks.append(1))
    for _ in range(2):
        y = sparse24_linear(torch.eye(32), values, metadata, backend="torch", cache=cache, pattern=text)
        assert torch.equal(y.t(), select_mask(weight, Pattern.parse(text)).masked)
    assert len(checks) == 1


REFUSED = {
    "columns": (dict(x=torch.ones(3, 48)), "x has 48 columns and the weight 32"),
    "dtype": (dict(x=torch.ones(3, 32, dtype=BF16)), "x is bfloat16 and the weight float32"),
    "bias": (dict(bias=torch.ones(17)), r"bias \(17,\) float32 must have the shape \(16,\)"),
    "bias-dtype": (dict(bias=torch.ones(16).half()), r"bias \(16,\) float16 must .* dtype of x \(3, 32\) float32"),
    "residual": (dict(residual=torch.ones(3, 17)), r"residual \(3, 17\) float32 must have the shape of y, \(3, 16\)"),
    "skip-rows": (dict(x=torch.ones(3, 16), skip=torch.ones(4, 16)), r"skip \(4, 16\) float32 must have the leading"),
    "scale-dtype": (dict(scale=torch.ones(16).half()), r"scale \(16,\) float16 must have the dtype of x .* float32"),
    "scale": (dict(scale=torch.ones(2, 16)), r"scale \(2, 16\) float32 must be .* G a divisor of the 3 rows"),
    "no scale": (dict(scale=torch.ones(0, 16)), r"scale \(0, 16\) float32 must be .* G a divisor of the 3 rows"),
    "activation": (dict(activation="relu"), "unknown activation 'relu'"),
    "backend": (dict(backend="wgma"), "unknown backend 'wgma': one of torch, dense, cpu, mma, splitk, wgmma"),
    "metadata": (dict(metadata=torch.full((16, 2), ZERO_WORD, dtype=torch.int32)), r"\(16, 2\) int32"),
    "illegal-pair": (dict(metadata=torch.zeros(16, 2, dtype=torch.int16)), "row 0, group 0 keeps positions 0 and 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    p = Problem(M=3, N=16, K=32, dtype=torch.float32)
    wrong, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        sparse24_linear(**(dict(x=p.x, values=p.values, metadata=p.metadata) | wrong))


def test_operator_is_registered_correctly():
    p = Problem(M=6, N=16, K=32, skip=16, groups=2, bias=True, activation="silu", residual=True, dtype=torch.float32)
    arguments = (p.x, p.values, p.metadata, [], p.bias, p.activation, p.residual, p.skip, p.scale, torch.float32)
    torch.library.opcheck(torch.ops.sparsedm.sparse24_linear, (*arguments, "torch", 0, True))


class Layer(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.cache = {}
        self.register_buffer("values", problem.values)
        self.register_buffer("metadata", problem.metadata)

    def forward(self, x):
        return sparse24_linear(x, self.values, self.metadata, activation="gelu", cache=self.cache) + 1


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_compiles_whole_and_exports(backend, monkeypatch):
    monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    p = Problem(M=6, N=16, K=32, dtype=torch.float32)
    expected = Layer(p)(p.x)
    assert torch.equal(torch.compile(Layer(p), fullgraph=True, backend="aot_eager")(p.x), expected)
    layer = Layer(p)
    layer(p.x)
    assert torch.equal(torch.export.export(layer, (p.x,)).module()(p.x), expected)


def test_rows_are_copied_only_where_the_kernels_cannot_read_them():
    wide = torch.zeros(2, 6, 48, dtype=BF16)
    strided = wide[..., 8:40]
    assert _rows(strided).data_ptr() == strided.data_ptr()
    assert _rows(strided).shape == (12, 32)
    flat = torch.randn(16 * 64 + 8).to(BF16)
    one = flat[:64].as_strided((1, 64), (1, 1))  # contiguous to torch, and refused by a tensor map
    unaligned = [wide[..., 4:36], wide[..., ::2], torch.zeros(4, 36, dtype=BF16)[:, :32], flat[:64].expand(16, 64), one]
    for tensor in (*unaligned, *(flat[i : i + 16 * 64].view(16, 64) for i in (1, 4))):
        rows = _rows(tensor)
        assert torch.equal(rows, tensor.reshape(rows.shape))
        assert rows.stride() == (rows.shape[1], 1)
        assert rows.data_ptr() % 16 == 0
    ragged = torch.zeros(4, 36, dtype=BF16)
    assert _rows(ragged).data_ptr() == ragged.data_ptr(), "no copy helps"


def test_the_weight_takes_nine_sixteenths_of_its_bytes():
    values, metadata = pack(pruned(64, 128))
    assert values.nbytes + metadata.nbytes == 64 * 128 * 2 * 9 // 16
    assert unpack(values, metadata).nbytes == 64 * 128 * 2


def test_launches_reach_the_driver_with_the_right_grid():
    """The whole launch path of Triton with a driver that records and does not launch: see __main__ below."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-m", __name__], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    recorded = json.loads(child.stdout)
    # (kernel, blocks or clusters along x, blocks in a cluster), for 1 x 3 tiles and then again from the cache
    assert recorded["specialized"] == 2 * [["linear_specialized", 6, 1]]
    assert recorded["cluster"] == 2 * [["linear_flat", 3, 2]]
    assert recorded["mma"] == 2 * [["linear_mma", 10, 1]]
    assert recorded["splitk"] == 2 * [["linear_splitk", 40, 1], ["reduce_splitk", 50, 1]]
    assert recorded["conv"] == 2 * [["conv_specialized", 8, 1]]
    assert recorded["compiled"] == [1, 2]
    assert recorded["conv-mma"] == 2 * [["conv_mma", 16, 1]]
    # numbers of the tensor maps among the PTX parameters, which fill_slot and the convolution's producer rely on
    assert recorded["maps"] == [0, 5, 10, 15, 20, 25]
    assert recorded["conv-maps"] == [0, 5, 10, 21, 30]


def _record_launches():
    import re

    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    class Recorder:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_device_interface = staticmethod(lambda: None)

    calls, texts = [], []

    def handles(compiled):
        def launch(*arguments):
            packed = next(
                a for a in arguments if isinstance(a, tuple) and len(a) == 3 and a == compiled.packed_metadata
            )
            calls.append((compiled.name, arguments[0], packed[1]))
            texts.append(compiled.asm["ptx"])

        compiled._run = launch

    driver.set_active(Recorder())
    CompiledKernel._init_handles = handles
    torch.cuda.get_device_properties = lambda device: type("Properties", (), {"multi_processor_count": 132})

    from sparsedm.kernels.sparse24 import mma, mma_conv, mma_splitk, wgmma, wgmma_conv

    recorded = {}

    def launch(module, p, **config):
        module.launch(*p.tensors(layout_of(module)), **p.options(), **config)

    def twice(name, module, p, **config):
        for _ in range(2):
            launch(module, p, **config)
        recorded[name] = calls.copy()
        calls.clear()

    p = Problem(M=200, N=600, K=256, bias=True, residual=True)
    twice("specialized", wgmma, p)
    longer = Problem(M=520, N=600, K=256, bias=True, residual=True)
    other = Problem(M=520, N=600, K=256, bias=True, residual=True)
    other.bias = other.bias.float()
    for problem in (longer, other):  # other sizes run the same compiled kernel, another dtype of the bias does not
        launch(wgmma, problem)
        recorded.setdefault("compiled", []).append(len(wgmma._compiled))
    recorded["maps"] = [int(number) for number in re.findall(r"linear_specialized_param_(\d+)\[128\]", texts[0])]
    calls.clear()
    twice("cluster", wgmma, p, config=next(c for c in wgmma.CONFIGS if c.cluster == "w" and not c.specialized))
    twice("mma", mma, p)
    twice("splitk", mma_splitk, p)
    c = Convolution(B=2, C=64, H=32, W=32, N=64, bias=True, residual=True, activation="silu")
    twice("conv", wgmma_conv, c, config=wgmma_conv.CONFIGS[1])
    recorded["conv-maps"] = [int(number) for number in re.findall(r"conv_specialized_param_(\d+)\[128\]", texts[-1])]
    twice("conv-mma", mma_conv, c)
    print(json.dumps(recorded))


if __name__ == "__main__":
    _record_launches()


@pytest.mark.parametrize("rows", [4, 300])
def test_an_input_or_a_skip_without_columns_is_none(rows):
    layer, x = Linear(128, 256, pattern="1:4"), torch.randn(rows, 128)
    small = CompressedLinear(layer)
    with torch.no_grad():
        for pair in ((x, x[:, :0]), (x[:, :0], x)):
            torch.testing.assert_close(small(pair[0], None, pair[1]), layer(x))
