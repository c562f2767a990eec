"""What a model is made of, layer by layer: shape, parameters, MACs, pattern, back end, as table, JSON, picture."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.errors import InputError
from sparsedm.files import atomic_file
from sparsedm.kernels.pattern import Pattern, group_view, holds
from sparsedm.kernels.sparse24_conv import choose_conv_backend
from sparsedm.kernels.sparse24_matmul import choose_backend
from sparsedm.layers import Conv2d24, Linear, Linear24

ARCHS = {"cpu": None, "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_120": (12, 0)}
GEOMETRY = ("stride", "padding", "dilation")
LAYERS = (nn.Linear, nn.Conv2d, Linear24, Conv2d24)


@dataclass(frozen=True)
class LayerRow:
    """One layer. MACs are multiply-accumulates of one forward at batch 1; "after" counts only kept weights."""

    name: str
    kind: str  # class name
    shape: tuple  # of the dense weight
    pattern: str  # "dense" or N:M
    holds: bool  # the weight that multiplies x has at most N non-zeros in every group
    parameters: int
    parameters_after: int
    macs: int
    macs_after: int
    backend: str  # what computes it
    why: str  # why this back end, or why the layer is dense

    @property
    def density(self):
        return self.parameters_after / self.parameters if self.parameters else 1.0


@dataclass(frozen=True)
class Inspection:
    """rows: one per linear and convolution layer. other_parameters: norms, embeddings. attention_macs: QK^T and PV."""

    rows: tuple
    other_parameters: int
    attention_macs: int

    def totals(self):
        """Parameters and MACs before and after, with and without the attention products: a dict of ints."""
        macs, after = sum(r.macs for r in self.rows), sum(r.macs_after for r in self.rows)
        return {
            "parameters": sum(r.parameters for r in self.rows) + self.other_parameters,
            "parameters_after": sum(r.parameters_after for r in self.rows) + self.other_parameters,
            "macs": macs,
            "macs_after": after,
            "macs_with_attention": macs + self.attention_macs,
            "macs_with_attention_after": after + self.attention_macs,
        }

    def to_dict(self):
        return {"layers": [asdict(r) | {"density": r.density} for r in self.rows], "totals": self.totals()}

    def __str__(self):
        head = ("layer", "weight", "pattern", "parameters", "after", "MMACs", "after", "back end", "why")
        body = [
            (
                r.name,
                "x".join(map(str, r.shape)),
                r.pattern + ("" if r.holds else " VIOLATED"),
                f"{r.parameters:,}",
                f"{r.parameters_after:,}",
                f"{r.macs / 1e6:,.2f}",
                f"{r.macs_after / 1e6:,.2f}",
                r.backend,
                r.why,
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        right = {3, 4, 5, 6}
        lines = [
            "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in [head, *body]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*(line.rstrip() for line in lines), "", self.summary()])

    def summary(self):
        """The totals in three lines, saying which convention each MAC count follows."""
        t = self.totals()

        def line(name, before, after, form):
            return f"{name:<28}{form(before):>14} -> {form(after):>12}  ({after / before - 1:+.1%})"

        def giga(n):
            return f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M"

        return "\n".join(
            [
                line("parameters", t["parameters"], t["parameters_after"], "{:,}".format),
                line("MACs, linear + conv", t["macs"], t["macs_after"], giga),
                line("MACs with attention QK, PV", t["macs_with_attention"], t["macs_with_attention_after"], giga),
            ]
        )

    def plot(self, path, title=""):
        """Write a bar chart of parameters per layer, before and after, to `path` (format by its suffix)."""
        from matplotlib.figure import Figure  # late: plotting must not slow down importing the package
        from matplotlib.ticker import EngFormatter

        rows = self.rows
        figure = Figure(figsize=(9, max(3, 0.19 * len(rows) + 1.4)), layout="constrained")
        axes = figure.add_subplot()
        where = range(len(rows))
        axes.barh(where, [r.parameters for r in rows], color="#c8c8c8", label="dense")
        axes.barh(where, [r.parameters_after for r in rows], color="#0072b2", height=0.55, label="kept")
        axes.set_yticks(where, [f"{r.name}  {r.pattern}" for r in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("weights and biases")
        figure.suptitle(title or "Parameters per layer, before and after", x=0.01, ha="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=120)


def inspect(model, example_inputs=None, *, arch=None, batch=1):
    """Inspect a model: its linear and convolution layers, what each holds and costs. Computes nothing (meta tensors).

    example_inputs: a tuple for `model(*example_inputs)` at batch 1; by default the model's own `example_inputs()`.
    arch: None: the back ends that run now. One of ARCHS: those that the compressed model would use there, in bf16.
    batch: the number of images the back ends are chosen for.
    Raises: InputError if the model has no example_inputs and none are given, or for an unknown arch.
    """
    if example_inputs is None:
        if not hasattr(model, "example_inputs"):
            raise InputError(f"{type(model).__name__} has no example_inputs(): pass example_inputs=(x, t, ...)")
        example_inputs = model.example_inputs()
    if arch not in (None, *ARCHS):
        raise InputError(f"unknown arch {arch!r}: one of {', '.join(ARCHS)}")
    calls, attention = _count(model, example_inputs)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    inside = {id(p) for _, m in layers for p in m.parameters()}
    other = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    rows = tuple(_row(name, layer, calls.get(layer, _Calls()), arch, batch) for name, layer in layers)
    return Inspection(rows, other, attention)


def _row(name, layer, calls, arch, batch):
    compressed = isinstance(layer, Linear24 | Conv2d24)
    pattern = Pattern(2, 4) if compressed else getattr(layer, "pattern", None)
    with torch.no_grad():
        if compressed:
            shape, kept, held = layer.weight_shape, layer.values.numel(), True
        else:
            weight = layer.effective_weight() if pattern else layer.weight
            shape, kept = tuple(weight.shape), weight.numel() * (pattern.keep if pattern else 1)
            kept //= pattern.group if pattern else 1
            held = not pattern or weight.is_meta or holds(group_view(weight), pattern)
    dense, bias = math.prod(shape), 0 if layer.bias is None else layer.bias.numel()
    if compressed or (arch and pattern and pattern.keep <= 2):  # at most 2 of every 4: can be compressed
        backend, why = _sparse_backend(layer, shape, calls, arch, batch)
    else:
        backend = "torch, masked weight" if pattern else "torch"
        why = "" if pattern else getattr(layer, "dense_reason", None) or "no pattern was set"
    return LayerRow(
        name=name or "(the model itself)",
        kind=type(layer).__name__,
        shape=shape,
        pattern=str(pattern) if pattern else "dense",
        holds=held,
        parameters=dense + bias,
        parameters_after=kept + bias,
        macs=calls.macs,
        macs_after=round(calls.macs * kept / dense),
        backend=backend,
        why=why,
    )


def _sparse_backend(layer, shape, calls, arch, batch):
    """(name, reason) of what computes the layer in compressed form."""
    held = layer.values if isinstance(layer, Linear24 | Conv2d24) else layer.weight
    capability = torch.cuda.get_device_capability(held.device) if held.is_cuda else None
    dtype = held.dtype
    if arch:
        capability, dtype = ARCHS[arch], torch.bfloat16
    elif isinstance(layer, Linear24 | Conv2d24):
        measured = layer.measured_backend(batch * calls.rows if isinstance(layer, Linear24) else None)
        if measured:
            return measured, "what its call of this size took: see the tuned table of the GPU"
    if isinstance(layer, Linear | Linear24):
        return choose_backend(capability, batch * calls.rows, *shape, dtype)
    geometry = [getattr(layer, k) for k in GEOMETRY]
    return choose_conv_backend(capability, shape[1], shape[2:], *geometry, calls.image, shape[0], dtype)


@dataclass
class _Calls:
    """What one forward at batch 1 showed of a layer: MACs, rows of a Linear's input, image size of a Conv2d's."""

    macs: int = 0
    rows: int = 0
    image: tuple = (0, 0)


def _count(model, example_inputs):
    """({layer: _Calls}, MACs of the attention products), from one forward on meta tensors at batch 1.

    The attention products are every product that torch's counter sees outside of the layers.
    """
    calls, counter = {}, FlopCounterMode(display=False)
    started, inside = [], []

    def enter(layer, inputs):
        started.append(counter.get_total_flops())

    def leave(layer, inputs, output):
        inside.append(counter.get_total_flops() - started.pop())
        shape = layer.weight_shape if isinstance(layer, Linear24 | Conv2d24) else layer.weight.shape
        call = calls.setdefault(layer, _Calls())
        call.macs += output.numel() * math.prod(shape[1:])
        if len(shape) == 2:
            call.rows = max(call.rows, output.numel() // shape[0])
        else:
            call.image = tuple(inputs[0].shape[-2:])

    state = {name: t.detach().to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    inputs = tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in example_inputs)
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    hooks = [h for m in layers for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    training = [m for m in model.modules() if m.training]
    try:
        with torch.no_grad(), counter:
            functional_call(model.eval(), state, inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return calls, (counter.get_total_flops() - sum(inside)) // 2
