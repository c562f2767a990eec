"""Fuzzed calls of masked and compressed layers against fp64: outputs and every gradient.

    pytest -m slow tests/hunt/test_calls.py -s        10,000 calls (fixed seeds; the counts are printed)

A case is a function of its seed: layer, pattern, dtype, shape, strides, epilogue, context, and what happened to the
weight before. Masks and compressed weights are compared exactly with the definition (the largest by magnitude, ties to
the lower index). Results may err by twice torch's own error plus what rounding of every product may give. Every 200
cases run in a fork, where a crash is counted rather than fatal.

Seen red (one fault planted each; wrong of the first 60): the mask of the weight that a layer had at first, 32; a frozen
mask multiplied rather than chosen (`weight * mask`), at an infinite pruned weight, 5; `dropped` taken for `kept`, 8;
the scale left out of a compressed layer, 6. Of the first 1,000: a frozen mask that MaskedAdamW files as its choice, 3;
batched gradients in C, 3.
"""

import contextlib
import os
import random
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm
from sparsedm.kernels.pattern import GROUPS
from tests.hunt.forked import forked

ACTIVATIONS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
CONTEXTS = ("grad", "grad", "grad", "no_grad", "inference", "autocast", "held", "held autocast", "checkpoint", "twice")
CONTEXTS += ("batched", "subclass")
BEFORE = ("nothing", "nothing", "data add", "data swap", "data cast", "inference", "load")
BEFORE += ("frozen", "frozen infinite", "thawed", "thawed adamw")


class Sub(torch.Tensor):
    """Some library's tensors."""


class Case:
    """What one seed stands for."""

    def __init__(self, seed):
        self.seed, self.random = seed, random.Random(seed)
        pick = self.random.choice
        torch.manual_seed(seed)
        self.conv, self.compressed = pick([False, False, True]), pick([False, True])
        group = pick(GROUPS)
        self.keep, self.group = self.random.randrange(1, group), group
        self.dtype = pick([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
        self.context = pick(CONTEXTS) if not self.compressed else pick(["no_grad", "inference", "autocast", "subclass"])
        self.before = pick(BEFORE) if not self.compressed else pick(["nothing", "frozen", "load", "copy", "moved"])
        self.activation, self.bias = pick(list(ACTIVATIONS)), pick([True, False])
        self.rule = pick([(0.0, 1.0, 1.0), (0.1, 1.0, 1.0), (0.0, 1.5, 0.5), (0.2, 1.0, 0.0)])
        self.optimizer = None
        self.backend = pick([None, None, "cpu", "torch", "dense"])
        self.product = torch.bfloat16 if "autocast" in self.context else self.dtype
        if "autocast" in self.context:
            self.dtype = torch.float32
        self.make()

    def make(self):
        """The layer, its inputs, and the mask that it must have."""
        r, pick = self.random, self.random.choice
        K = self.group * r.randrange(1, max(2, 96 // self.group))
        N = pick([1, 3, 8, 17, 32, 64])
        if self.conv:
            options = {"stride": pick([1, 1, 2, (2, 1)]), "dilation": pick([1, 1, 2]), "bias": self.bias}
            options["padding"] = pick([0, 1, (1, 2)])
            if not self.compressed and r.random() < 0.2:
                options["padding_mode"] = pick(["reflect", "circular"])
            sizes = K, N, pick([1, 3, (3, 1), (1, 2), 2])
            self.layer = sparsedm.Conv2d(*sizes, **options, activation=self.activation, dtype=self.dtype)
        else:
            large = r.random() < 0.15  # so that the C kernels are worth calling
            K, N = (K * (256 // K + 1), 128) if large else (K, N)
            self.layer = sparsedm.Linear(K, N, self.bias, activation=self.activation, dtype=self.dtype)
        with torch.no_grad():
            if r.random() < 0.3:  # ties, zeros, and zeros with a sign
                self.layer.weight.copy_((4 * self.layer.weight / self.layer.weight.abs().max()).round() / 4)
        self.layer.set_pattern(f"{self.keep}:{self.group}")
        if not self.compressed:
            sparsedm.set_masking(self.layer, **dict(zip(("decay", "kept", "dropped"), self.rule)))
        self.inputs = self.conv_inputs(K) if self.conv else self.linear_inputs(K, N)

    def linear_inputs(self, K, N):
        pick = self.random.choice
        rows = pick([(1,), (5,), (2, 7), (0,), (3, 16), (64,), (2, 3, 4)])
        if N == 128:
            rows = pick([(64,), (2, 40), (1,)])
        inputs = {"x": self.strided((*rows, K))}
        if self.random.random() < 0.2 and self.group < K:
            cut = self.random.randrange(1, K)
            inputs = {"x": self.strided((*rows, K - cut)), "skip": self.strided((*rows, cut))}
        if self.random.random() < 0.3:
            inputs["scale"] = self.strided((N,) if len(rows) == 1 or pick([0, 1]) else (rows[0], N))
        if self.random.random() < 0.3:
            inputs["residual"] = self.strided((*rows, N))
        return inputs

    def conv_inputs(self, K):
        height, width = self.random.choice([(5, 7), (8, 8), (6, 9)])
        x = self.strided((self.random.choice([1, 2, 3]), K, height, width))
        inputs = {"x": x.contiguous(memory_format=torch.channels_last) if self.random.random() < 0.4 else x}
        if self.random.random() < 0.3:
            with torch.no_grad():
                shape = nn.Conv2d.forward(self.plain_twin(torch.float64), x.double()).shape
            inputs["residual"] = self.strided(shape)
        return inputs

    def plain_twin(self, dtype):
        """torch's own layer of the same geometry."""
        if not self.conv:
            return None
        mine = self.layer
        sizes = mine.in_channels, mine.out_channels, mine.kernel_size
        geometry = {name: getattr(mine, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        return nn.Conv2d(*sizes, **geometry, dtype=dtype)

    def strided(self, shape):
        """A tensor of random numbers in one of many layouts."""
        if not shape or len(shape) < 2:
            return torch.randn(shape).to(self.dtype)
        match self.random.choice(["plain", "plain", "transposed", "sliced", "offset", "expanded"]):
            case "transposed":
                return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(self.dtype).transpose(-1, -2)
            case "sliced":
                return torch.randn(*shape[:-1], 2 * shape[-1] + 3).to(self.dtype)[..., 1 : 2 * shape[-1] + 1 : 2]
            case "offset":
                return (
                    torch.randn(shape[0] + 1, *shape[1:], 2)
                    .to(self.dtype)
                    .flatten()[3:]
                    .as_strided(shape, torch.empty(shape).stride())
                )
            case "expanded":
                return torch.randn(1, *shape[1:]).to(self.dtype).expand(shape)
        return torch.randn(shape).to(self.dtype)

    def mask_of(self, weight):
        """The definition: in every group of inputs the `keep` largest magnitudes, ties to the lower index."""
        rows = weight.detach().double().movedim(1, -1)
        groups = rows.reshape(*rows.shape[:-1], -1, self.group)
        order = groups.abs().sort(dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.keep], True)
        return mask.reshape(rows.shape).movedim(-1, 1)

    # ---- what happens to the weight before the call ----

    def prepare(self):
        """Do to the layer what the case says. Returns (the layer to call, the weight and mask that it must have)."""
        layer = self.layer
        with torch.no_grad(), contextlib.suppress(NotImplementedError):
            self.call(layer, self.inputs)  # whatever a first call might remember
        other = torch.randn_like(layer.weight)
        mask = None
        match self.before:
            case "data add":
                layer.weight.data.add_(other)
            case "data swap":
                layer.weight.data = other
            case "data cast" if self.dtype in (torch.float32, torch.float64):
                layer.weight.data = layer.weight.data.bfloat16()
                layer.to(self.dtype)
            case "inference":
                with torch.inference_mode():
                    self.call(layer, self.inputs)
            case "load":
                layer.load_state_dict({**layer.state_dict(), "weight": other})
            case "frozen" | "frozen infinite" | "thawed":
                mask = self.mask_of(layer.weight)
                layer.freeze_mask()
                with torch.no_grad():
                    layer.weight.copy_(other)
                    if self.before == "frozen infinite":
                        layer.weight[~mask] = float("inf")
                if self.before == "thawed":
                    layer.freeze_mask(False)
                    mask = None
            case "thawed adamw":
                # at the default eps of 1e-8, fp16 divides by 0
                self.optimizer = sparsedm.MaskedAdamW(layer.parameters(), 0.5, eps=1e-3, model=layer)
                self.rule = (0.0, *self.rule[1:])  # the optimizer adds the decay
                for frozen in (False, True):
                    layer.freeze_mask(frozen)
                    with sparsedm.hold_masks(layer, optimizer=self.optimizer):
                        layer.weight.grad = other
                    self.optimizer.step()
                layer.freeze_mask(False)
        mask = self.mask_of(layer.weight) if mask is None else mask
        weight = layer.weight.detach().clone()
        if not self.compressed:
            return layer, weight, mask
        small = sparsedm.compress(nn.Sequential(layer))[0]
        if self.before in ("copy", "moved"):
            with torch.no_grad():
                self.call(small, self.inputs)
                layer.weight.copy_(other)
                small.load_state_dict(sparsedm.compress(nn.Sequential(layer))[0].state_dict())
            weight, mask = other, self.mask_of(other)
        if self.before == "moved":
            small = small.double().to(self.dtype)
        return small, weight, mask

    def call(self, layer, inputs):
        inputs = dict(inputs)
        return layer(inputs.pop("x"), **inputs)

    # ---- the call and its reference ----

    def run(self):
        """Raise AssertionError where a result is wrong."""
        layer, weight, mask = self.prepare()
        kept = torch.where(mask, weight, 0)
        if self.compressed:
            held = layer.weight if isinstance(layer, sparsedm.Linear | sparsedm.Conv2d) else layer.dense_weight()
            assert torch.equal(held, kept), "compressed weight"
        else:
            assert torch.equal(layer.current_mask(), mask), "mask"
        wants = self.context not in ("no_grad", "inference") and not self.compressed
        leaves = {name: t.detach().requires_grad_(wants) for name, t in self.inputs.items()}
        y = self.in_context(layer, leaves)
        high, low = self.reference(kept, torch.float64), self.reference(kept, self.product)
        self.compare("y", y, high["y"], low["y"], high["bound y"])
        if not wants:
            return
        cotangent = self.cotangent(y)
        layer.zero_grad()
        if self.context == "batched":
            operands = [*leaves.values(), *layer.parameters()]
            several = torch.stack((cotangent, torch.zeros_like(cotangent), cotangent))
            for operand, gradients in zip(operands, torch.autograd.grad(y, operands, several, is_grads_batched=True)):
                operand.grad = gradients[2]
        else:
            y.backward(cotangent)
        times = 2 if self.context == "twice" else 1
        if times == 2:
            self.in_context(layer, leaves).backward(cotangent)
        for name, leaf in leaves.items():
            self.compare(f"d{name}", leaf.grad, times * high[name], times * low[name], times * high[f"bound {name}"])
        decay, up, down = self.rule
        for form in (high, low):
            dw = form["weight"]
            form["weight"] = torch.where(mask, up * dw, down * dw)
            form["weight"] = form["weight"] + decay * torch.where(mask, 0, weight).to(dw.dtype)
        scale = max(1, up, down)
        bound = scale * high["bound weight"] + decay * torch.where(mask, 0, weight).double().abs()
        if not bound.isfinite().all():  # a pruned infinity decays without end
            return
        self.compare("dw", layer.weight.grad, times * high["weight"], times * low["weight"], times * bound)
        if self.bias:
            self.compare("db", layer.bias.grad, times * high["bias"], times * low["bias"], times * high["bound bias"])

    def in_context(self, layer, leaves):
        with contextlib.ExitStack() as stack:
            if self.context == "no_grad":
                stack.enter_context(torch.no_grad())
            if self.context == "inference":
                stack.enter_context(torch.inference_mode())
            if "autocast" in self.context:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if "held" in self.context:
                stack.enter_context(sparsedm.hold_masks(layer, optimizer=self.optimizer))
            if self.context == "subclass":
                leaves = {name: t.as_subclass(Sub) for name, t in leaves.items()}
            if self.context == "checkpoint":
                return torch.utils.checkpoint.checkpoint(self.call, layer, leaves, use_reentrant=False)
            return self.call(layer, leaves)

    def cotangent(self, like):
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    def reference(self, kept, dtype):
        """y, the gradients of all operands, and bounds of what rounding may do to each: sums of magnitudes."""
        out = {}
        for absolute in (False, True):
            form = (lambda t: t.double().abs()) if absolute else (lambda t: t.to(dtype))
            leaves = {name: form(t.detach()).clone().requires_grad_() for name, t in self.inputs.items()}
            weight = form(kept).clone().requires_grad_()
            bias = form(self.layer.bias.detach()).clone().requires_grad_() if self.bias else None
            x = leaves["x"] if "skip" not in leaves else torch.cat((leaves["x"], leaves["skip"]), -1)
            if self.conv:
                z = self.plain_twin(dtype)._conv_forward(x, weight, bias)
            else:
                z = F.linear(x, weight, bias)
            y = z * 1.13 if absolute and self.activation else ACTIVATIONS[self.activation](z)
            if "scale" in leaves:
                scale = leaves["scale"]
                y = y * (scale if scale.dim() == 1 else scale.view(len(scale), *[1] * (y.dim() - 2), -1))
            if "residual" in leaves:
                y = y + leaves["residual"]
            cotangent = self.cotangent(y)
            y.backward(cotangent.abs() if absolute else cotangent)
            prefix = "bound " if absolute else ""
            out |= {prefix + name: leaf.grad for name, leaf in leaves.items()}
            out |= {f"{prefix}y": y.detach(), f"{prefix}weight": weight.grad}
            out |= {f"{prefix}bias": bias.grad} if self.bias else {}
        return out

    def compare(self, name, got, high, low, bound):
        assert got is not None, f"{name} is missing"
        assert got.shape == high.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(high.shape)}"
        got, low = got.detach().double(), low.double()
        assert got.isfinite().all(), f"{name} is not finite"
        if not got.numel():
            return
        eps = torch.finfo(self.product).eps
        who = 2 if self.product == torch.float64 else 1  # then the reference rounds as much as what it is for
        error, allowed = (got - high).abs().max(), 2 * (low - high).abs().max() + who * 4 * eps * bound.max()
        assert error <= allowed, f"{name} errs by {error:.2e}, allowed {allowed:.2e}"

    def __str__(self):
        form = "compressed" if self.compressed else "masked"
        shapes = {name: tuple(t.shape) for name, t in self.inputs.items()}
        return (
            f"seed {self.seed}: {form} {self.layer} {self.dtype} {self.context}, before: {self.before}, "
            f"rule {self.rule}, backend {self.backend}, {shapes}"
        )


def attempt(seeds):
    """Run the cases of a fork and report on stderr: 'wrong SEED' lines. None of these calls may be refused."""
    for seed in seeds:
        os.write(2, f"at {seed}\n".encode())
        case = None
        try:
            case = Case(seed)
            os.environ["SPARSEDM_BACKEND"] = case.backend or ""
            case.run()
        except BaseException as error:
            text = f"wrong {seed}: {type(error).__name__}: {error} ({case})".replace("\n", " ")
            os.write(2, f"{text[:800]}\n".encode())
    sys.stderr.flush()


def hunt(seeds, size=200):
    """{seed: what is wrong} of all cases; prints the counts."""
    wrong, seeds = {}, list(seeds)
    for start in range(0, len(seeds), size):
        outcome = forked(lambda start=start: attempt(seeds[start : start + size]), seconds=280, megabytes=4096)
        wrong |= {int(seed): text for seed, text in re.findall(r"^wrong (\d+): (.*)$", outcome.said, re.MULTILINE)}
        if outcome.code != 0:
            last = int(re.findall(r"^at (\d+)$", outcome.said, re.MULTILINE)[-1])
            wrong[last] = f"{'hang' if outcome.code is None else 'crash'} {outcome.code}: {outcome.said[-300:]}"
    print(f"{len(seeds)} calls: {len(wrong)} wrong")
    for text in list(wrong.values())[:20]:
        print("   ", text)
    return wrong


def test_some_calls():
    torch.set_num_threads(1)
    assert not hunt(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_calls(part):
    torch.set_num_threads(1)
    assert not hunt(range(1000 * part, 1000 * (part + 1)))
