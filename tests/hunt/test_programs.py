"""Random models through random sequences of what turns one form of a model into another: none may change what it
computes, its patterns, activations and gradient rules, its ties, or the model that it was made from.

    pytest -m slow tests/hunt/test_programs.py        1,000 sequences; those of the default suite are the first 60

Seen red (sequences of the first 60 that fail, one fault planted each): `compress` that begins a layer anew which holds
torch's sparse tensor, 2; ties that `decompress` forgets, 5; gradient rules that `load_model` forgets, 10; masks that
`bake` does not apply, 6.
"""

import copy
import functools
import io
import random

import pytest
import torch
from torch import nn

import sparsedm
from sparsedm.compressed import Compressed
from sparsedm.layers import ACTIVATIONS
from sparsedm.model_files import load_model, save_model
from sparsedm.sparsity import masked_layers

WIDTH = 64
PATTERNS = (*["2:4"] * 6, "1:4", "1:8", "3:4", "2:8", "1:16")


class Net(nn.Module):
    """Residual layers of every kind; some are there twice, or share their weight with another."""

    def __init__(self, config):
        super().__init__()
        self.config, pick = config, random.Random(config["seed"]).choice
        blocks = []
        for _ in range(pick([2, 3, 4])):
            activation, bias = pick(list(ACTIVATIONS)), pick([True, False])
            conv = functools.partial(sparsedm.Conv2d, WIDTH, WIDTH, bias=bias, activation=activation)
            make = {
                "ours": lambda a=activation, b=bias: sparsedm.Linear(WIDTH, WIDTH, b, activation=a),
                "torch's": lambda b=bias: nn.Linear(WIDTH, WIDTH, b),
                "convolution": lambda conv=conv: conv(3, padding=1, groups=pick([1, 1, 2])),
                "torch's convolution": lambda b=bias: nn.Conv2d(WIDTH, WIDTH, 1, bias=b),
                "twice": lambda: blocks[0],
                "tied": lambda a=activation: self.tied(blocks, a),
            }
            names = list(make)[: None if blocks else 4]
            blocks.append(make[pick(names)]())
        self.blocks, self.norm, self.out = nn.ModuleList(blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32)

    def tied(self, blocks, activation):
        layer = sparsedm.Linear(WIDTH, WIDTH, activation=activation)
        layer.weight = next((block.weight for block in blocks if isinstance(block, nn.Linear)), layer.weight)
        return layer

    def forward(self, x):
        for block in self.blocks:
            linear = isinstance(block, nn.Linear | sparsedm.CompressedLinear)
            x = x + self.norm(block(x) if linear else block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.out(x)


def saved(model, folder, **options):
    path = save_model(folder / "m.safetensors", model, **options)
    return load_model(path, Net).model.to(model.norm.weight.dtype)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    return other


TURNS = {
    "compress": lambda model, folder: sparsedm.compress(model),
    "decompress": lambda model, folder: sparsedm.decompress(model),
    # a CPU cannot multiply by them
    "to torch's and back": lambda model, folder: sparsedm.compress(sparsedm.decompress(model, "cutlass")),
    "bake": lambda model, folder: sparsedm.bake(model),
    "save": lambda model, folder: saved(model, folder),
    "save in shards": lambda model, folder: saved(model, folder, shard_bytes=3000),
    "pickle": lambda model, folder: pickled(model),
    "copy": lambda model, folder: copy.deepcopy(model),
    "load": lambda model, folder: loaded(model),
}
SAME = ("pickle", "copy", "load")  # these give a model of the same layers


def facts(model):
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {f"{name}.{key}": p for name, m in modules.items() for key, p in m._parameters.items() if p is not None}
    ties = {}
    for name, parameter in own.items():
        ties.setdefault(id(parameter), []).append(name)
    sparse = {name: m for name, m in modules.items() if getattr(m, "pattern", None)}
    return {
        "mode": {name: m.training for name, m in modules.items()},
        "gradients": {name: p.requires_grad for name, p in own.items()},
        "ties": sorted(names for names in ties.values() if len(names) > 1),
        "activations": {name: m.activation for name, m in modules.items() if getattr(m, "activation", None)},
        "patterns": {name: str(m.pattern) for name, m in sparse.items()},
        "rules": {name: m.rule for name, m in sparse.items()},
    }


def start(seed, r):
    torch.manual_seed(seed)
    model = Net({"seed": seed})
    for parameter in model.parameters():
        parameter.requires_grad_(r.random() > 0.15)
    sparsedm.sparsify(model, r.choice(PATTERNS), r.choice([None, "all", r"blocks\.[01]$"]))
    if r.random() < 0.4:
        sparsedm.set_masking(model, decay=r.choice([0.0, 0.1]), frozen=r.choice([None, True]))
    model.eval()  # or a cast warns
    model = model.to(r.choice([torch.float32, torch.bfloat16, torch.float16]))
    return model.train(r.random() < 0.5), torch.randn(2, 5, 5, WIDTH, dtype=model.norm.weight.dtype)


def turns_of(model, tied):
    """The turns that `model` can make, those of its form more often. tied: whether weights are, or were."""
    turns, compressed = [*SAME, "save", "save in shards"], [m for m in model.modules() if isinstance(m, Compressed)]
    if compressed:
        linear = any(isinstance(m, sparsedm.CompressedLinear) for m in compressed)
        fours = all(str(m.pattern) == "2:4" for m in compressed) and model.norm.weight.dtype != torch.float32
        return [*turns, *["decompress"] * 2, *(["to torch's and back"] * 4 if linear and fours and not tied else [])]
    if not masked_layers(model):
        return turns
    return [*turns, *["compress"] * 4, *([] if tied else ["bake"])]  # a weight with two masks cannot be dense


@torch.no_grad()
def wrong_with(seed, folder):
    """What goes wrong in the sequence of this seed, or None; and the turns that were made."""
    r, made = random.Random(seed), []
    model, x = start(seed, r)
    tolerance = 2e-4 if x.dtype == torch.float32 else 4e-2
    at_first = facts(model)
    for _ in range(6):
        turn, before, y = r.choice(turns_of(model, bool(at_first["ties"]))), facts(model), model(x)
        after = TURNS[turn](model, folder)
        made.append(turn)
        if not torch.allclose(after(x), y, rtol=0, atol=tolerance * y.abs().max().item()):
            return "its output differs", made
        if facts(model) != before:
            return "the model that it was made from is another", made
        found = facts(after)
        kept = set(before) if turn in SAME else {"activations", *(("patterns", "rules") if "save" in turn else ())}
        if turn == "decompress" and {*made} <= {"compress", "decompress", *SAME}:
            kept, before = {"gradients", "ties", "rules"}, at_first
            before["rules"] = {name: rule for name, rule in before["rules"].items() if name in found["rules"]}
        for what in kept:
            if before[what] != found[what]:
                return f"its {what} differ: {before[what]}, then {found[what]}", made
        model = after
    return None, made


def hunt(seeds, folder):
    sequences = {seed: wrong_with(seed, folder) for seed in seeds}
    made = {turn for _, turns in sequences.values() for turn in turns}
    assert made == set(TURNS), "every turn was made"
    return {seed: found for seed, found in sequences.items() if found[0]}


def test_some_programs(tmp_path):
    assert not hunt(range(60), tmp_path)


@pytest.mark.slow
def test_programs(tmp_path):
    assert not hunt(range(1000), tmp_path)
