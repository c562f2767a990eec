"""Whole networks: one sampler step, whole sampling, one training step; dense, masked, our 2:4, cuSPARSELt's 2:4.

The dense network has random weights; the sparse ones hold the same weights under 2:4 magnitude masks in the model's
own `sparse_layers`. A sparse step is checked against the same sparse network computed densely in higher precision. On a
GPU a step is timed as a replayed CUDA graph, dense and sparse alike.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from bench.baselines import CuSparseLtLinear
from bench.measure import one_line, time_columns
from bench.problems import Problem
from bench.providers import OURS, Bound, Provider, max_autotune
from bench.results import stamp
from bench.timing import Timed, interleaved
from sparsedm import diffusion, samplers
from sparsedm.compression import compress
from sparsedm.cuda_graph import Graphs
from sparsedm.inspection import inspect
from sparsedm.kernels.attention import self_attention
from sparsedm.models import build_model, uvit
from sparsedm.sparsity import masked_layers, set_masking, sparsify


@dataclass(frozen=True)
class ModelShape:
    """A preset, or with `options` a variant of it, named `label`.

    sampler: a name in `sparsedm.samplers`, for whole sampling. attention_in_fp32: in any dtype of the network.
    """

    preset: str
    batch: int
    options: tuple = ()
    label: str = ""
    sampler: str = "dpm++2m"
    attention_in_fp32: bool = False
    layers: int = 1
    N: str = ""
    K: str = ""

    @property
    def model(self):
        return self.label or self.preset

    @property
    def name(self):
        return f"{self.model}@{self.batch}"

    @property
    def M(self):
        return self.batch


class NetworkProblem(Problem):
    """One evaluation of a network. `weight` is the dense network, `masked` the sparse one, with fresh masks."""

    kernel = "network"
    modes = ("step",)
    passes = 1  # a backward counts as two

    def __init__(self, shape, mode, dtype, device, seed=0, where=None):
        super().__init__(shape, mode, dtype, device, seed)
        options = {"device": self.device, "dtype": self.parameter_dtype, **dict(shape.options)}
        self.weight = build_model(shape.preset, **options).eval()
        with torch.no_grad():
            for parameter in self.weight.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(self._weight(*parameter.shape, dtype=parameter.dtype))
        for module in self.weight.modules():
            if shape.attention_in_fp32 and isinstance(module, uvit.Attention):
                module.__class__ = AttentionInFp32
        self.masked = sparsify(copy.deepcopy(self.weight), "2:4", where)
        self.inputs = tuple(self._input(x) for x in self.weight.example_inputs(shape.batch))
        self.built = {}  # provider -> Built
        self.noise = {}  # number of steps -> the noise of whole sampling: (steps, *x.shape), x first
        self.operations = 2 * shape.batch * inspect(self.weight).totals()["macs_with_attention"] * self.passes

    @property
    def parameter_dtype(self):
        return self.dtype

    def _input(self, x):
        if x is None or not x.is_floating_point():
            return x  # labels
        if x.dim() == 1:
            return torch.full_like(x, 500)  # the middle of the noise levels
        return self._normal(*x.shape, dtype=self.parameter_dtype)

    def answer(self, network, dtype):
        inputs = [x.to(dtype) if x is not None and x.dim() > 1 else x for x in self.inputs]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.outputs(baked(network).to(dtype), inputs)

    def outputs(self, network, inputs):
        with torch.no_grad():
            return (network(*inputs),)

    def traffic(self, sparse):
        return 0  # not counted for a whole network


class AttentionInFp32(uvit.Attention):
    """Attention that casts q, k and v to fp32, as in the released code of U-ViT and SparseDM."""

    def forward(self, x, residual):
        qkv = self.qkv(x)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        return self.proj(self_attention(qkv.to(wide), self.heads).to(qkv.dtype), residual)


DECAY = 2e-4  # of pruned weights: SR-STE, as the recipes train


class TrainingStepProblem(NetworkProblem):
    """Loss, gradients and an AdamW step, from fp32 master weights, dropout off, masked by SR-STE.

    The learning rate is zero, so that every call starts from the same weights. The masks are selected anew in every
    call. The outputs are the loss and the gradients of the first and the last sparse weight.
    """

    kernel = "training"
    modes = ("training step",)
    passes = 3

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        set_masking(self.masked, decay=DECAY)

    @property
    def parameter_dtype(self):
        return torch.float32

    def answer(self, network, dtype):
        """The baked network has no decay: it is added here."""
        loss, *gradients = super().answer(network, dtype)
        layers = [layer for _, layer in masked_layers(network)]
        for gradient, layer in zip(gradients, (layers[0], layers[-1]) if layers else ()):
            gradient += DECAY * torch.where(layer.current_mask(), 0, layer.weight.detach()).to(dtype)
        return (loss, *gradients)

    def outputs(self, network, inputs):
        predicted = network(*inputs)
        loss = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).square().mean()
        loss.backward()
        names = [name for name, _ in masked_layers(self.masked)]
        ends = [network.get_submodule(name).weight.grad for name in (names[0], names[-1])]
        return (loss.detach(), *ends)


def baked(network):
    """A plain dense network with the masked weights of `network`."""
    plain = copy.deepcopy(network)
    with torch.no_grad():
        for _, layer in masked_layers(plain):
            layer.weight.copy_(layer.effective_weight())
            layer.set_pattern(None)
    return plain


# ---- providers: bind runs `network(problem)`


class Built(NamedTuple):
    """A network after its first step. bytes: on the GPU, of its weights in all stored forms."""

    network: Callable
    bytes: int


class NetworkProvider(Provider):
    def __init__(self, name, network, sparse):
        self.name, self.network, self.sparse = name, network, sparse

    def supports(self, problem):
        on_gpu = problem.device.type == "cuda"
        if self.compiled and not on_gpu:
            return "max-autotune compares GPU kernels: there is none on a CPU"
        if self.network is with_cusparselt and not on_gpu:
            return "needs a CUDA device"
        return None

    def made(self, problem):
        network = self.network(problem)
        return max_autotune(network) if self.compiled else network

    def built(self, problem):
        """-> Built. Stored with the problem: compiling takes minutes, and whole sampling needs the network again."""
        if self not in problem.built:
            problem.poison(self.sparse)  # makes the references, and with them the workspaces that all share
            before = allocated(problem.device)
            network = self.made(problem)
            problem.outputs(network, problem.inputs)
            problem.built[self] = Built(network, allocated(problem.device) - before)
        return problem.built[self]

    def bind(self, problem, prepared):
        network = self.built(problem).network
        return Bound(lambda: problem.outputs(network, problem.inputs), "compiled" if self.compiled else "eager")


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class TrainingProvider(NetworkProvider):
    def bind(self, problem, prepared):
        network = self.made(problem)
        on_gpu = problem.device.type == "cuda"
        options = {"fused": True, "capturable": on_gpu}
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.0, **options)

        def run():
            optimizer.zero_grad()
            with torch.autocast(problem.device.type, problem.dtype, enabled=problem.dtype != torch.float32):
                results = problem.outputs(network, problem.inputs)
            optimizer.step()
            return results

        return Bound(run, "compiled" if self.compiled else "eager")


def dense(problem):
    return copy.deepcopy(problem.weight)


def with_masks(problem):
    return copy.deepcopy(problem.masked)


def compressed(problem):
    return compress(problem.masked)


def tuned(problem):
    """The compressed network after a step: compiled code runs the kernels that were fastest in eager code."""
    network = compressed(problem)
    problem.outputs(network, problem.inputs)
    return network


def with_cusparselt(problem):
    """The compressed network with cuSPARSELt in place of our linear layers; its convolutions as in `baked`."""
    network = baked(problem.masked)
    for name, layer in masked_layers(problem.masked):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, CuSparseLtLinear(layer))
    return network


STEP_PROVIDERS = (
    NetworkProvider("dense", dense, sparse=False),
    NetworkProvider("dense compiled", dense, sparse=False),
    NetworkProvider("sparsedm masked", with_masks, sparse=True),
    NetworkProvider(OURS, compressed, sparse=True),
    NetworkProvider(f"{OURS} compiled", tuned, sparse=True),
    NetworkProvider("cuSPARSELt", with_cusparselt, sparse=True),
)
TRAINING_PROVIDERS = (
    TrainingProvider("dense", dense, sparse=False),
    TrainingProvider("dense compiled", dense, sparse=False),
    TrainingProvider("sparsedm masked", with_masks, sparse=True),
    TrainingProvider("sparsedm masked compiled", with_masks, sparse=True),
)


# ---- whole sampling: on a GPU every step replays one CUDA graph of the network, dense and sparse alike; the clock runs
# around the whole of it, until the images are on the host


def sampling_mode(steps):
    return f"sampling, {steps} steps"


def sampling_rows(suite, problem, providers, steps, rounds, alive=lambda: None):
    """Rows for whole sampling by every provider that can run: time, images/s, memory, and the error of its images.
    `alive` is called before every sampling.

    "image difference" is max |a - b| of images in about [-1, 1], drawn from the same noise by this provider and by the
    same sparse network computed densely. A provider that raises gets one row that says so.
    """
    common = {"suite": suite, **problem.columns(), "mode": sampling_mode(steps)}
    graphs = Graphs(problem.device) if problem.device.type == "cuda" else None
    calls, images, rows = {}, {}, []
    for provider in [provider for provider in providers if provider.supports(problem) is None]:
        alive()
        try:
            calls[provider] = replayed(provider.built(problem).network, graphs)
            images[provider] = draw(calls[provider], problem, steps)  # a warm-up, too
        except Exception as error:
            reason = {"metric": "time", "status": "failed", "reason": one_line(error)}
            rows.append(common | {"provider": provider.name} | reason)
    timed = {provider: Timed(timer(calls[provider], problem, steps, alive), "perf_counter") for provider in images}
    times = interleaved(timed, rounds=rounds, per_round=1)
    alive()
    reference = draw(baked(problem.masked), problem, steps)
    now = stamp(problem.device)
    for provider in images:
        row = common | {"provider": provider.name, "status": "ok"}

        def value(metric, number, unit, row=row):
            rows.append(row | {"metric": metric, "value": number, "unit": unit})

        rows.append(row | {"metric": "time", **time_columns(times[provider], timed[provider].method)})
        value("images per second", problem.shape.batch / times[provider].p50 * 1e6, "images/s")
        network = provider.built(problem).network
        value("weights", sum(t.nbytes for t in [*network.parameters(), *network.buffers()]), "bytes")
        if problem.device.type == "cuda":
            value("peak memory", peak_memory(provider, problem), "bytes")
        if provider.sparse:
            value("image difference", (images[provider] - reference).abs().max().item(), "of [-1, 1]")
    return [row | now for row in rows]


def peak_memory(provider, problem):
    """Peak bytes on the GPU in a step: weights in all stored forms, and activations."""
    network, kept = provider.built(problem)
    torch.cuda.reset_peak_memory_stats(problem.device)
    before = allocated(problem.device)
    problem.outputs(network, problem.inputs)
    return kept + torch.cuda.max_memory_allocated(problem.device) - before


def timer(call, problem, steps, alive):
    """A function: count -> `count` times of whole sampling in microseconds."""

    def once():
        alive()
        start = time.perf_counter()
        draw(call, problem, steps)
        return (time.perf_counter() - start) * 1e6

    return lambda count: [once() for _ in range(count)]


def draw(call, problem, steps):
    if steps not in problem.noise:
        streams = diffusion.noise_streams(problem.shape.batch, 0, 0)
        shape = problem.inputs[0].shape[1:]
        drawn = [diffusion.draw_noise(streams, shape, problem.device, torch.float32) for _ in range(steps)]
        problem.noise[steps] = torch.stack(drawn)
    noise, sampler = iter(problem.noise[steps]), problem.shape.sampler
    schedule = diffusion.schedule_of(problem.weight)
    times = samplers.step_times(schedule, sampler, steps)
    model = functools.partial(predict, call, problem)
    with torch.no_grad():
        return samplers.integrate(model, schedule, next(noise), times, sampler, lambda: next(noise)).cpu()


def predict(call, problem, x, t):
    return call(x.to(problem.dtype), t, *problem.inputs[2:])


def replayed(network, graphs):
    """`network`, with `graphs` as a CUDA graph that is replayed with new inputs."""
    if graphs is None:
        return network

    def step(*inputs):
        return (network(*inputs),)

    return lambda *inputs: graphs(step, *inputs)[0]


def table3_shapes(quick=False):
    """SparseDM's speed table (arXiv 2404.10445): CIFAR-10 U-ViTs of patch 1, 2, 4 and MLP ratio 1, 2, 4, 8.

    As in the release, one block of width 8192 with 8 heads; and the same at the width and depth of the real network.
    Batches of 64, attention in fp32, sampled by U-ViT's Euler-Maruyama.
    """
    grids = [("one block", 8192, 0), ("full depth", 512, 12)]
    if quick:
        grids = [("one block", 256, 0)]
    shapes = []
    for (name, width, depth), patch, ratio in itertools.product(grids, (2, 4) if quick else (1, 2, 4), (1, 2, 4, 8)):
        options = {"dim": width, "depth": depth, "heads": 8, "patch_size": patch, "mlp_ratio": ratio}
        label = f"{name}, width {width}, patch {patch}, mlp {ratio}"
        batch = 1 if quick else 64
        protocol = {"sampler": "euler-maruyama-uvit", "attention_in_fp32": True}
        shapes.append(ModelShape("uvit-cifar10-small", batch, tuple(options.items()), label, **protocol))
    return shapes
