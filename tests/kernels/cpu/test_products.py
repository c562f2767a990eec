"""Against fp64 with guard pages around all arrays, masks bit for bit, and without Python."""

import ctypes
import math
import mmap
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsedm.errors import InputError
from sparsedm.kernels.cpu import library, products, rules
from sparsedm.kernels.pattern import GROUPS, Pattern, memory_format
from tests.kernels.cpu.problems import close, mask_of, needs_library

HARNESS = Path(__file__).with_name("harness.c")
COMPUTE = {None: lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}


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


def a_pattern(rng):
    group = rng.choice(GROUPS)
    return Pattern(rng.randint(1, group - 1), group)


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
def test_attention_of_large_logits():
    qkv = torch.randn(1, 50, 3 * 2 * 32) * 12  # powers of 2 up to about 840: fp32 ends at 128
    q, k, v = qkv.unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2).flatten(2)
    close(products.attention(q, k, v), exact)


@needs_library
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("token", [0, 7, 36])
def test_nan_in_attention_reaches_what_it_reaches_in_torch(which, token):
    q, k, v = torch.randn(3, 2, 2, 37, 32)
    {"q": q, "k": k, "v": v}[which][1, 0, token, 5] = math.nan
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(products.attention(q, k, v), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


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
@pytest.mark.parametrize("few", [False, True])
def test_rows_of_every_operand_may_lie_apart(few):
    pattern, weight, scale = Pattern(2, 4), torch.randn(70, 32), torch.randn(1, 70)
    prepacked = products.prepack("few" if few else "linear", weight, mask_of(weight, pattern), pattern)
    x, skip, residual = torch.randn(37, 40)[:, 5:17], torch.randn(37, 30)[:, :20], torch.randn(37, 90)[:, 9:79]
    for scaled in (None, scale):
        apart, whole = (
            products.linear(a, prepacked, pattern, 70, skip=b, residual=c, scale=scaled, few=few)
            for a, b, c in ((x, skip, residual), (x.contiguous(), skip.contiguous(), residual.contiguous()))
        )
        assert torch.equal(apart, whole)


@needs_library
@pytest.mark.parametrize(("M", "N", "K"), [(333, 300, 128), (4000, 512, 512)])
def test_results_do_not_depend_on_the_number_of_threads(M, N, K):
    """The larger one takes so long that threads take turns even on one core."""
    pattern, weight, x = Pattern(2, 4), torch.randn(N, K), torch.randn(M, K)
    prepacked = products.prepack("linear", weight, mask_of(weight, pattern), pattern)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products.linear(x, prepacked, pattern, N)
        torch.set_num_threads(2)
        assert torch.equal(products.linear(x, prepacked, pattern, N), one)
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
@pytest.mark.parametrize(("N", "place"), [(61, 59), (64, 62), (70, 68), (61, 0), (61, 60)])
def test_infinity_and_nan_in_a_gradient_meet_the_weights_that_a_dense_product_shows(value, N, place):
    weight, dy = torch.randn(N, 16), torch.randn(5, N)
    weight[:, :4] *= mask_of(weight, Pattern(1, 4))[:, :4]
    weight[:, 5] = 0  # a column of zeros, and others of nothing but weights
    dy[:, place] = value
    dx, dense = products.masked_gradient(dy, weight), dy @ weight
    kept = weight[place] != 0
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
@pytest.mark.parametrize(("N", "K"), [(1, 40), (57, 40), (61, 40), (64, 40), (65, 16), (128, 300)])
def test_a_gradient_by_a_weight_without_zeros(N, K):
    weight = torch.randn(N, K)
    assert torch.equal(products.masked_gradient(torch.eye(N), weight), weight)


@needs_library
def test_a_weight_that_is_nan_makes_its_gradient_nan():
    weight = torch.randn(70, 24)
    weight[66, 9] = math.nan
    dx = products.masked_gradient(torch.randn(5, 70), weight)
    assert dx[:, 9].isnan().all()
    assert dx.isnan().sum() == 5


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_many_outputs_and_a_row_of_odd_width(layout):
    pattern, geometry = Pattern(2, 4), ((3, 3), (2, 2), (1, 1))
    weight, x = torch.randn(300, 8, 3, 3), torch.randn(2, 8, 5, 31).contiguous(memory_format=layout)
    mask = mask_of(weight, pattern)
    exact = F.conv2d(x.double(), (weight * mask).double(), stride=2, padding=1)
    close(products.conv2d(x, products.prepack("conv", weight, mask, pattern), pattern, 300, geometry), exact, layout)


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
    # in fp64, because torch's fp32 GELU of infinity is NaN on CPUs with AVX-512
    exact = COMPUTE[activation](values.double()).float()
    torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-8, equal_nan=True)


@needs_library
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_as_exact_as_their_polynomials_are_said_to_be(activation):
    pattern, weight = Pattern(1, 2), torch.tensor([[1.0, 0.0]])
    values = torch.linspace(-20, 20, 20_001)
    x = torch.stack((values, torch.zeros_like(values)), 1)
    y = products.linear(x, products.prepack("linear", weight, weight != 0, pattern), pattern, 1, activation=activation)
    torch.testing.assert_close(y[:, 0].double(), COMPUTE[activation](values.double()), rtol=4e-7, atol=2.5e-8)


@needs_library
def test_a_group_that_keeps_fewer_weights_is_filled_up_and_one_that_keeps_more_is_refused():
    pattern, weight, x = Pattern(2, 4), torch.randn(9, 8), torch.randn(30, 8)
    mask = mask_of(weight, pattern)
    mask[3, :4] = False
    y = products.linear(x, products.prepack("linear", weight, mask, pattern), pattern, 9)
    torch.testing.assert_close(y, F.linear(x, weight * mask))
    mask[3, 4] = mask[3, :4] = True
    mask[3, 5:] = False  # one more than its share
    for order in products.ORDERS:
        shape = (9, 8, 3, 3) if order == "halo" else (9, 8)
        wide = mask[..., None, None].expand(shape) if order == "halo" else mask
        with pytest.raises(InputError, match="keeps more than 2 of 4"):
            products.prepack(order, torch.randn(shape), wide, pattern, 16)
    with pytest.raises(InputError, match="keeps more than 2 of 4"):
        products.masked_linear(x, weight * mask, mask, pattern)


@needs_library
@pytest.mark.parametrize("order", ["linear", "conv"])
def test_a_group_may_keep_more_than_its_share_of_64_columns_and_zeros_fill_up_at_columns_that_exist(order):
    pattern, mask = Pattern(2, 4), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 8, 9, 10, 11]] = True
    values, offsets = products.prepack(order, torch.ones(1, 12), mask, pattern)
    assert values.tolist() == [[1, 1, 1, 1, 1, 0]]
    columns = (offsets[0] // (offsets[0, 1] // 8)).tolist()
    assert columns[:5] == [0, 8, 9, 10, 11]
    assert 0 < columns[5] < 8


@needs_library
def test_a_weight_that_is_nan_is_reported():
    for shape in ((5, 8), (5, 8, 3, 3)):
        weight = torch.randn(shape)
        weight[4, 7] = math.nan
        assert products.select_mask(weight, Pattern(2, 4))[2]
        assert not products.select_mask(weight.nan_to_num(math.inf), Pattern(2, 4))[2]
        assert not products.select_mask(weight.nan_to_num(), Pattern(2, 4))[2]


@needs_library
def test_a_masked_weight_has_the_bits_of_torchs():
    """A pruned weight is 0, of no sign."""
    for shape in ((5, 8), (5, 8, 3, 3), (40, 64)):
        weight = torch.randn(shape)
        masked, mask, _ = products.select_mask(weight, Pattern(2, 4))
        assert torch.equal(masked.view(torch.int32), torch.where(mask, weight, 0).view(torch.int32))
        assert mask.view(torch.uint8).max() == 1


@needs_library
def test_a_product_without_memory_for_its_tiles_says_so_and_the_next_one_computes():
    pattern, weight, x, image = Pattern(2, 4), torch.randn(8, 8), torch.randn(5, 8), torch.randn(1, 8, 4, 16)
    mask, y, huge = mask_of(weight, pattern), torch.empty(5, 8), 1 << 44
    address = products.POINTER(weight.data_ptr())
    for order in ("linear", "few"):
        call = products._linear_call(x, products.prepack(order, weight, mask, pattern), pattern, y)
        call.K1 = huge
        with pytest.raises(MemoryError, match="no memory for its tiles"):
            products._call(products.LINEAR[order == "few"], ctypes.byref(call))
    for name, rest in (("masked", (address, products.POINTER(mask.data_ptr()))), ("transposed", (address,))):
        call = products._linear_call(x, None, pattern, y)
        call.K1 = huge
        with pytest.raises(MemoryError, match="no memory for its tiles"):
            products._call(f"nm_linear_{name}", ctypes.byref(call), *rest)
    geometry, kernel = ((3, 3), (1, 1), (1, 1)), torch.randn(8, 8, 3, 3)
    for halo in (False, True):
        prepacked = products.prepack("halo" if halo else "conv", kernel, mask_of(kernel, pattern), pattern, 16)
        call = products._conv_call(
            image, prepacked, pattern, torch.empty(1, 8, 4, 16), geometry, torch.contiguous_format, None, None, None
        )
        call.out.N = huge
        with pytest.raises(MemoryError, match="no memory for its tiles"):
            products._call(products.CONV[halo], ctypes.byref(call))
    call = products._Attention(*[image.data_ptr()] * 4, 1, 1, 16, huge, 0, 0, 16)
    with pytest.raises(MemoryError, match="no memory for its tiles"):
        products._call("nm_attention", ctypes.byref(call))
    y = products.linear(x, products.prepack("linear", weight, mask, pattern), pattern, 8)
    torch.testing.assert_close(y, F.linear(x, weight * mask))


@needs_library
def test_the_rules_know_where_the_halo_way_serves():
    same = (3, 3), (1, 1), (1, 1)
    for width in range(1, 300):
        for group in GROUPS:
            serves = rules.halo_serves(*same, width, group, library.instruction_set())
            assert serves == (library.library().nm_halo_channels(width, group) > 0), (width, group)
    assert not rules.halo_serves((3, 3), (2, 2), (1, 1), 32, 4, "avx2")


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
