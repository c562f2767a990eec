"""Select, cast and pack: torch and the kernel (in Triton's interpreter) against the definition, bit for bit.

The kernel compares integers and moves bits, no arithmetic on weights, so that even bf16 is right in the interpreter.
"""

import gc

import pytest
import torch
import triton
import triton.language as tl

from emulator.sass import Build, compile_offline
from sparsedm.errors import InputError
from sparsedm.kernels import launch
from sparsedm.kernels import mask as mask_file
from sparsedm.kernels.cpu import library
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import GROUPS, Pattern, group_view, pack_bits, select_mask_ref, ungroup
from sparsedm.kernels.sparse24.format import pack

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["torch", "C", "kernel"])
def way(request, monkeypatch):
    if request.param == "C" and library.library() is None:
        pytest.skip("no C kernels")
    if request.param == "torch":
        monkeypatch.setenv("SPARSEDM_BACKEND", "torch")
    if request.param == "kernel":
        monkeypatch.setattr(mask_file, "uses_triton", lambda *tensors: True)
        monkeypatch.setattr(mask_file, "watched", lambda: True)  # else torch alone selects for a weight on a CPU
        # small blocks: the interpreter's sort is slow, and several programs should run
        monkeypatch.setattr(mask_file._tuner, "candidates", [{"BLOCK": 128, "num_warps": 1}])
    return request.param


def weights(*shape, dtype=torch.float32):
    """Few distinct values, so that there are ties, zeros and negative zeros."""
    weight = (4 * torch.rand(shape) - 2).round().to(dtype)
    weight.view(-1)[::5] = -0.0
    return weight


def masked_and_mask(weight, pattern, dtype=None):
    mask = ungroup(select_mask_ref(group_view(weight), pattern), weight.shape)
    return torch.where(mask, weight, 0).to(dtype or weight.dtype), mask


SHAPES = [
    (2, 32),  # one block
    (3, 96),  # several, the last half empty; several words of bits
    (5, 16),  # a group and a word of metadata only half there
    (2, 8, 3, 2),  # a convolution
]


CASES = [
    (p, s) for p in map(Pattern.parse, ("2:4", "1:2", "5:8", "3:16", "31:32")) for s in SHAPES if s[1] % p.group == 0
]


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_everything_at_once(way, pattern, shape):
    weight = weights(*shape)
    compressed = pattern == Pattern(2, 4) and len(shape) == 2
    masked, mask = masked_and_mask(weight, pattern)
    found = select_mask(weight, pattern, bits=True, compressed=compressed)
    assert torch.equal(found.masked, masked)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.bits, pack_bits(group_view(mask)))
    if compressed:
        values, metadata = pack(masked)
        assert torch.equal(found.values, values)
        assert torch.equal(found.metadata, metadata)
    else:
        assert found.values is found.metadata is None
    assert select_mask(weight, pattern, mask=False)[1:] == (None,) * 4


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.float16], ids=str)
def test_casts(way, source, target):
    weight = torch.randn(4, 32).to(source)
    out, chosen, *_ = select_mask(weight, Pattern(2, 4), target)
    masked, mask = masked_and_mask(weight, Pattern(2, 4), target)
    assert torch.equal(out, masked)
    assert torch.equal(chosen, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extreme", [float("inf"), -float("inf"), 3e38, 1e-45])
def test_extreme_magnitudes(way, extreme, dtype):
    weight = torch.tensor([[extreme, 1.0, extreme, 0.5], [-extreme, extreme, extreme, -extreme]]).repeat(1, 4).to(dtype)
    masked, mask = masked_and_mask(weight, Pattern(2, 4))
    out, chosen, *_ = select_mask(weight, Pattern(2, 4))
    assert torch.equal(chosen, mask)
    assert torch.equal(out, masked)


@triton.jit
def _select_both_ways(w_ptr, compared_ptr, sorted_ptr, SIZE: tl.constexpr):
    w = tl.load(w_ptr + tl.arange(0, SIZE))
    at = tl.arange(0, SIZE).reshape(SIZE // 4, 4)
    tl.store(compared_ptr + at, mask_file.keep_largest(w, 2, 4).to(tl.int8))
    tl.store(sorted_ptr + at, mask_file.keep_largest_by_sorting(w, 2, 4).to(tl.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_six_comparisons_select_what_sorting_selects(dtype):
    """Of random bits, NaN and infinities among them, and of few magnitudes, so that every order of ties is there."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    few = torch.cartesian_prod(*4 * [torch.tensor([-2.0, -0.0, 1, 2])]).to(dtype).view(bits).flatten()
    weight = torch.cat([few, torch.randint(limits.min, limits.max, (1024,), dtype=bits)]).view(dtype)
    compared, ordered = torch.empty(2, 2048, dtype=torch.int8)
    _select_both_ways[(1,)](weight, compared, ordered, 2048)
    assert torch.equal(compared, ordered)
    assert (compared.view(-1, 4).sum(1) == 2).all()


def test_any_strides(way):
    weight = weights(16, 48)
    for view in (weight[:, 8:40:2], weight.t()[8:40], weight[::3, 4:20]):
        out, chosen, *_ = select_mask(view, Pattern(2, 4))
        masked, mask = masked_and_mask(view, Pattern(2, 4))
        assert torch.equal(out, masked)
        assert torch.equal(chosen, mask)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "taps are no single axis"])
def test_a_convolution_keeps_its_memory_format(way, layout):
    weight = weights(3, 8, 2, 3)
    if layout == "NHWC":
        weight = weight.to(memory_format=torch.channels_last)
    elif layout != "NCHW":
        weight = weight.transpose(2, 3)
    out, chosen, *_ = select_mask(weight, Pattern(2, 4))
    masked, mask = masked_and_mask(weight, Pattern(2, 4))
    assert torch.equal(out, masked)
    assert torch.equal(chosen, mask)
    if layout != "taps are no single axis":
        assert out.stride() == chosen.stride() == weight.stride()


def test_an_empty_weight_has_an_empty_mask(way):
    out, chosen, *_ = select_mask(torch.empty(0, 8), Pattern(2, 4))
    assert out.shape == chosen.shape == (0, 8)


def test_the_result_is_detached(way):
    out, chosen, *_ = select_mask(torch.randn(2, 8, requires_grad=True), Pattern(2, 4))
    assert not out.requires_grad
    assert not chosen.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(4, 6), r"fc1: the input axis of shape \(4, 6\) must be a positive multiple of 4"),
        (torch.ones(4, 0), r"fc1: the input axis of shape \(4, 0\) must be a positive multiple of 4"),
        (torch.ones(8, 3, 3, 3), r"fc1: the input axis of shape \(8, 3, 3, 3\) must be a positive multiple of 4"),
        (torch.ones(8), r"fc1: a masked weight has 2 .* dimensions, not shape \(8,\)"),
        (torch.ones(4, 8, dtype=torch.int32), "fc1: masked weights must be fp64, .*, not torch.int32"),
        (torch.ones(4, 8).to(torch.float8_e4m3fn), "fc1: masked weights must be fp64, .*, not torch.float8_e4m3fn"),
        (torch.tensor([[1.0, float("nan"), 0.0, float("nan")]]), "fc1: .* of its weights are NaN"),
        (torch.tensor([[float("nan"), 1.0, 2.0, 3.0], [0.0] * 4]), "fc1: .* of its weights are NaN"),
        (torch.full((2, 4), -float("nan")), "fc1: .* of its weights are NaN"),
        (torch.full((2, 4), float("nan"), dtype=torch.bfloat16), "fc1: .* of its weights are NaN"),
    ],
)
def test_refusals(way, weight, message):
    for options in ({}, {"mask": False, "bits": True}):
        with pytest.raises(InputError, match=message):
            select_mask(weight, Pattern(2, 4), name="fc1", **options)
    select_mask(torch.ones(2, 4), Pattern(2, 4), name="fc1")  # and the next weight of that name is not blamed


def test_a_masked_weight_of_whole_numbers_is_refused(way):
    with pytest.raises(InputError, match=r"fc1: a masked weight is floating point, not torch.int32"):
        select_mask(torch.ones(2, 4), Pattern(2, 4), torch.int32, name="fc1")


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
def test_nan_that_a_kernel_in_flight_reports_blames_no_healthy_weight(way, monkeypatch):
    """On a GPU the flags are written later: here when somebody waits, or by hand."""
    in_flight = []

    def arrive(*device):
        while in_flight:
            in_flight.pop().fill_(1)

    def launched():
        in_flight.extend(mask_file._nan_flags.values())

    monkeypatch.setattr(mask_file, "_nan_flags", {})
    monkeypatch.setattr(mask_file, "_wait", arrive)
    weight, other = torch.ones(2, 32), torch.ones(2, 32)
    select_mask(weight, Pattern(2, 4))
    launched()
    with pytest.raises(InputError, match="of its weights are NaN"):
        select_mask(weight.fill_(float("nan")), Pattern(2, 4))
    arrive()
    select_mask(weight.fill_(1), Pattern(2, 4))
    launched(), arrive()
    select_mask(other, Pattern(2, 4))
    with pytest.raises(InputError, match="of its weights are NaN"):
        select_mask(weight, Pattern(2, 4))
    launched()
    del weight, other
    gc.collect()  # the errors hold them
    for _ in range(2):
        with pytest.raises(InputError, match="of its weights are NaN"):  # of those that are gone
            select_mask(torch.ones(2, 32), Pattern(2, 4))
    for _ in range(3):
        select_mask(torch.ones(2, 32), Pattern(2, 4))
        gc.collect()  # the interpreter of Triton 3.9 holds them, too
    assert len(mask_file._nan_flags) < 3, "a flag without a weight serves the next one"


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
def test_a_compressed_weight_waits_for_its_nan(way, monkeypatch):
    monkeypatch.setattr(mask_file, "_nan_flags", {})
    monkeypatch.setattr(mask_file, "_wait", lambda device: next(iter(mask_file._nan_flags.values())).fill_(1))
    select_mask(weights(2, 32), Pattern(2, 4), name="fc1")
    mask_file._nan_flags.clear()
    with pytest.raises(InputError, match="fc1: some of its weights are NaN"):
        select_mask(weights(2, 32), Pattern(2, 4), name="fc1", compressed=True)


def test_the_kernel_is_launched_on_the_weights_device(current_device, monkeypatch):
    launched_on = []
    monkeypatch.setattr(mask_file, "uses_triton", lambda *tensors: True)
    monkeypatch.setattr(mask_file, "_launch", lambda *arguments: launched_on.extend(current_device))
    weight = torch.randn(2, 8)
    mask_file._select_mask(weight, 2, 4, torch.float32, False, True, False, "w")
    assert [tensor.data_ptr() for tensor in launched_on] == [weight.data_ptr()]


def test_where_the_kernel_does_not_run_torch_selects_and_masked_training_tries_no_other(monkeypatch, caplog):
    """As where Triton finds no C compiler. Nothing else of masked training is tried there."""

    def launched(*arguments):
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    calls = []
    monkeypatch.setattr(launch, "broken", {})
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(mask_file, "_launch", launched)
    weight, arguments = weights(4, 32), (2, 4, torch.float32, True, True, False, "w")
    assert launch.uses_triton(weight)
    for _ in range(2):
        found = mask_file._select_mask(weight, *arguments)
        for tensor, expected in zip(found, (*masked_and_mask(weight, Pattern(2, 4)), pack_bits(found[1]))):
            assert torch.equal(tensor, expected)
    assert len(calls) == 1
    assert not launch.uses_triton(weight)
    assert caplog.text.count("triton does not run here: RuntimeError: Failed to find C compiler") == 1


def test_refusals_of_packing():
    for shape, pattern in (((4, 64), Pattern(1, 4)), ((4, 8, 3, 3), Pattern(2, 4))):
        with pytest.raises(InputError, match=f"fc1: only a 2:4 Linear has values and metadata, not {pattern}"):
            select_mask(torch.ones(shape), pattern, name="fc1", compressed=True)


def test_it_is_an_operator_without_graph_breaks():
    weight = torch.randn(8, 16)
    for arguments in ((2, 4, torch.float16, True, False, False), (2, 4, torch.float32, False, True, True)):
        torch.library.opcheck(torch.ops.sparsedm.select_mask.default, (weight, *arguments, "w"))
    compiled = torch.compile(lambda w: select_mask(w, Pattern(2, 4))[:2], fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(weight), select_mask(weight, Pattern(2, 4))):
        assert torch.equal(out, expected)


POINTERS = {
    "masked_ptr": "*bf16", "mask_ptr": "*i8", "bits_ptr": "*i8", "values_ptr": "*bf16", "metadata_ptr": "*i8",
    "nan_ptr": "*i32",
}  # fmt: skip


def build(weight, keep, group, *absent, capability=90):
    """A Linear's weight with K and strides divisible by 16, the outputs named in `absent` not wanted."""
    sizes = {name: "i32" for name in ("ROWS", "K", "stride_wo", "stride_mo")}
    given = {"w_ptr": weight, **{k: v for k, v in POINTERS.items() if k not in absent}}
    ones = dict.fromkeys(["TAPS", "stride_wt", "stride_wk", "stride_mt", "stride_mk"], 1)
    blocks = {"KEEP": keep, "GROUP": group, "BLOCK_R": mask_file.CONFIGS[0]["BLOCK"] // 128, "BLOCK_K": 128}
    return Build(
        "sparsedm.kernels.mask:_select_mask_kernel",
        given | sizes,
        ones | blocks | dict.fromkeys(absent),
        {"num_warps": mask_file.CONFIGS[0]["num_warps"]},
        tuple(given) + ("K", "stride_wo", "stride_mo"),
        capability,
    )


def lean(builds):
    for compiled in compile_offline(builds):
        assert compiled.spills == compiled.count("LDL") == compiled.count("STL") == 0
        assert compiled.count("LDG.E.128") > 0
        assert compiled.count("STG.E.128") > 0
        yield compiled


COMPRESSED = ("values_ptr", "metadata_ptr")


def test_it_compiles_to_wide_loads_and_stores_without_spills_and_to_few_instructions():
    """Memory stays the bound: at 34 instructions per weight (with packing 41) an H200 would issue them, at 132 x 128
    lanes and 1.6 GHz, as long as it moves the 6.1 (7.2) bytes at 4.8 TB/s."""
    ways = [("mask_ptr", *COMPRESSED), ("mask_ptr",)]
    *twos, _ = lean([*(build("*fp32", 2, 4, *way) for way in ways), build("*bf16", 15, 16, *ways[0], capability=80)])
    for compiled, most in zip(twos, (22, 30)):
        assert compiled.count("") <= most * mask_file.CONFIGS[0]["BLOCK"] / (32 * mask_file.CONFIGS[0]["num_warps"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_pattern_size_compiles_without_spills(capability):
    ways = [("bits_ptr", *COMPRESSED), ("mask_ptr", *COMPRESSED)]
    sizes = [(weight, group, way) for weight in ("*fp32", "*bf16") for group in GROUPS for way in ways]
    assert list(lean([build(weight, group - 1, group, *way, capability=capability) for weight, group, way in sizes]))


@pytest.fixture
def untuned(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_AUTOTUNE", "off")
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path))


def assert_as_on_the_cpu(weight, pattern, target):
    here = select_mask(weight, pattern, target, bits=True)
    there = select_mask(weight.cuda(), pattern, target, bits=True)
    for a, b in zip(here[:3], there[:3]):
        assert torch.equal(a, b.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(7, 8), Pattern(31, 32)], ids=str)
def test_on_a_gpu_as_on_the_cpu(untuned, pattern, dtype):
    for weight in (weights(257, 1152, dtype=dtype), torch.randn(64, 96, 3, 3).to(dtype)):
        for target in DTYPES:
            assert_as_on_the_cpu(weight, pattern, target)


@pytest.mark.gpu
@pytest.mark.parametrize("config", mask_file.CONFIGS, ids=str)
def test_on_a_gpu_in_every_configuration(untuned, monkeypatch, config):
    monkeypatch.setattr(mask_file._tuner, "candidates", [config])
    monkeypatch.setattr(mask_file._tuner, "_known", {})
    assert_as_on_the_cpu(weights(1000, 96), Pattern(2, 4), torch.bfloat16)


@pytest.mark.gpu
def test_on_a_gpu_a_nan_is_seen_without_waiting_at_the_latest_after_the_next_synchronisation(untuned):
    weight = torch.full((4, 64), float("nan"), device="cuda")

    def select_twice():
        select_mask(weight, Pattern(2, 4), name="fc1")
        torch.cuda.synchronize()
        select_mask(weight, Pattern(2, 4), name="fc1")

    with pytest.raises(InputError, match=r"fc1: .* of its weights are NaN"):
        select_twice()
