"""What becomes of whole models is tested in test_compression.py, the products in kernels/sparse24/."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from sparsedm import compressed
from sparsedm.compressed import CompressedConv2d, CompressedLinear
from sparsedm.compression import compress, decompress, uncompressed_because
from sparsedm.errors import InputError
from sparsedm.kernels import checksum
from sparsedm.kernels.cpu import library
from sparsedm.kernels.pattern import Pattern, pack_bits
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.layers import Conv2d, Linear
from sparsedm.model_files import FORMAT, describe, load_model, save_model
from sparsedm.sparsity import hold_masks, masked_layers, sparsify
from sparsedm.tensor_files import read_tensors, write_tensors
from tests.tolerance import assert_as_good_as_torch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CompressedConv2d(Conv2d(8, 8, 3, padding=1, padding_mode="reflect", pattern="2:4")),
            "padding that is",
        ),
        (lambda: CompressedConv2d(Conv2d(8, 8, 3, padding="same", pattern="2:4")), "padding that is not a number"),
        (lambda: CompressedConv2d(Conv2d(8, 8, 3, groups=2, pattern="2:4")), "a convolution with groups"),
        (lambda: CompressedConv2d(Linear(8, 8, pattern="2:4")), "Linear is no sparsedm.Conv2d: sparsify makes it one"),
        (lambda: CompressedLinear(nn.Linear(8, 8)), "torch.nn.modules.linear.Linear is no sparsedm.Linear"),
    ],
)
def test_a_layer_without_a_compressed_form_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_compressed_layer_shows_what_a_dense_one_would():
    small = compress(sparsify(nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 3, stride=2, padding=1)), "2:4"))
    assert (small[0].in_features, small[0].out_features, small[0].weight.shape) == (16, 8, (8, 16))
    assert (small[1].in_channels, small[1].out_channels, small[1].kernel_size) == (16, 8, (3, 3))
    assert (small[1].stride, small[1].padding, small[1].weight.shape) == ((2, 2), (1, 1), (8, 16, 3, 3))


def test_a_compressed_bf16_weight_takes_9_16ths():
    layer = compress(sparsify(nn.Linear(256, 64, bias=False, dtype=torch.bfloat16), "2:4"))
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert held * 16 == 9 * 256 * 64 * 2


LOOKED_THROUGH = {
    "vmap": lambda f, x: func.vmap(f)(x[:, None]),
    "grad": lambda f, x: func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (2 * x,))[1],
    "jacobian": lambda f, x: func.vmap(func.jacrev(lambda x: f(x[None]).sum()))(x),
    "hessian": lambda f, x: func.hessian(lambda s: f(s * x).square().sum())(torch.ones(())),
    "functionalized": lambda f, x: func.functionalize(torch.no_grad()(f))(x),  # masked ones cannot train under it
    "backward": lambda f, x: torch.autograd.grad(f(x.requires_grad_()).square().sum(), x)[0],
    "forward mode": lambda f, x: tangent(f, x),
    "linearized": lambda f, x: func.linearize(torch.no_grad()(f), x)[1](x),
}


def tangent(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, 3 * x))).tangent


@pytest.mark.parametrize("layer", [Linear(64, 64), Conv2d(64, 64, 3, padding=1)], ids=["linear", "conv"])
def test_a_forward_on_meta_tensors_leaves_nothing_for_a_compiled_graph(layer):
    small = compress(sparsify(copy.deepcopy(layer), "2:4"))
    x = torch.randn(2, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        expected = copy.deepcopy(small)(x)
        func.functional_call(small, {name: b.to("meta") for name, b in small.named_buffers()}, x.to("meta"))
        torch.testing.assert_close(torch.compile(small, backend="eager")(x), expected)


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("look", LOOKED_THROUGH.values(), ids=LOOKED_THROUGH)
def test_what_looks_through_a_compressed_layer_sees_the_masked_one(look, pattern):
    for masked, x in (
        (Linear(32, 24, pattern=pattern, activation="silu"), torch.randn(3, 32)),
        (Conv2d(32, 8, 3, padding=1, pattern=pattern, activation="silu"), torch.randn(2, 32, 5, 5)),
    ):
        small = compress(nn.Sequential(masked).eval())
        expected = look(masked, x.clone())
        assert expected.abs().sum() > 0
        for _ in range(2):  # a repeated call takes a shorter way
            torch.testing.assert_close(look(small, x.clone()), expected)
            small(x)


@pytest.mark.parametrize(
    ("look", "layer", "shape"),
    [
        ("backward", Linear(32, 24, pattern="2:4"), (3, 32)),
        ("jvp", Linear(32, 24, pattern="1:8"), (3, 32)),
        ("backward", Conv2d(32, 8, 3, pattern="1:8"), (2, 32, 5, 5)),
    ],
)
def test_a_compiled_graph_has_the_derivatives_too(look, layer, shape):
    """A backward ended in torch's BackendCompilerFailed, and forward mode lost its tangent without a word."""
    small, x, derivative = compress(nn.Sequential(layer)), torch.randn(shape), LOOKED_THROUGH[look]
    torch._dynamo.reset()
    compiled = torch.compile(small if look == "backward" else lambda x: derivative(small, x), backend="aot_eager")
    found = derivative(compiled, x.clone()) if look == "backward" else compiled(x)
    torch.testing.assert_close(found, derivative(layer, x.clone()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_image_and_images_that_are_mapped_over_have_no_batch(kernel):
    masked, x = Conv2d(32, 8, kernel, padding=kernel // 2, pattern="2:4").eval(), torch.randn(3, 32, 5, 5)
    small, residual = compress(masked), torch.randn(8, 5, 5)
    squares = [func.grad(lambda x, layer=layer: layer(x).square().sum()) for layer in (small, masked)]
    for _ in range(2):  # a repeated call takes a shorter way
        torch.testing.assert_close(small(x[0], residual), masked(x[0], residual))
        torch.testing.assert_close(func.vmap(small)(x), masked(x))
        torch.testing.assert_close(func.vmap(squares[0])(x), func.vmap(squares[1])(x))
    with pytest.raises(InputError, match=r"images are \(B, C, H, W\)"):
        small(x[None])


def test_the_weights_of_several_compressed_layers_are_mapped_over():
    small, x = compress(sparsify(nn.Sequential(nn.Linear(32, 24)), "2:4")), torch.randn(3, 32)
    weights = {"0.values": torch.stack((small[0].values, 2 * small[0].values))}
    found = func.vmap(lambda weights: func.functional_call(small, weights, (x,)))(weights)
    torch.testing.assert_close(found, torch.stack((small(x), 2 * small(x) - small[0].bias)))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_compressed_layer_computes_under_autocast_as_the_masked_one_does(activation):
    linear = Linear(64, 24, pattern="2:4", activation=activation), torch.randn(2, 5, 64)
    conv = Conv2d(32, 8, 3, padding=1, pattern="2:4", activation=activation), torch.randn(2, 32, 6, 6)
    for layer, x in (linear, conv):
        small = compress(layer)
        with torch.no_grad():
            residual = torch.randn_like(layer(x))
            exact = copy.deepcopy(layer).double()(x.double(), residual.double())
            with torch.autocast("cpu", torch.bfloat16):
                usual = layer(x, residual)
                y = small(x, residual)
                assert small(x).dtype == layer(x).dtype == torch.bfloat16
                cast = small._cast[1]
                assert small(x) is not None
                assert small._cast[1] is cast, "the values are cast once"
            assert y.dtype == usual.dtype == torch.float32, "a residual in fp32 is not rounded to bf16"
            assert_as_good_as_torch(y, exact, usual)
            assert_as_good_as_torch(small(x, residual), exact, layer(x, residual))


def test_autocast_leaves_fp64_alone():
    linear = Linear(64, 24, pattern="2:4"), torch.randn(5, 64)
    conv = Conv2d(32, 8, 3, padding=1, pattern="2:4"), torch.randn(2, 32, 6, 6)
    for layer, x in (linear, conv):
        layer, x = layer.double(), x.double()
        for form in (layer, compress(layer)):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y = form(x)
            assert y.dtype == torch.float64
            torch.testing.assert_close(y, layer(x))
        with torch.autocast("cpu", torch.bfloat16), hold_masks(layer):
            assert layer(x).dtype == torch.float64


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_of_another_dtype_counts_as_in_the_masked_layer(dtype, amp):
    layer, x, scale = Linear(256, 256, pattern="2:4"), torch.randn(64, 256), torch.rand(256).to(dtype)
    small = compress(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected = layer(x, scale=scale)
        for _ in range(2):
            y = small(x, scale=scale)
            assert y.dtype == expected.dtype
            torch.testing.assert_close(y, expected, **({"rtol": 0.02, "atol": 0.02} if amp else {}))


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_loaded_values_count_at_once_in_inference_mode_too(backend, monkeypatch):
    """Tensors made there have no version that could tell of a write."""
    monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    x, other = torch.randn(5, 64), compress(Linear(64, 24, pattern="2:4"))
    with torch.inference_mode():
        small = compress(Linear(64, 24, pattern="2:4"))
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                small(x)
                small.load_state_dict(other.state_dict())
                assert torch.equal(small(x), other(x))
                small.load_state_dict(compress(Linear(64, 24, pattern="2:4")).state_dict())


class Net(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = {"width": 32}
        self.conv, self.head = Conv2d(32, 16, 3, padding=1), Linear(64, 24, activation="gelu")

    def forward(self, x):
        return self.head(self.conv(x).flatten(1).unflatten(1, (-1, 64)))


@pytest.mark.parametrize("backend", [None, "torch", "dense"])
@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "1:8", "7:8", "4:16", "1:32"])
def test_every_pattern_is_compressed_saved_loaded_and_decompressed(pattern, backend, tmp_path, monkeypatch):
    if backend:
        monkeypatch.setenv("SPARSEDM_BACKEND", backend)
    model, x = sparsify(Net(), pattern).eval(), torch.randn(8, 32, 16, 16)
    small, expected = compress(model), model(x)
    keep, group = Pattern.parse(pattern).keep, Pattern.parse(pattern).group
    assert small.head.values.shape == (24, 64 * keep // group)
    assert small.conv.values.shape == (16, 9 * 32 * keep // group)
    assert {buffer.dtype for buffer in small.buffers()} == {torch.float32, torch.uint8}, "collectives send these"
    file = save_model(tmp_path / "m.safetensors", small)
    assert json.loads(read_tensors(file)[1]["sparsedm"])["format"] == FORMAT == 2
    loaded = load_model(file, Net).model
    assert describe(loaded)["patterns"] == {"conv": pattern, "head": pattern}
    exact = copy.deepcopy(model).double()(x.double())
    for form in (small, loaded):
        with torch.no_grad():
            assert_as_good_as_torch(form(x), exact, expected)
    again = decompress(loaded)
    assert {n: str(m.pattern) for n, m in masked_layers(again)} == {"conv": pattern, "head": pattern}
    for name, layer in masked_layers(model):
        assert torch.equal(again.get_submodule(name).effective_weight(), layer.effective_weight())


def test_bits_are_as_many_as_the_pattern_says_and_as_a_mask_packs():
    layer = compress(sparsify(nn.Linear(40, 3), "3:8"))
    assert layer.bits.shape == (3, 8)
    assert torch.equal(layer.words(), pack_bits(layer.dense_weight() != 0))


@pytest.mark.parametrize("number", [3, 0, "2", True, None])
def test_a_file_of_a_newer_or_of_no_format_is_refused_by_name(number, tmp_path):
    file = save_model(tmp_path / "m.safetensors", compress(sparsify(Net(), "1:4")))
    tensors, header = read_tensors(file)
    description = json.loads(header["sparsedm"]) | {"format": number}
    write_tensors(file, tensors, {"sparsedm": json.dumps(description)})
    message = "is of format 3, and .* up to 2" if number == 3 else "is damaged: its format"
    with pytest.raises(InputError, match=rf"m\.safetensors {message}"):
        load_model(file, Net)


def test_on_a_gpu_a_pattern_that_its_cores_do_not_take_stays_dense():
    for pattern, reason in (("2:4", None), ("1:8", None), ("3:4", "3:4 may keep more than 2 of every 4")):
        layer = Linear(64, 64, pattern=pattern)
        with FakeTensorMode():
            layer.weight = nn.Parameter(torch.empty(64, 64, device="cuda"))
        found = uncompressed_because(layer)
        assert (found is None) if reason is None else (reason in found)


def test_a_frozen_mask_that_is_not_of_the_pattern_keeps_the_layer_dense():
    layer = sparsify(nn.Linear(16, 8), "1:4")
    layer.mask = torch.ones(8, 16, dtype=torch.bool)
    small = compress(layer)
    assert small.dense_reason == "its frozen mask is not 1:4"
    assert torch.equal(small(torch.ones(1, 16)), layer(torch.ones(1, 16)))


@pytest.mark.parametrize("pattern", ["1:4", "7:8"])
def test_other_patterns_are_one_graph_for_every_batch_size(pattern):
    model = compress(sparsify(Net(), pattern))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 8, 3):
        x = torch.randn(batch, 32, 16, 16)
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_bits_that_no_weight_has_are_refused_when_they_are_loaded():
    model = compress(sparsify(nn.Sequential(nn.Linear(16, 8)), "1:8"))
    state = model.state_dict()
    state["0.bits"].view(torch.int32)[2, 0] = 0x0103
    with pytest.raises(InputError, match=r"^0: illegal 1:8 bits: row 2, group 0 keeps 2 weights"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "0.bits": torch.zeros(8, 8, dtype=torch.uint8)})


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(16, 8, 3)], ids=["linear", "conv"])
def test_metadata_that_no_weight_has_is_refused_when_it_is_loaded(layer):
    model = compress(sparsify(nn.Sequential(layer), "2:4"))
    state = model.state_dict()
    state["0.metadata"].view(torch.int16)[0, 0] = 0x4440  # its first pair is (0, 0)
    with pytest.raises(InputError, match=r"^0: .*row 0"):
        model.load_state_dict(state)


def test_a_wrong_width_is_refused_at_the_first_call_and_the_right_one_taken_afterwards():
    linear = compress(sparsify(nn.Linear(20, 8), "2:4"))
    conv = compress(sparsify(nn.Conv2d(4, 8, (1, 2)), "2:4"))
    for layer, wrong, right, message in (
        (linear, (3, 24), (3, 20), r"x has 24 features, and the layer's weight \(8, 20\) takes 20"),
        (conv, (1, 8, 5, 5), (1, 4, 5, 5), r"x has 8 channels, and the layer's weight \(8, 4, 1, 2\) takes 4"),
    ):
        with pytest.raises(InputError, match=message):
            layer(torch.randn(wrong))
        assert layer(torch.randn(right)).isfinite().all()
    with pytest.raises(InputError, match="x has 16 features"):
        linear(torch.randn(3, 12), skip=torch.randn(3, 4))
    with pytest.raises(InputError, match="x has 0 features"):
        linear(torch.randn(()))
    assert linear(torch.randn(0, 20)).shape == (0, 8)


@pytest.mark.parametrize("amp", [False, True])
def test_values_that_replace_others_at_their_address_are_seen(amp):
    """The kept form of a weight was found again by address and version, which both may stay as they were."""
    layer, x = compress(sparsify(nn.Linear(64, 64), "2:4")), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), torch.no_grad():
        for _ in range(8):
            layer(x)
            values = torch.randn(layer.values.shape)
            layer.values.data = torch.empty(0)
            layer.values.data = values * 1  # where the old ones lay, more often than not
            fresh = copy.deepcopy(layer)
            assert torch.equal(layer(x), fresh(x))


def values_data(layer, other):
    layer.values.data.copy_(other.values)


def values_numpy(layer, other):
    layer.values.numpy()[:] = layer.values.numpy()[::-1].copy()  # sums of all stay the same


def one_bit(layer, other):
    layer.values.numpy().view(np.uint32)[3, 5] ^= 1 << 22


def all_signs(layer, other):
    layer.values.data.neg_()


def two_signs(layer, other):
    layer.values.data[::2, 0].neg_()


def positions_numpy(layer, other):
    stored = layer._positions
    getattr(layer, stored).numpy()[:] = getattr(other, stored).numpy()


def another_buffer(layer, other):
    layer.values = other.values


def in_place(layer, other):
    layer.values.mul_(2)


WRITES = [values_data, values_numpy, one_bit, all_signs, two_signs, positions_numpy, another_buffer, in_place]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", ["C", "dense", "torch", "autocast", "no library", "compiled"])
def test_whoever_writes_to_a_compressed_weight_on_a_cpu_it_counts_at_once(write, way, monkeypatch):
    if way in ("dense", "torch"):
        monkeypatch.setenv("SPARSEDM_BACKEND", way)
    if way == "no library":
        monkeypatch.setattr(library, "library", lambda: None)
        monkeypatch.setattr(library, "serving", lambda: (None, "there is no C compiler"))
    torch._dynamo.reset()
    for make in (lambda: Linear(64, 64, pattern="2:4"), lambda: Conv2d(16, 16, 3, pattern="1:4")):
        layer = compress(make())
        x = torch.randn(80, 64) if layer.weight.dim() == 2 else torch.randn(3, 16, 8, 8)
        run = torch.compile(layer, backend="eager") if way == "compiled" else layer
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"), torch.no_grad():
            before = [run(x) for _ in range(2)][1]
            for _ in range(2):
                write(layer, compress(make()))
                y = run(x)
                torch.testing.assert_close(y, copy.deepcopy(layer)(x))
                assert not torch.equal(y, before)
                before = y


def test_a_held_compressed_weight_is_compared_once_and_a_change_is_an_error(monkeypatch):
    small, x, compared = compress(sparsify(nn.Sequential(nn.Linear(64, 32)), "2:4")), torch.randn(16, 64), []
    checksums = checksum.checksums
    monkeypatch.setattr(checksum, "checksums", lambda *tensors: compared.append(1) or checksums(*tensors))
    small(x)
    compared.clear()
    with torch.no_grad(), hold_masks(small), hold_masks(small):
        expected = small(x)
        assert torch.equal(small(x), expected)
        assert not compared
        assert "held" not in copy.deepcopy(small[0])._prepacked, "a copy is not held for ever"
    small(x)
    assert compared, "outside of the block every call compares"
    with pytest.raises(InputError, match="weight of 0 was changed while it was held"), hold_masks(small):
        small[0].values.data.mul_(2)
    torch.testing.assert_close(small(x), small[0].bias + 2 * (expected - small[0].bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_a_cast_of_all_tensors_leaves_the_positions_and_drops_the_kernels_form(dtype, pattern):
    layer, x = compress(sparsify(nn.Linear(64, 64), pattern)), torch.randn(16, 64)
    y, positions, known = layer(x), layer.words().clone(), dict(layer._prepacked)
    layer.float().to("cpu")
    assert layer._prepacked == known, "what changes nothing drops nothing: a CUDA graph may read it"
    with hold_masks(layer):
        layer.type(torch.float32)
    assert torch.equal(layer(x), y)
    layer.type(dtype)
    assert torch.equal(layer.words(), positions)
    assert layer.values.dtype == dtype
    assert layer._prepacked.keys() <= {"choices"}
    if dtype != torch.float8_e4m3fn:  # of which there are no products
        torch.testing.assert_close(layer(x.to(dtype)).float(), y, rtol=0, atol=0.05)


def test_the_back_end_of_the_newest_size_is_told(monkeypatch):
    layer, x = compress(sparsify(nn.Linear(64, 64), "2:4")), torch.randn(7, 64)
    given = iter(["torch", "dense", "torch"])
    monkeypatch.setattr(dispatch, "rule_of_thumb", lambda request: (dispatch.Choice(next(given)), ""))
    assert layer.backend_used() is None
    assert [layer(x[:rows]) is not None and layer.backend_used() for rows in (3, 5, 7)] == ["torch", "dense", "torch"]
    assert layer(x[:5]) is not None
    assert layer.backend_used() == "torch", "not of a size met before"


def test_files_of_int16_metadata_are_read(tmp_path):
    def build(config=None):
        return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8))

    model, other, x = compress(sparsify(build(), "2:4")), compress(sparsify(build(), "2:4")), torch.randn(3, 20)
    old = {name: t.view(torch.int16) if name.endswith("metadata") else t for name, t in model.state_dict().items()}
    assert old["0.metadata"].shape == (8, 2)
    x, other = (
        torch.randn(3, 20),
        compress(sparsify(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8)), "2:4")),
    )
    other.load_state_dict(old)
    assert torch.equal(other(x), model(x))
    description = {"kind": "compressed", "config": {}, "patterns": {"0": "2:4", "2": "2:4"}}
    write_tensors(tmp_path / "old.safetensors", old, {"sparsedm": json.dumps(description)})
    loaded = load_model(tmp_path / "old.safetensors", build)
    assert torch.equal(loaded.model(x), model(x))


def test_every_buffer_has_a_dtype_that_collectives_send():
    model = compress(sparsify(nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 3)), "2:4"))
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.uint8}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4"])
def test_a_model_on_the_meta_device_is_compressed_to_the_same_shapes(pattern):
    def build():
        return sparsify(nn.Sequential(nn.Linear(20, 8), nn.Conv2d(16, 8, 3)), pattern)

    with torch.device("meta"):
        shapes = compress(build())
    model = compress(build())
    assert {n: t.shape for n, t in shapes.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    shapes.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(shapes[0](torch.ones(2, 20)), model[0](torch.ones(2, 20)))


def test_on_a_gpu_the_kernel_that_selects_also_packs(monkeypatch):
    layer, packed = Linear(20, 8, pattern="2:4"), []
    expected = compress(layer).state_dict()
    monkeypatch.setattr(compressed, "kernels_serve", lambda weight: True)
    monkeypatch.setattr(compressed, "pack", packed.append)
    for name, tensor in compress(layer).state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert not packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_convolution_of_16_bits_on_a_cpu_keeps_the_memory_format_of_its_input(dtype, monkeypatch):
    """oneDNN has died in channels_last there, with a 3 x 1 kernel of stride and dilation 2."""
    layer = compress(sparsify(nn.Conv2d(16, 8, (3, 1), stride=2, dilation=2, dtype=dtype), "2:4"))
    x, weights, real = torch.randn(2, 16, 9, 9, dtype=dtype), [], nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, "conv2d", lambda x, weight, *rest: weights.append(weight) or real(x, weight, *rest)
    )
    for _ in range(2):
        assert layer(x).is_contiguous()
    assert [weight.is_contiguous() for weight in weights] == [True, True]
    assert layer.dense_weight().is_contiguous()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:8"])
def test_a_mask_that_was_set_by_hand_is_compressed_in_any_strides_and_refused_in_another_shape(pattern):
    layer, x = Linear(64, 32, pattern=pattern), torch.randn(3, 64)
    mask = layer.current_mask()
    layer.mask = mask.t().contiguous().t()
    with torch.no_grad():
        torch.testing.assert_close(CompressedLinear(layer)(x), layer(x))
    for wrong in (mask[:1], mask.to(torch.uint8), mask[:, :32]):
        layer.mask = wrong
        for use in (lambda: CompressedLinear(layer), lambda: layer.eval()(x), lambda: layer.masked_weight()):
            with torch.no_grad(), pytest.raises(InputError, match=r"must have one shape|the mask must be bool"):
                use()
