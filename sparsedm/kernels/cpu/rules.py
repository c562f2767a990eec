"""When to call the C kernels: arithmetic, never a clock, so that resumed training stays bit-exact.

The constants were fitted to measurements with one thread: AVX-512 on a Zen 5 (a prototype of these kernels) and, of
linear layers and attention, on a Xeon; AVX2 on a busy Zen 1. NEON was never timed; it gets the constants of AVX-512. A
change of any rule changes RULE_VERSION.
"""

import functools
from pathlib import Path

import torch

from sparsedm.kernels.cpu import library
from sparsedm.kernels.launch import forced_backend
from sparsedm.kernels.pattern import memory_format
from sparsedm.kernels.tracing import watched

RULE_VERSION = 5
SMALLEST = 1 << 20  # multiply-adds of the dense product under which the call costs more than it saves
OVERHEAD = 1.5e5  # multiply-adds of a dense product in the time that a call costs more than one of the dense product
XEON = "avx512 of Intel"  # where torch's dense product and attention are quicker, beside ours, than on AMD's CPUs
LANES = {"avx512": 16, "avx2": 8, "neon": 4}
# time over that of the best dense product, of whole vectors of rows: slope * density + offset, + one more part for the
# rows of x, which are transposed, over N, and one for the rows of y, over K. The checksum of the compressed weight
# is not in it: a call of the dense product takes one, too
COST = {"avx512": (1.14, 0.1, 0, 0), XEON: (1.28, 0.17, 0, 0), "avx2": (1.03, 0.05, 7, 13), "neon": (1.14, 0.1, 0, 0)}
# rows of x whose dense product takes as long as prepacking the weight, which masked training does in every step; of a
# convolution twice as many, and once more where the weight is not in channels_last
PREPACKING = {"avx512": 60, XEON: 80, "avx2": 40, "neon": 60}
# the same for the transposed weight of a gradient, whose rows have differing lengths, filled up to fours
TRANSPOSING = {"avx512": 75, XEON: 200, "avx2": 50, "neon": 75}
CONV_SLOPE = {"avx512": 1.14, "avx2": 1.1, "neon": 1.14}
NCHW = 0.15  # what the general convolution costs more there, of the time of the dense one
# up to so many: above, torch's is as quick or, with AVX2 at 256, 1.2 times as quick
ATTENTION_TOKENS = {"avx512": 1 << 20, XEON: 128, "avx2": 64, "neon": 0}


def linear_cost(M, N, K, keep, group, instructions):
    """(time relative to the best dense product, "linear" or "few") of `products.linear` for (M, K) x (K, N).

    keep, group: of the pattern. instructions: as `library.instruction_set` gives them.
    """
    if not M:
        return 2.0, "linear"
    tile, few = _tile(M, N, K, keep / group, instructions), _few(M, keep / group, group, instructions)
    cost, order = (few, "few") if few < tile else (tile, "linear")
    return cost + OVERHEAD / max(M * N * K, 1), order


def dense_cost(M, N, K, instructions):
    """Time of `F.linear` relative to the best dense product: with AVX2 on AMD's CPUs oneDNN is faster than MKL."""
    if instructions != "avx2" or not _is_amd():
        return 1.0
    return 1.25 if 1 < M <= 32 else 1.04 if M * N * K >= 1.2e8 else 1.0


def training_serves(x, weight, bias, pattern):
    """Whether the forward product of masked training, x (..., K) by weight (N, K), takes `products.masked_linear`.

    It does not if the shapes do not fit: torch then raises its own error.
    """
    (N, K), M = weight.shape, x.shape[:-1].numel()
    if not M or not x.dim() or x.shape[-1] != K or (bias is not None and bias.shape != (N,)):
        return False
    if not serves(x, weight, bias) or forced_backend() in ("torch", "dense"):
        return False
    instructions = library.instruction_set()
    cost, order = linear_cost(M, N, K, pattern.keep, pattern.group, instructions)
    return order == "linear" and cost + PREPACKING[_maker(instructions)] / M < 1


def gradient_pays(M, N, K, pattern):
    """Whether the gradient of x in masked training, dy (M, N) by weight (N, K), takes `products.masked_gradient`."""
    instructions = library.instruction_set()
    cost = _tile(M, K, N, min(1.0, pattern.density + 1.5 / 64), instructions) + OVERHEAD / (M * N * K)
    return cost + TRANSPOSING[_maker(instructions)] / M < 1


def conv_training_serves(x, weight, bias, pattern, stride, padding, dilation):
    """Whether the forward product of a masked convolution in training takes `products.conv2d`.

    x: (B, C, H, W). weight: (N, C, kh, kw). stride, dilation: pairs. padding: a pair or a word, as torch takes them.
    """
    if x.dim() != 4 or isinstance(padding, str) or dilation != (1, 1) or stride[0] != stride[1]:
        return False
    (B, C, H, W), (N, channels, *kernel_size) = x.shape, weight.shape
    size = [(n + 2 * p - k) // stride[0] + 1 for n, p, k in zip((H, W), padding, kernel_size)]
    if channels != C or B < 1 or min(size) < 1 or (bias is not None and bias.shape != (N,)):
        return False
    if not serves(x, weight, bias) or forced_backend() in ("torch", "dense"):
        return False
    instructions, pixels, planes = library.instruction_set(), size[0] * size[1], torch.contiguous_format
    sizes = N, kernel_size[0] * kernel_size[1] * C, pattern.keep, pattern.group
    prepacking = PREPACKING[_maker(instructions)] * (3 if memory_format(weight) == planes else 2)
    cost = conv_cost((B, pixels), *sizes, instructions) + prepacking / (B * pixels)
    if memory_format(x) == memory_format(weight) == planes:
        cost += 0 if halo_serves(kernel_size, stride, padding, W, pattern.group, instructions) else NCHW
    return cost < 1


def _tile(M, N, K, density, instructions):
    """Relative time of the kernel whose lanes are rows of x: vectors are padded, and one alone waits for its loads."""
    (slope, offset, over_n, over_k), lanes = COST[_maker(instructions)], LANES[instructions]
    vectors, cost = -(-M // lanes), slope * density + offset + over_n / max(N, 1) + over_k / max(K, 1)
    return cost * vectors * lanes / M * (1.4 if vectors == 1 else 1)


def _few(M, density, group, instructions):
    """Relative time of the kernel whose lanes are outputs."""
    if group > LANES[instructions]:  # gathers
        return 9.5 * density if LANES[instructions] // 8 >= M else 9
    if instructions == "avx512":
        return (0.84 + 0.05 * M) * density if M <= 16 else 9
    return (1.15 + 0.15 * M) * density if LANES[instructions] // 2 >= M else 9


def conv_cost(pixels, N, K, keep, group, instructions):
    """Time relative to the best dense convolution, in NHWC.

    pixels: (images, H' W'). N: output channels. K: kh kw C.
    """
    lanes = LANES[instructions]
    vectors = pixels[0] * -(-pixels[1] // lanes)
    if vectors * lanes * N * K < SMALLEST or vectors < (4 if instructions == "avx512" else 2):
        return 2.0
    return CONV_SLOPE[instructions] * keep / group + 0.06 + 9 / N


def halo_serves(kernel_size, stride, padding, width, group, instructions):
    """Whether a convolution can use the faster halo kernel: 3 x 3, stride 1, y as large as x.

    The same arithmetic as `nm_halo_channels` in C, so that a request can be decided for another CPU's instructions.
    """
    if (*kernel_size, *stride, *padding) != (3, 3, 1, 1, 1, 1):
        return False
    lanes = LANES[instructions]
    vectors, room = (8, 40960) if lanes == 16 else (12, 32768)
    per = width // lanes
    if width % lanes or not 1 <= per <= vectors:
        return False
    return min(32, room // (12 * lanes * (vectors // per + 2) * per)) >= group


def onednn_serves(x, weight):
    """Whether oneDNN's product of x (..., K) and weight (N, K), which it reorders at each call, beats `F.linear`.

    `F.linear` calls MKL, which leaves the AVX-512 of AMD's CPUs unused: 2.3 times slower from 257 rows on.
    """
    if torch.compiler.is_compiling() or not _mkl_is_slow() or forced_backend() in ("torch", "dense"):
        return False
    M = x.shape[:-1].numel()
    return M >= 128 and M * weight.numel() >= SMALLEST and _plain(x, weight)


@functools.cache
def _mkl_is_slow():
    if library.instruction_set() != "avx512" or not torch.backends.mkldnn.is_available():
        return False
    return _is_amd() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _maker(instructions):
    """The key of constants that depend on who made the CPU."""
    return XEON if instructions == "avx512" and not _is_amd() else instructions


@functools.cache
def _is_amd():
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def version():
    """The facts that resumed training must share to be bit-exact: the rules, and the kernels that run."""
    instructions, _ = library.serving()
    return f"rules {RULE_VERSION}, {forced_backend() or _maker(instructions) or 'no C kernels'}"


def bf16_instructions():
    """The names of this CPU's instructions for bf16 products; None from an older torch, which does not say."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return sorted(name for name, there in has.items() if there and name.endswith("bf16")) if has else None


def attention_serves(q):
    """Whether `products.attention` is called for q (B, H, L, D)."""
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return False
    (B, H, L, D), instructions = q.shape, library.instruction_set()
    if instructions is None or L < 16 or ATTENTION_TOKENS[_maker(instructions)] < L or B * H * L * L * D < SMALLEST:
        return False
    return serves(q) and D % LANES[instructions] == 0


def serves(*tensors):
    """Whether the kernels can be called with these tensors: fp32 on a CPU, of no subclass, in eager code; and there is
    a library."""
    return _plain(*tensors) and library.library() is not None


def _plain(*tensors):
    if watched() or torch.is_autocast_enabled("cpu"):
        return False
    for t in tensors:
        if t is not None and (
            type(t) not in (torch.Tensor, torch.nn.Parameter)  # a wrapper of tensors has no address
            or torch._C._functorch.is_legacy_batchedtensor(t)  # nor has a batch of gradients
            or not t.is_cpu
            or t.dtype is not torch.float32
            or t.layout is not torch.strided
            or t.is_neg()
            or t._is_zerotensor()
        ):
            return False
    return True
