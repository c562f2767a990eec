import copy

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from sparsedm import inspection
from sparsedm.compressed import Compressed
from sparsedm.compression import compress
from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.cpu import library
from sparsedm.kernels.sparse24 import dispatch
from sparsedm.kernels.sparse24.dispatch import Choice, Measured
from sparsedm.sparsity import sparsify


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def example_inputs(self):
        return (torch.zeros(1, 3, 4, 4),)

    def forward(self, x):
        x = self.norm(self.mix(self.stem(x).flatten(2).transpose(1, 2)))
        return nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


STEM, MIX = 16 * 32 * 27, 16 * 32 * 32


@pytest.mark.parametrize("change", [lambda m: sparsify(m, "2:4"), lambda m: compress(sparsify(m, "2:4"))])
def test_counts_are_those_by_hand(change):
    table = inspect(change(Model()))
    stem, mix = table.rows
    assert (stem.macs, stem.macs_after, stem.why) == (STEM, STEM, "the input axis 3 is not a multiple of 4")
    assert (mix.macs, mix.macs_after, mix.pattern) == (MIX, MIX // 2, "2:4")
    assert (mix.parameters, mix.parameters_after) == (32 * 32 + 32, 32 * 16 + 32)
    assert mix.holds
    totals = table.totals()
    assert totals["macs_with_attention"] - totals["macs"] == 2 * 16 * 16 * 32
    assert totals["parameters"] == 32 * 27 + 32 + 32 * 32 + 32 + 64
    assert "VIOLATED" not in str(table)


@pytest.mark.parametrize("change", [lambda m: m, compress], ids=["masked", "compressed"])
def test_padding_is_not_counted(change):
    """The values of a compressed 2:4 row are padded: here from 10 to 16, and from 54 to 56."""
    linear = change(sparsify(nn.Sequential(nn.Linear(20, 64, bias=False)), "2:4"))
    (row,) = inspect(linear, (torch.zeros(2, 20),)).rows
    assert (row.parameters, row.parameters_after, row.macs_after) == (64 * 20, 64 * 10, 2 * 64 * 10)
    conv = change(sparsify(nn.Sequential(nn.Conv2d(12, 16, 3, padding=1, bias=False)), "2:4"))
    (row,) = inspect(conv, (torch.zeros(1, 12, 5, 5),)).rows
    assert (row.parameters_after, row.macs, row.macs_after) == (16 * 9 * 6, 25 * 16 * 9 * 12, 25 * 16 * 9 * 6)


def test_inspecting_changes_nothing():
    model = sparsify(Model(), "2:4").train()
    x = torch.randn(1, 3, 4, 4)
    before = model(x)
    inspect(model)
    assert model.training
    assert torch.equal(model(x), before)
    assert not model.mix._forward_hooks


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_weight_of_two_layers_counts_once(pattern):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    table = inspect(sparsify(model, pattern), (torch.zeros(1, 16),))
    totals = table.totals()
    assert totals["parameters"] == sum(p.numel() for p in model.parameters()) == 256 + 2 * 16
    assert totals["parameters_after"] == (128 if pattern else 256) + 2 * 16
    assert totals["macs"] == 2 * 256
    assert [row.shared for row in table.rows] == [False, True]
    assert inspect(compress(sparsify(model, "2:4")), (torch.zeros(1, 16),)).totals()["parameters"] == 2 * (256 + 16)


class Lazy(nn.Module):
    """Keeps what it computes from its first input, as tables of rotary positions do."""

    def __init__(self):
        super().__init__()
        self.layer, self.places = nn.Linear(16, 16), {}

    def forward(self, x):
        return self.layer(x + self.places.setdefault("all", torch.arange(16, device=x.device)))


@pytest.mark.parametrize("change", [lambda m: m, lambda m: compress(sparsify(m, "2:4"))], ids=["dense", "compressed"])
def test_what_a_model_keeps_of_the_forward_is_not_of_this_one(change):
    model, x = change(Lazy()), torch.randn(2, 16)
    expected = copy.deepcopy(model)(x)
    with torch.no_grad():
        inspect(model, (x[:1],))
        assert not isinstance(model.layer, Compressed) or model.layer.backend_used() is None
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("size", "line"),
    [
        (16, "0.26 k ->       0.13 k  (-50.0%)"),
        (1024, "1.05 M ->       0.52 M  (-50.0%)"),
        (32768, "1.07 G ->       0.54 G  (-50.0%)"),
    ],
)
def test_the_summary_is_in_a_unit_that_shows_two_digits_at_least(size, line):
    with torch.device("meta"):
        model = sparsify(nn.Sequential(nn.Linear(size, size, bias=False)), "2:4")
    text = inspect(model, (torch.zeros(1, size),)).summary()
    assert text.splitlines()[1].endswith(line)
    assert text.splitlines()[2].endswith(line), "no attention here"


@pytest.mark.parametrize("batch", [0, 1.5, "2", None])
def test_a_batch_is_a_number_of_images(batch):
    with pytest.raises(InputError, match=f"batch {batch!r}: must be a whole number, at least 1"):
        inspect(Model(), batch=batch)


def test_the_picture_is_written(tmp_path):
    inspect(sparsify(Model(), "2:4")).plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_of_a_deep_network_shows_its_first_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_BARS", 1)
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.extend(figure.axes))
    inspect(Model()).plot(tmp_path / "layers.png")
    assert len(seen[0].patches) == 2, "two bars of each layer"
    assert seen[0].get_xlabel() == "weights and biases of the first 1 of 2 layers"


def test_a_model_without_example_inputs_needs_them():
    with pytest.raises(InputError, match="pass example_inputs"):
        inspect(nn.Linear(4, 4))
    assert inspect(nn.Linear(4, 4), (torch.zeros(1, 4),)).totals()["macs"] == 16


@pytest.mark.parametrize(
    ("arch", "batch", "backend", "why"),
    [
        ("cpu", 64, *(("cpu", "C kernel") if library.library() else ("dense", "no CPU kernels"))),
        ("cpu", 1, "dense", ""),
        ("sm_75", 512, "dense", "sm_75 has no sparse tensor cores"),
        ("sm_80", 2, "splitk", "few rows"),
        ("sm_80", 512, "mma", "mma.sp"),
        ("sm_86", 512, "mma", "mma.sp"),
        ("sm_89", 512, "mma", "mma.sp"),
        ("sm_90a", 512, "wgmma", "wgmma.sp"),
        ("sm_90a", 16, "dense", "to fill the GPU"),
        ("sm_100", 512, "dense", "mma.sp is a slow legacy path of sm_100"),
        ("sm_103", 512, "dense", "mma.sp is a slow legacy path of sm_103"),
        ("sm_120", 512, "mma", "mma.sp"),
        ("sm_121", 512, "mma", "mma.sp"),
    ],
)
def test_arch_shows_the_kernel_the_compressed_model_would_use(arch, batch, backend, why):
    model = sparsify(nn.Sequential(nn.Linear(64, 64)), "2:4")
    for form in (model, compress(model)):
        (row,) = inspect(form, (torch.zeros(1, 16, 64),), arch=arch, batch=batch).rows
        assert row.backend == backend
        assert why in row.why
        assert row.why


def test_arch_of_a_convolution():
    model = sparsify(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), "2:4")
    for form in (model, compress(model)):
        for batch, backend in ((1, "dense"), (64, "wgmma")):
            (row,) = inspect(form, (torch.zeros(1, 64, 8, 8),), arch="sm_90a", batch=batch).rows
            assert row.backend == backend


def test_a_1x1_convolution_is_the_product_that_serves_its_pixels():
    model = compress(sparsify(nn.Sequential(nn.Conv2d(64, 64, 1)), "2:4"))
    for batch, backend in ((1, "splitk"), (64, "wgmma"), (8, "dense")):
        (row,) = inspect(model, (torch.zeros(1, 64, 8, 8),), arch="sm_90a", batch=batch).rows
        assert row.backend == backend
        assert row.why.startswith("a 1 x 1 convolution is a matrix product: ")


class Shared(nn.Module):
    """One layer for two calls, of 8 and of 64 rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x), self.layer(x[:, :1])


CALLED = {  # the layer, its input at batch 1
    "linear": (nn.Linear(64, 64), (1, 64, 64)),
    "vector": (nn.Linear(64, 64), (1, 64)),
    "shared": (Shared(), (1, 8, 64)),
    "conv": (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 16, 16)),
    "stride": (nn.Conv2d(64, 64, 3, stride=2, padding=1), (1, 64, 10, 6)),
    "small": (nn.Conv2d(32, 8, 3), (1, 32, 3, 3)),
    "pixels": (nn.Conv2d(64, 64, 1), (1, 64, 8, 8)),
}


@pytest.mark.parametrize(
    ("forced", "pattern"),
    [(None, "2:4"), ("dense", "2:4"), ("torch", "2:4"), ("cpu", "2:4"), (None, "1:8"), (None, "31:32")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "shape"), CALLED.values(), ids=CALLED)
def test_the_back_end_and_the_reason_are_the_ones_of_the_call(layer, shape, dtype, forced, pattern, monkeypatch):
    if forced:
        monkeypatch.setenv("SPARSEDM_BACKEND", forced)
    model, used = compress(sparsify(nn.Sequential(copy.deepcopy(layer)), pattern)).to(dtype), []
    real = dispatch.serve

    def serve(request, run, cache):
        _, why = dispatch.rule_of_thumb(request)

        def recorded(choice, *rest):
            used.append((request.M, choice.backend, why))
            return run(choice, *rest)

        return real(request, recorded, cache)

    monkeypatch.setattr(dispatch, "serve", serve)
    model(torch.randn(8, *shape[1:], dtype=dtype))
    (row,) = inspect(model, (torch.zeros(shape, dtype=dtype),), batch=8).rows
    assert (row.backend, row.why.removeprefix("a 1 x 1 convolution is a matrix product: ")) == max(used)[1:]
    if library.library() and layer is CALLED["linear"][0] and dtype == torch.float32 and forced in (None, "cpu"):
        assert row.backend == ("dense" if pattern == "31:32" else "cpu")


def test_without_a_compiler_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(library, "_loaded", lambda: (None, "there is no C compiler `cc`"))
    model = compress(sparsify(nn.Sequential(nn.Linear(64, 64)), "2:4"))
    (row,) = inspect(model, (torch.zeros(1, 16, 64),), batch=8).rows
    assert row.backend == "dense"
    assert "there is no C compiler `cc`" in row.why


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("layer", "pattern", "why"),
    [
        (nn.Conv2d(128, 64, 3, padding=1, groups=2), "2:4", "has no compressed form"),
        (nn.Conv2d(64, 64, 3, padding="same"), "2:4", "has no compressed form"),
        (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), "2:4", "has no compressed form"),
        (nn.Conv2d(64, 64, 1), "1:2", None),
        (nn.Conv2d(64, 64, 1), "2:16", None),
    ],
    ids=str,
)
def test_arch_shows_a_kernel_for_what_compress_compresses_and_nothing_else(layer, pattern, why, device):
    model = sparsify(nn.Sequential(copy.deepcopy(layer)), pattern)
    compressed = isinstance(compress(model)[0], Compressed)
    assert compressed == (why is None)
    (row,) = inspect(model.to(device), (torch.zeros(1, layer.in_channels, 8, 8),), arch="sm_90a", batch=64).rows
    assert (row.backend == "wgmma") == compressed
    assert compressed or (row.backend == "torch" and why in row.why)


@pytest.mark.parametrize(("pattern", "channels", "words"), [("3:4", 64, "at most 2 of every 4"), ("1:2", 6, "K = 6")])
def test_what_the_cores_of_a_gpu_do_not_take_is_shown_as_dense_there(pattern, channels, words):
    model = sparsify(nn.Sequential(nn.Conv2d(channels, 64, 1)), pattern)
    for form in (model, compress(model)):
        (row,) = inspect(form, (torch.zeros(1, channels, 8, 8),), arch="sm_90a", batch=64).rows
        assert (row.backend, row.pattern) == ("dense", pattern)
        assert words in row.why


def test_a_layer_without_weights_is_counted(recwarn):
    (row,) = inspect(nn.Sequential(nn.Linear(0, 5)), (torch.zeros(1, 0),)).rows
    assert (row.parameters, row.macs, row.macs_after) == (5, 0, 0)


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(64, 64, 3, padding=1)], ids=["linear", "conv"])
def test_what_a_gpu_measured_is_shown_unless_another_arch_is_asked_for(layer):
    model = compress(sparsify(nn.Sequential(copy.deepcopy(layer)), "2:4"))
    x = torch.zeros(1, 512, 64) if isinstance(layer, nn.Linear) else torch.zeros(1, 64, 8, 8)
    here = "cpu" if library.library() else "dense"
    model[0]._prepacked["choices"] = {(512, "", "cuda:0"): Measured(Choice("wgmma", 2), {}, {})}  # without times
    assert inspect(model, (x,)).rows[0].backend == "wgmma"
    assert "tuned table" in inspect(model, (x,)).rows[0].why
    assert inspect(model, (x,), arch="cpu").rows[0].backend == here
    if isinstance(layer, nn.Linear):
        assert inspect(model, (x,), batch=2).rows[0].backend == here, "never called with so many rows"


def test_an_unknown_arch_is_refused():
    with pytest.raises(InputError, match="unknown arch 'sm_1': one of cpu, sm_75, sm_80"):
        inspect(Model(), arch="sm_1")


@pytest.mark.parametrize("thing", [None, 3, nn.Linear])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(InputError, match=f"a {type(thing).__name__} is no model"):
        inspect(thing)


# ---- models of other people ------------------------------------------------------------------------------------------


def test_attention_that_multiplies_its_own_weights_is_counted_by_hand():
    model = sparsify(nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), "2:4")
    table = inspect(model, (torch.zeros(1, 5, 8),))
    rows = {row.name: row for row in table.rows}
    assert rows["1.self_attn"].macs == 5 * 16 * 48
    assert rows["1.self_attn.out_proj"].macs == 5 * 16 * 16
    assert rows["1.linear1"].macs == 5 * 16 * 32, "the fast path does not hide a layer"
    assert rows["1.self_attn"].why == "MultiheadAttention multiplies its in_proj_weight itself"
    totals = table.totals()
    assert totals["macs"] == 5 * (8 * 16 + 16 * 48 + 16 * 16 + 2 * 16 * 32)
    assert totals["macs_with_attention"] - totals["macs"] == 2 * 5 * 5 * 16
    assert totals["parameters"] == sum(p.numel() for p in model.parameters())


class CrossAttention(nn.Module):
    def __init__(self, call, **options):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(16, 2, batch_first=True, **options), call

    def forward(self, x, c):
        return self.call(self.attention, x, c)[0]


@pytest.mark.parametrize("options", [{}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda attention, x, v: attention(x, v[..., : attention.kdim], v),
        lambda attention, x, v: attention(x, value=v, key=v[..., : attention.kdim]),
        lambda attention, x, v: attention(query=x, key=v[..., : attention.kdim], value=v, need_weights=False),
    ],
)
def test_attention_over_another_sequence_is_counted_however_it_is_called(call, options):
    k, v = options.get("kdim", 16), options.get("vdim", 16)
    model = CrossAttention(call, **options)
    totals = inspect(model, (torch.zeros(1, 5, 16), torch.zeros(1, 7, v))).totals()
    assert totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert totals["macs"] == 5 * 16 * 16 + 7 * k * 16 + 7 * v * 16 + 5 * 16 * 16
    keys = 7 + ("add_bias_kv" in options)
    assert totals["macs_with_attention"] - totals["macs"] == 2 * 5 * keys * 16


@pytest.mark.parametrize("call", [lambda a, x: a(x), lambda a, x: a(image=x)])
def test_a_subclass_of_attention_with_arguments_of_its_own_is_counted(call):
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, image):
            return super().forward(image, image, image, need_weights=False)

    attention = SelfAttention(16, 2, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return call(self.attention, x)[0]

    totals = inspect(Model(), (torch.zeros(1, 5, 16),)).totals()
    assert totals["macs"] == 4 * 5 * 16 * 16
    assert totals["macs_with_attention"] - totals["macs"] == 2 * 5 * 5 * 16


def test_layers_that_are_not_ours_to_mask_are_listed_with_the_reason():
    class Quantised(nn.Module):  # as quantisation libraries write them: sizes, and no weight of their own
        in_features, out_features = 8, 4

        def forward(self, x):
            return x[..., :4] * 1.0

    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3, padding=1), Quantised()), "2:4")
    _, conv, quantised = inspect(model, (torch.zeros(1, 4, 8),)).rows
    assert (conv.shape, conv.macs, conv.pattern) == ((4, 4, 3), 8 * 4 * 4 * 3, "dense")
    assert conv.why == "torch.nn.modules.conv.Conv1d is not torch's own Linear or Conv2d"
    assert (quantised.shape, quantised.macs) == ((4, 8), 4 * 4 * 8)


def test_a_transposed_convolution_is_counted_by_its_input():
    model = sparsify(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 8, 2, stride=2)), "2:4")
    _, transposed = inspect(model, (torch.zeros(1, 4, 5, 5),)).rows
    assert (transposed.macs, transposed.pattern) == (25 * 4 * 8 * 4, "dense")


def test_a_mask_that_is_passed_over_is_noticed():
    class ReadsTheWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    (row,) = inspect(sparsify(ReadsTheWeight(), "2:4"), (torch.zeros(1, 8),)).rows
    assert "not called" in row.why


def test_a_model_that_looks_at_values_is_run_as_it_is_with_named_inputs():
    class Looks(Model):
        def forward(self, x, flags):
            return super().forward(x) if flags["on"].item() else x

    model = Looks()
    stem, mix = inspect(model, {"x": torch.zeros(1, 3, 4, 4), "flags": {"on": torch.tensor(True)}}).rows
    assert (stem.macs, mix.macs) == (STEM, MIX)
    assert not model.mix._forward_hooks
