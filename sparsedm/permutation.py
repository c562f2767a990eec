"""Reorder hidden channels so that N:M pruning keeps more of the weights. The network computes the same function.

A hidden channel can have any index, as long as the layer that writes it and the layer that reads it agree. The rows of
the writer and the columns of the reader are permuted together, once, offline; inference costs nothing extra. The links:

    mlp         fc1 -> fc2, and diffusers' ff.net.0.proj -> ff.net.2 (also gated)
    attention   the values -> the output projection, within each head

They are known in blocks of our models, of diffusers and of timm's ViT, if no other weights stand between the two.

Only the reader keeps more, because groups run along inputs. The search is the smallest form of Pool and Yu, "Channel
Permutations for N:M Sparsity" (NeurIPS 2021): draw pairs of groups at random, and divide their 2M channels between the
two groups in the best way. No step keeps less.
"""

import collections
import itertools
import re
from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from sparsedm.compressed import Compressed
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import Pattern
from sparsedm.sparsity import module_of

LARGEST_GROUP = 4  # two groups of 4 have 35 ways to share their channels, two of 8 already 6435


class Gain(NamedTuple):
    """The share of sum |w| that the pattern keeps in one layer, before and after."""

    before: float
    after: float


class _Link(NamedTuple):
    """Channels from one layer to another. rows: their places in the maker's output, once or (gated) twice, each
    (channels,). heads: how many parts of equal size may not mix."""

    maker: nn.Linear
    reader: nn.Linear
    rows: tuple
    heads: int


@torch.no_grad()
def permute_channels(
    model: nn.Module, pattern: str | Pattern = "2:4", *, rounds: int = 200, seed: int = 0, progress: bool = False
) -> dict[str, Gain]:
    """Permute the hidden channels of `model` in place, before `sparsify`. Returns {reader's name: Gain}.

    The output changes by rounding only. pattern: N:M with M up to 4. rounds: search rounds; in each round every channel
    may move once.
    Raises: InputError if the model has no known link or no weights, or is masked or compressed; for M above 4.
    """
    model, pattern = module_of(model), Pattern.parse(pattern)
    if pattern is None or pattern.group > LARGEST_GROUP:
        found = "dense" if pattern is None else pattern
        raise InputError(f"channels are permuted for groups of up to {LARGEST_GROUP}, but the pattern is {found}")
    for name, number, least in (("rounds", rounds, 1), ("seed", seed, 0)):
        if not isinstance(number, Integral) or not least <= number < 2**63:
            raise InputError(f"{name}={number!r}: must be a whole number of at least {least}")
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise InputError("the model is compressed, and its masks cannot move: permute channels before that")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("the model is on the meta device and has no weights to order channels by")
    links = {name: link for name, link in _links(model) if (len(link.rows[0]) // link.heads) % pattern.group == 0}
    if not links:
        raise InputError(f"{type(model).__name__} has no pair of layers whose channels are known to be exchangeable")
    masked = [name for name, link in links.items() if getattr(link.reader, "pattern", None) is not None]
    if masked:
        raise InputError(f"{masked[0]} is masked, and would get another mask: permute channels before sparsify")
    generator = torch.Generator().manual_seed(seed)
    gains = {}
    for name, link in tqdm(links.items(), desc="permute", disable=None if progress else True):
        weight = link.reader.weight
        order = search(weight, pattern, link.heads, rounds, generator)
        gains[name] = Gain(kept(weight, pattern), kept(weight[:, order], pattern))
        weight.copy_(weight[:, order])
        for rows in link.rows:
            for parameter in (link.maker.weight, link.maker.bias, getattr(link.maker, "mask", None)):
                if parameter is not None:
                    parameter[rows] = parameter[rows[order]]
    return gains


def kept(weight, pattern):
    """The share of sum |weight| (N, K) that `pattern` keeps: 1 for a weight that already has it, 1 for zeros."""
    magnitude = weight.detach().abs().double()
    total = magnitude.sum().item()
    return magnitude.view(len(weight), -1, pattern.group).topk(pattern.keep, -1).values.sum().item() / (total or 1)


def search(weight, pattern, heads, rounds, generator):
    """(K,) int64: the best order found for the columns of weight (N, K). Heads do not mix."""
    M, columns = pattern.group, weight.shape[1]
    magnitude = weight.detach().float().abs().t().contiguous()  # (K, N): channels are rows
    order = torch.arange(columns, device=weight.device)
    groups = columns // heads // M  # of each head
    for _ in range(rounds if groups > 1 else 0):
        drawn = torch.stack([torch.randperm(groups, generator=generator, device="cpu") for _ in range(heads)])
        drawn = drawn[:, : groups // 2 * 2] + groups * torch.arange(heads, device="cpu")[:, None]  # an odd group waits
        drawn = drawn.view(-1, 2).to(weight.device)
        pairs = order.view(-1, M)[drawn].flatten(1)  # the 2M channels of each pair of groups
        channels = magnitude[pairs].unbind(1)  # 2M of (pairs, N)
        best, most = pairs, None
        for way in _ways(M):
            halves = [channels[c] for c in way[:M]], [channels[c] for c in way[M:]]
            keeps = sum(_top(half, pattern.keep).sum(1) for half in halves)
            if most is None:  # the current order comes first
                most = keeps
                continue
            better = keeps > most * (1 + 1e-6)  # rounding must not move channels
            best, most = torch.where(better[:, None], pairs[:, way], best), torch.where(better, keeps, most)
        order.view(-1, M)[drawn] = best.view(-1, 2, M)
    return order


def _ways(M):
    """All ways to divide 2M channels between two groups of M: lists of the 2M numbers, the current order first."""
    halves = [(0, *rest) for rest in itertools.combinations(range(1, 2 * M), M - 1)]
    return [[*half, *(c for c in range(2 * M) if c not in half)] for half in halves]


def _top(group, keep):
    """The sum of the `keep` largest of 2 to 4 tensors, element by element, without sorting."""
    if keep == 1:
        return torch.stack(group).amax(0)
    if keep == len(group) - 1:
        return sum(group) - torch.stack(group).amin(0)
    a, b, c, d = group  # the two largest stand in the same half or in different ones
    return torch.maximum(torch.maximum(a + b, c + d), torch.maximum(a, b) + torch.maximum(c, d))


# ---- which layers are linked -----------------------------------------------------------------------------------------

_READERS = (  # name of the reader -> of the maker
    (r"mlp\.fc2$", "mlp.fc1"),
    (r"(ff|ff_context)\.net\.2$", r"\1.net.0.proj"),
    (r"attn\.proj$", "attn.qkv"),
    (r"(attn\d?|attentions\.\d+)\.to_out\.0$", r"\1.to_v"),
)


_KNOWN = ("sparsedm.models.", "diffusers.models.")
_KNOWN += ("timm.models.vision_transformer", "timm.layers.mlp", "timm.layers.attention")
_BESIDE = {  # layers with weights that may stand beside the two, in the same block
    "norm_q", "norm_k", "q_norm", "k_norm", "group_norm", "spatial_norm", "norm_cross", "to_q", "to_k",
}  # fmt: skip


def _links(model):
    modules, uses = dict(model.named_modules(remove_duplicate=False)), collections.Counter()
    names = {}  # a module: all its names
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    for module in names:
        uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    for reader, readers in names.items():
        for expression, replacement in _READERS:
            makers = [re.sub(expression, replacement, name) for name in readers]
            name, maker = readers[0], modules.get(makers[0])
            if makers[0] != name and isinstance(reader, nn.Linear) and isinstance(maker, nn.Linear):
                of_their_own = all(uses[id(m._parameters.get("weight"))] == 1 for m in (maker, reader))
                together = set(makers) == set(names[maker])  # wherever one of them is used, the other one is, too
                link = _link(modules, name, maker, reader) if of_their_own and together else None
                if link:
                    yield name, link


def _link(modules, name, maker, reader):
    """The _Link of a maker and a reader, or None if something unknown may stand between them."""
    attention = "attn.proj" in name or "to_out" in name
    parent = modules[re.sub(r"\.(fc2|net\.2|proj|to_out\.0)$", "", name)]
    two = {id(p) for layer in (maker, reader) for p in layer.parameters()}
    others = {n.split(".")[0] for n, p in parent.named_parameters() if id(p) not in two}
    if not type(parent).__module__.startswith(_KNOWN) or others - (_BESIDE if attention else set()):
        return None
    channels, made = reader.in_features, maker.out_features
    every = torch.arange(channels, device=maker.weight.device)
    if not attention:
        if made not in (channels, 2 * channels):
            return None
        return _Link(maker, reader, tuple(every + start for start in range(0, made, channels)), 1)
    heads = getattr(parent, "heads", None) or getattr(parent, "num_heads", None)
    if not heads or channels % heads or made not in (channels, 3 * channels):
        return None
    return _Link(maker, reader, (every + made - channels,), heads)
