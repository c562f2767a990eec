"""N:M patterns: keep the `keep` largest magnitudes of every `group` consecutive weights along the input axis.

mask[n, k] = 1 if fewer than `keep` weights of its group come before it, where weight j comes before weight i when
|w_j| > |w_i|, or |w_j| = |w_i| and j < i (ties go to the lower index, so -0.0 is 0.0). Sources: NVIDIA ASP (arXiv
2104.08378), SR-STE (arXiv 2102.04010). Weights that hold NaN have no magnitude order and are refused by the callers.
"""

import functools
import re
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F

from sparsedm.errors import InputError

GROUPS = (2, 4, 8, 16, 32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights


@dataclass(frozen=True)
class Pattern:
    """Keep `keep` of every `group` weights along the input axis: `Pattern(2, 4)` is 2:4, a density of one half.

    group is 2, 4, 8, 16 or 32; keep is at least 1 and less than group. Raises: InputError for other numbers.
    """

    keep: int
    group: int

    def __post_init__(self):
        for name in ("keep", "group"):
            number = getattr(self, name)
            if not isinstance(number, Integral) or isinstance(number, bool):
                raise InputError(f"pattern {self}: {name}={number!r} must be a whole number")
            object.__setattr__(self, name, int(number))
        if self.group not in GROUPS:
            raise InputError(f"pattern {self}: the group size must be one of {', '.join(map(str, GROUPS))}")
        if not 1 <= self.keep < self.group:
            raise InputError(f"pattern {self}: must keep at least 1 and fewer than {self.group} of every {self.group}")

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def density(self) -> float:
        return self.keep / self.group

    @classmethod
    def parse(cls, text: "str | Pattern | None") -> "Pattern | None":
        """'2:4' -> Pattern(2, 4), 'dense' -> None. A Pattern or None is returned as it is.

        Raises: InputError for anything else.
        """
        if text is None or isinstance(text, cls):
            return text
        if text == "dense":
            return None
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text) if isinstance(text, str) else None
        if not match:
            raise InputError(f"unknown pattern {text!r}: write 'dense' or N:M, for example 2:4")
        return cls(int(match[1]), int(match[2]))


def group_view(weight):
    """The weight as (rows, K) whose last axis is the input axis along which groups run.

    A Linear's (out, in) is returned unchanged; a Conv2d's (out, in, kh, kw) as (out * kh * kw, in), so that a group
    never spans kernel positions or filters. The result shares memory if torch allows it.
    """
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(0, 2)


def ungroup(rows, shape):
    """Inverse of `group_view`: rows (rows, K) -> a tensor of `shape` (a Linear's or a Conv2d's)."""
    if len(shape) == 2:
        return rows
    out, cin, kh, kw = shape
    return rows.view(out, kh, kw, cin).permute(0, 3, 1, 2)


def select_mask_ref(weight, pattern):
    """weight (rows, K) -> bool mask (rows, K): the definition above, by counting for each weight those before it.

    Costs group^2 / 2 comparisons per group but no sort.
    """
    groups = weight.detach().abs().unflatten(-1, (-1, pattern.group))
    before = torch.zeros(groups.shape, dtype=torch.uint8, device=weight.device)
    for j in range(pattern.group):
        other = groups[..., j : j + 1]
        before[..., :j] += other > groups[..., :j]
        before[..., j + 1 :] += other >= groups[..., j + 1 :]
    return (before < pattern.keep).flatten(-2)


def select_of_fours(weight, keep):
    """The same mask as `select_mask_ref` for groups of four, several times faster on a CPU; the weights hold no NaN.

    weight (rows, K) -> bool mask (rows, K). Every weight is compared with the next three of its group. The results are
    bytes; the four bytes of a group are added as one integer.
    """
    magnitude = weight.detach().abs().reshape(-1)
    scratch = torch.empty_like(magnitude)  # a comparison into floats, and these to bool, is quicker than into bool
    met = []
    for distance in (1, 2, 3):  # byte i: whether weight i comes before weight i + distance
        torch.ge(magnitude[:-distance], magnitude[distance:], out=scratch[:-distance])
        met.append(scratch.bool().view(torch.int32))
    first, second, third = met  # the lowest byte is weight 0 of the group: all systems torch runs on are little-endian
    first &= 0x010101  # the weights that have such a neighbour in their own group
    second &= 0x0101
    third &= 0x01
    # one win for weight i; one less for weight i + distance than the 0, 1, 2, 3 wins it would have if it lost none
    wins = first.mul_(1 - (1 << 8)).add_(second, alpha=1 - (1 << 16)).add_(third, alpha=1 - (1 << 24))
    # a byte reaches its highest bit from 4 - keep wins on: so many of the others come after it
    wins += 0x03020100 + 0x01010101 * (128 - 4 + keep) - (1 << 32)
    return wins.bitwise_right_shift_(7).bitwise_and_(0x01010101).view(torch.bool).view(weight.shape)


def select_untied(weight, pattern):
    """The same mask as `select_mask_ref`, several times faster on a CPU, or None if this method cannot decide.

    weight (rows, K) -> bool mask (rows, K); None if weights anywhere tie for the last place, or are NaN.
    A network of minima and maxima finds the keep-th largest of every group. One operation compares two places of all
    groups.
    """
    group = pattern.group
    places = weight.detach().abs().reshape(-1, group).t()
    if group > 4:
        places = places.contiguous()  # a stride of more than 16 bytes costs more than the copy
    places = places.unbind()
    ranked = list(places)
    for i, j, keeps_smaller, keeps_larger in _selection(group, group - pattern.keep):
        low, high = ranked[i], ranked[j]
        if keeps_smaller:
            ranked[i] = torch.minimum(low, high)
        if keeps_larger:
            ranked[j] = torch.maximum(low, high)
    last_kept = ranked[group - pattern.keep]  # NaN if any of its group is, and then nothing is smaller
    dropped = torch.empty(len(last_kept), group, dtype=torch.bool, device=weight.device)
    for place, out in zip(places, dropped.unbind(1)):
        torch.lt(place, last_kept, out=out)
    if dropped.count_nonzero() != len(dropped) * (group - pattern.keep):  # a tie drops fewer, and nothing drops more
        return None
    return dropped.logical_not_().view(weight.shape)


@functools.cache
def _selection(size, rank):
    """Steps that put the element of `rank` (0: smallest) of `size`, a power of two, in its place.

    A step (i, j, a, b) puts the smaller of places i < j into i if a, and the larger into j if b. These are the steps of
    Batcher's odd-even merge sort (Sorting networks and their applications, 1968) on which that place depends.
    """
    steps = []
    for block in (1 << p for p in range(size.bit_length() - 1)):  # merges sorted blocks into blocks of twice the size
        for distance in (block >> p for p in range(block.bit_length())):
            for i in range(distance % block, size - distance):
                paired = (i - distance % block) // distance % 2 == 0
                if paired and i // (2 * block) == (i + distance) // (2 * block):
                    steps.append((i, i + distance))
    needed, kept = {rank}, []
    for i, j in reversed(steps):
        if i in needed or j in needed:
            kept.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return kept[::-1]


def check_weight(weight, pattern, name="weight"):
    """Raise InputError, naming the layer, unless `weight` is a Linear's or Conv2d's and `pattern` fits it."""
    shape = tuple(weight.shape)
    if weight.dtype not in FLOATS:
        raise InputError(f"{name}: masked weights must be fp64, fp32, bf16 or fp16, not {weight.dtype}")
    if weight.dim() not in (2, 4):
        raise InputError(f"{name}: a masked weight has 2 (Linear) or 4 (Conv2d) dimensions, not shape {shape}")
    if shape[1] == 0 or shape[1] % pattern.group:
        raise InputError(f"{name}: the input axis of shape {shape} must be a positive multiple of {pattern.group}")


def holds(weight, pattern):
    """True if no group of weight (rows, K) has more than `keep` non-zeros."""
    return bool(((weight != 0).unflatten(-1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())


def pack_bits(mask):
    """bool (rows, K) -> int32 (rows, ceil(K / 32)): bit k % 32 of word k // 32 is entry k; bits beyond K are 0."""
    lanes = F.pad(mask, (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    return (lanes << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)


def unpack_bits(bits, columns):
    """The inverse of `pack_bits`: int32 (rows, words) -> bool (rows, columns)."""
    return (bits[..., None] >> torch.arange(32, device=bits.device) & 1).bool().flatten(1)[:, :columns]


def memory_format(weight):
    """The memory format of a mask or masked weight: channels_last if the weight has it, else contiguous."""
    nhwc = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc and not weight.is_contiguous() else torch.contiguous_format
