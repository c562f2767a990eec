"""The C kernels as a back end, and the same call once more."""

import contextlib
import copy
import ctypes
import mmap
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor

import sparsedm.compressed
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.kernels.attention import self_attention
from sparsedm.kernels.cpu import library, products, rules
from sparsedm.kernels.launch import broken
from sparsedm.kernels.pattern import Pattern, group_view
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.conv import sparse24_conv2d
from sparsedm.kernels.sparse24.format import pack
from sparsedm.kernels.sparse24.linear import sparse24_linear
from sparsedm.kernels.tracing import direct
from sparsedm.layers import Conv2d, Linear
from sparsedm.sparsity import hold_masks
from tests.kernels.cpu.problems import close, compressed, mask_of, needs_library

# ---- as a back end ---------------------------------------------------------------------------------------------------


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
    assert [name.split()[0] for name in cache if name not in ("choices", "latest")] == ["cpu"]


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
    layouts = [name.split()[:2] for name in cache if name not in ("choices", "latest")]
    assert layouts == [["cpu", "halo" if halo else "conv"]]


@pytest.mark.parametrize("layer", [lambda: small_layer(), lambda: torch.nn.Linear(96, 8)])
def test_without_a_library_models_without_a_mask_are_held(layer, monkeypatch):
    monkeypatch.setattr(library, "_loaded", lambda: (None, "no C compiler"))
    model, x = torch.nn.Sequential(layer()), torch.randn(5, 96)
    with hold_masks(model):
        held = model(x)
    assert torch.equal(model(x), held)


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
    called.clear()
    with torch.no_grad():
        assert type(self_attention(TwoTensor(qkv, qkv), 4)) is TwoTensor
    monkeypatch.setenv("SPARSEDM_BACKEND", "dense")
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


def small_conv(text="1:4", kernel_size=3, stride=1, activation="silu"):
    options = {"stride": stride, "padding": kernel_size // 2, "pattern": text, "activation": activation}
    return compress(torch.nn.Sequential(Conv2d(32, 48, kernel_size, **options)))[0]


def check_conv(layer, x, residual=None):
    y = F.conv2d(x.double(), layer.dense_weight().double(), layer.bias.double(), layer.stride, layer.padding)
    y = {"silu": F.silu, "gelu": F.gelu, None: lambda y: y}[layer.activation](y)
    found = layer(x, residual)
    torch.testing.assert_close(found.double(), y if residual is None else y + residual, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("text", ["2:4", "1:8", "7:8"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1), (5, 1)])
def test_a_repeated_convolution_is_not_decided_again_and_sees_every_change(text, kernel_size, stride, asked):
    layer, other = small_conv(text, kernel_size, stride), small_conv(text, kernel_size, stride)
    x, residual = torch.randn(3, 32, 16, 16), torch.randn(3, 48, 16 // stride, 16 // stride)
    for image in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 32, 16, 32)[..., ::2], x * 2):
        check_conv(layer, image)
    assert len(asked) == 1
    for added in (residual, residual.contiguous(memory_format=torch.channels_last), residual[:, :, ::1] * 2):
        check_conv(layer, x, added)
    layer.bias.add_(1)
    check_conv(layer, x)
    layer.values.mul_(2)
    check_conv(layer, x)
    layer.values.data.mul_(3)
    check_conv(layer, x)
    layer.values.data = layer.values / 5
    check_conv(layer, x)
    layer.load_state_dict(other.state_dict())
    check_conv(layer, x)
    check_conv(copy.deepcopy(layer), x)
    check_conv(layer, x[:2])
    layer.activation = "gelu"
    check_conv(layer, x)
    if kernel_size == 3:
        layer.padding = (0, 0)
        check_conv(layer, x)
    for wrong in (torch.randn(3, 31, 16, 16), x.double()):
        with pytest.raises(InputError):
            layer(wrong)


@torch.no_grad()
@pytest.mark.parametrize("text", ["2:4", "1:4", "7:8"])
def test_a_layer_answers_a_repeated_call_itself(text, monkeypatch):
    linear, conv, rows, image = small_layer(text), small_conv(text), torch.randn(300, 96), torch.randn(3, 32, 16, 16)
    expected = linear(rows), conv(image)
    for name in ("sparse24_linear", "sparse24_conv2d"):
        monkeypatch.setattr(sparsedm.compressed, name, None)
    for layer, x, y in zip((linear, conv), (rows, image), expected):
        assert torch.equal(layer(x), y)


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


@torch.no_grad()
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_inputs_without_strides_are_left_to_torch(convert):
    """One of them ended the kernel's use in this process, and repeated calls in torch's RuntimeError."""
    linear, conv, rows, image = small_layer(), small_conv(), torch.randn(300, 96), torch.randn(3, 32, 16, 16)
    for _ in range(2):
        found = linear(convert(rows)).to_dense()
        torch.testing.assert_close(found, linear(rows), rtol=1e-4, atol=1e-5)
    if convert is torch.Tensor.to_mkldnn:
        plain = small_conv(activation=None)
        for _ in range(2):
            torch.testing.assert_close(plain(convert(image)).to_dense(), plain(image), rtol=1e-4, atol=1e-5)
    assert not broken
    check_conv(conv, image)


@torch.no_grad()
def test_attributes_of_another_kind_between_calls():
    linear, conv, x, image = small_layer(), small_conv(), torch.randn(300, 96), torch.randn(3, 32, 16, 16)
    check_layer(linear, x)
    linear.bias = torch.nn.Parameter(torch.randn(128))
    check_layer(linear, x)
    linear.values = torch._neg_view(linear.values)
    check_layer(linear, x)
    expected = conv(image)
    conv.stride, conv.padding, conv.dilation = [1, 1], [1, 1], 1
    for _ in range(2):
        assert torch.equal(conv(image), expected)
    conv.bias = torch.nn.Parameter(conv.bias)
    assert torch.equal(conv(image), expected)
    linear, conv = small_layer(), small_conv()
    for layer, given in ((linear, x), (conv, image)):
        layer(given)
        layer.pattern = Pattern(1, 8)
        with pytest.raises(InputError, match="1:8"):
            layer(given)


@torch.no_grad()
@pytest.mark.parametrize("layer", [small_layer, small_conv])
def test_what_is_written_during_a_call_counts_in_the_next(layer, monkeypatch):
    layer, x = layer(), torch.randn(300, 96) if layer is small_layer else torch.randn(3, 32, 16, 16)

    def written(operator, *tensors):
        def run(*arguments):
            y = direct(operator, *tensors)(*arguments)
            layer.values.mul_(2)  # by another thread
            return y

        return run

    for operation in ("linear", "conv"):
        monkeypatch.setattr(f"sparsedm.kernels.sparse24.{operation}.direct", written)
    layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


@needs_library
@torch.no_grad()
@pytest.mark.parametrize("layer", [small_layer, small_conv])
def test_a_repeated_call_that_gets_no_memory_is_computed_by_torch_as_the_first_one_is(layer, monkeypatch, caplog):
    layer, x = layer(), torch.randn(300, 96) if layer is small_layer else torch.randn(3, 32, 16, 16)
    real, full, kernels = library.library(), [], (*products.LINEAR, *products.CONV)

    class Library:
        def __getattr__(self, name):
            return lambda *call: 1 if full and name in kernels else getattr(real, name)(*call)

    monkeypatch.setattr(products, "library", Library)
    products._function.cache_clear()
    expected = layer(x)
    full.append("memory")
    try:
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert "no memory for its tiles; torch computes it" in caplog.text
    finally:
        broken.clear()


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


@needs_library
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_under_a_default_device_the_same_kernels_compute(device, monkeypatch):
    monkeypatch.setattr(rules, "OVERHEAD", 0)
    masked, x = Linear(96, 128, pattern="2:4"), torch.randn(600, 96)
    called, real = [], products.masked_linear
    monkeypatch.setattr(products, "masked_linear", lambda *a: called.append(1) or real(*a))
    expected = masked(x)
    with torch.device(device):
        assert torch.equal(masked(x), expected)
    assert len(called) == 2
    for small in map(small_layer, ("2:4", "1:4", "7:8")):
        weight = small.dense_weight()
        exact = F.linear(x, weight, small.bias)
        with torch.device(device), torch.no_grad():
            small.load_state_dict(small.state_dict())
            check_layer(small, x, exact)
            check_layer(small, x, exact)
            assert torch.equal(small.dense_weight(), weight)
        assert "calls" in small._prepacked


@needs_library
@torch.no_grad()
def test_the_number_of_threads_is_torchs_in_every_thread():
    layer, x, threads, found = small_layer(), torch.randn(60, 96), torch.get_num_threads(), []
    layer(x)

    def first_call():
        layer(x)
        found.append(ctypes.CDLL(None).omp_get_max_threads())

    torch.set_num_threads(threads + 3)
    try:
        for held in (contextlib.nullcontext(), layer.held("layer")):
            with held:
                thread = threading.Thread(target=first_call)
                thread.start()
                thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [threads + 3] * 2


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


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@needs_library
def test_threads_that_end_give_their_memory_back():
    layer, x = compress(Linear(1024, 128, pattern="2:4")), torch.randn(64, 1024)
    weight, mask = layer.dense_weight(), layer.dense_weight() != 0

    def both():
        layer(x)
        products.masked_linear(x, weight, mask, layer.pattern)

    def run(count):
        for _ in range(count):
            thread = threading.Thread(target=both)
            thread.start()
            thread.join()

    run(5)
    assert layer.backend_used() == "cpu"
    before = resident()
    run(50)
    assert resident() - before < 8 * 2**20, "each took 0.4 MiB of tiles, and as much of prepacked weights"


def test_a_convolution_of_16_bits_keeps_its_dense_weight_once():
    layer = compress(Conv2d(64, 64, 3, padding=1, pattern="2:4", dtype=torch.bfloat16))
    for batch in (1, 2, 3):
        layer(torch.randn(batch, 64, 8, 8, dtype=torch.bfloat16))
    runs = layer._prepacked["calls"][1].values()
    cells = [cell.cell_contents for run in runs for cell in run.__closure__]
    held = {tensor.untyped_storage().data_ptr() for tensor in cells if isinstance(tensor, torch.Tensor)}
    assert len(runs) == 3
    assert held == {layer._prepacked["dense"][1][0].untyped_storage().data_ptr()}
