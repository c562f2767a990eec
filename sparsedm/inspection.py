"""The layers of a model: shape, parameters, MACs, pattern and back end of each, as table, JSON or picture."""

import math
import os
from dataclasses import asdict, dataclass
from numbers import Integral

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sparsedm.compressed import Compressed, CompressedLinear
from sparsedm.compression import uncompressed_because
from sparsedm.copying import meta_twin, uncopied
from sparsedm.errors import InputError
from sparsedm.kernels.pattern import group_view, holds
from sparsedm.kernels.sparse24.conv import conv_request
from sparsedm.kernels.sparse24.dispatch import CONV, LINEAR, request_on, rule_of_thumb
from sparsedm.layers import Linear, product_dtype
from sparsedm.plots import COLOURS, GREY, picture, table
from sparsedm.sparsity import module_of

ARCHS = {
    **{"cpu": torch.device("cpu"), "sm_75": (7, 5), "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9)},
    **{"sm_90a": (9, 0), "sm_100": (10, 0), "sm_103": (10, 3), "sm_120": (12, 0), "sm_121": (12, 1)},
}
GEOMETRY = ("stride", "padding", "dilation")
LAYERS = (nn.Linear, nn.Conv2d, Compressed)
MOST_BARS = 200  # of a chart: DiT-XL/2 has 145
FOREIGN = (nn.MultiheadAttention, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)  # never a pattern


@dataclass(frozen=True)
class LayerRow:
    """One layer. MACs are multiply-accumulates of one forward at batch 1; "after" counts only kept weights."""

    name: str
    kind: str  # class name
    shape: tuple  # of the weight before compression
    pattern: str  # "dense" or N:M
    holds: bool  # the weight that multiplies x has at most N non-zeros in every group
    parameters: int
    parameters_after: int
    macs: int
    macs_after: int
    backend: str  # what computes it
    why: str  # why this back end, or why the layer is dense
    shared: bool = False  # an earlier row has the same weight

    @property
    def density(self) -> float:
        return self.parameters_after / self.parameters if self.parameters else 1.0


@dataclass(frozen=True)
class Inspection:
    """rows: one per linear and convolution layer. other_parameters: norms, embeddings. attention_macs: QK^T and PV.

    notes: remarks, one sentence each.
    """

    rows: tuple
    other_parameters: int
    attention_macs: int
    notes: tuple = ()

    def totals(self) -> dict[str, int]:
        """A dict of ints: parameters and MACs, dense and with kept weights only, and MACs with attention products.

        A shared weight counts once, as its first row says.
        """
        macs, after = sum(r.macs for r in self.rows), sum(r.macs_after for r in self.rows)
        biases = sum(r.parameters - math.prod(r.shape) for r in self.rows if r.shared) + self.other_parameters
        return {
            "parameters": sum(r.parameters for r in self.rows if not r.shared) + biases,
            "parameters_after": sum(r.parameters_after for r in self.rows if not r.shared) + biases,
            "macs": macs,
            "macs_after": after,
            "macs_with_attention": macs + self.attention_macs,
            "macs_with_attention_after": after + self.attention_macs,
        }

    def to_dict(self) -> dict:
        return {"layers": [asdict(r) | {"density": r.density} for r in self.rows], "totals": self.totals()}

    def __str__(self) -> str:
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
        return "\n".join([table(head, body, left=(0, 1, 2, 7, 8), rule=True), "", *self.notes, self.summary()])

    def summary(self) -> str:
        """The totals in three lines: parameters, MACs without and with the attention products."""
        t = self.totals()
        scale, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M")) if t["macs"] >= s), (1e3, "k"))

        def line(name, key, form):
            before, after = t[key], t[f"{key}_after"]
            return f"{name:<28}{form(before):>14} -> {form(after):>12}  ({after / before - 1 if before else 0:+.1%})"

        def scaled(n):
            return f"{n / scale:.2f} {unit}"

        return "\n".join(
            [
                line("parameters", "parameters", "{:,}".format),
                line("MACs, linear + conv", "macs", scaled),
                line("MACs with attention QK, PV", "macs_with_attention", scaled),
            ]
        )

    def plot(self, path: str | os.PathLike, title: str = "") -> None:
        """Write a bar chart of parameters per layer, before and after, to `path` (format by its suffix)."""
        from matplotlib.ticker import EngFormatter  # late: plotting must not slow down importing the package

        rows = self.rows[:MOST_BARS]
        shown = "" if len(rows) == len(self.rows) else f" of the first {len(rows)} of {len(self.rows):,} layers"
        with picture(path, (9, max(3, 0.19 * len(rows) + 1.4))) as figure:
            axes, where = figure.add_subplot(), range(len(rows))
            axes.grid(False)
            axes.barh(where, [r.parameters for r in rows], color=GREY, label="dense")
            axes.barh(where, [r.parameters_after for r in rows], color=COLOURS[0], height=0.55, label="kept")
            axes.set_yticks(where, [f"{r.name}  {r.pattern}" for r in rows], fontsize=7)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.set_xlabel(f"weights and biases{shown}")
            figure.suptitle(title or "Parameters per layer, before and after", x=0.01, ha="left")
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def inspect(
    model: nn.Module, example_inputs: tuple | dict | None = None, *, arch: str | None = None, batch: int = 1
) -> Inspection:
    """List the linear and convolution layers of a model with their parameters, MACs, pattern and back end.

    Runs one forward of a copy on meta tensors, which computes nothing. If that fails, the model runs once for real.

    example_inputs: arguments at batch 1: a tuple for `model(*example_inputs)` or a dict for `model(**example_inputs)`;
        by default the model's own `example_inputs()`.
    arch: which hardware to show back ends for. None: what the model uses now. A name from ARCHS: what the compressed
        model would use on that GPU in bf16. "cpu": on this machine's CPU in fp32.
    batch: the number of images to choose back ends for.
    Raises: InputError if the model has no example_inputs and none are given, for an unknown arch, or a batch below 1.
    """
    model = module_of(model)
    if hasattr(model, "at_width") and model.width != 8:  # a slimmable network, which runs as another one
        model = model.export(model.width)
    if example_inputs is None:
        if not hasattr(model, "example_inputs"):
            raise InputError(f"{type(model).__name__} has no example_inputs(): pass example_inputs=(x, t, ...)")
        example_inputs = model.example_inputs()
    if arch not in (None, *ARCHS):
        raise InputError(f"unknown arch {arch!r}: one of {', '.join(ARCHS)}")
    if not isinstance(batch, Integral) or batch < 1:
        raise InputError(f"batch {batch!r}: must be a whole number, at least 1")
    try:
        calls, attention = _count(model, example_inputs, on_meta=True)
    except Exception:  # no copy, no meta kernel, or code that reads a value
        calls, attention = _count(model, example_inputs, on_meta=False)
    layers = [(n, m) for n, m in model.named_modules() if is_layer(m)]
    inside = {id(p) for _, m in layers for p in _own_parameters(m)}
    other = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    owners, rows = {}, []  # of a weight: the first layer that has it as a parameter
    for name, layer in layers:
        weight = layer._parameters.get("weight")
        shared = weight is not None and owners.setdefault(weight, layer) is not layer
        rows.append(_row(name, layer, calls.get(name, _Calls()), arch, batch, shared))
    notes = tuple(f"{what}: `compress` cannot copy it" for what in uncopied(model))
    return Inspection(tuple(rows), other, attention, notes)


def is_layer(module):
    """Whether it is a layer of torch, one of ours, or another library's linear layer that tells its sizes."""
    sized = isinstance(getattr(module, "in_features", None), int)
    wraps = any(isinstance(m, LAYERS) for m in module.modules())
    return isinstance(module, LAYERS + FOREIGN) or (sized and not wraps)


def _own_parameters(layer):
    return layer.parameters(recurse=not isinstance(layer, nn.MultiheadAttention))  # that contains a layer


def weight_shape(layer):
    if isinstance(layer, Compressed):
        return layer.weight_shape
    if isinstance(layer, nn.MultiheadAttention):  # projections of q, k and v; the output projection is a layer itself
        E, K, V = layer.embed_dim, layer.kdim, layer.vdim
        return (3 * E, E) if E == K == V else (E, E + K + V)
    if isinstance(layer, LAYERS + FOREIGN):
        return tuple(layer.weight.shape)
    return layer.out_features, layer.in_features


@torch.no_grad()
def _kept(layer, pattern, weights):
    """(how many of the `weights` multiply x, whether they hold the pattern)."""
    if pattern is None:
        return weights, True
    kept = weights * pattern.keep // pattern.group  # of a compressed layer without the padding of its values
    if isinstance(layer, Compressed) or layer.weight.is_meta:
        return kept, True
    return kept, holds(group_view(layer.effective_weight()), pattern)


def _row(name, layer, calls, arch, batch, shared):
    compressed = isinstance(layer, Compressed)
    pattern = getattr(layer, "pattern", None)
    shape = weight_shape(layer)
    dense = math.prod(shape)
    kept, held = _kept(layer, pattern, dense)
    bias = getattr(layer, "bias", None)
    bias = bias.numel() if isinstance(bias, torch.Tensor) else 0
    if isinstance(layer, nn.MultiheadAttention):
        bias = sum(p.numel() for p in _own_parameters(layer)) - dense
    backend, why = "torch", ""
    if pattern is None:
        why = getattr(layer, "dense_reason", None) or _foreign_reason(layer)
    elif not compressed and not arch:
        backend = "torch, masked weight"
        if layer.mask is not None:
            why = "its mask is frozen: freeze_mask(False) lets it change in training"
        if not calls.macs:
            why = "not called in a forward: code that reads its weight directly ignores the mask"
    elif compressed or not (why := uncompressed_because(layer)):
        backend, why = _sparse_backend(layer, shape, calls, arch, batch)
    return LayerRow(
        name=name or "(the model itself)",
        kind=type(layer).__name__,
        shape=shape,
        pattern=str(pattern) if pattern else "dense",
        holds=held,
        parameters=dense + bias,
        parameters_after=kept + bias,
        macs=calls.macs,
        macs_after=round(calls.macs * kept / dense) if dense else 0,
        backend=backend,
        why=why,
        shared=shared,
    )


def _foreign_reason(layer):
    if isinstance(layer, nn.MultiheadAttention):
        return "MultiheadAttention multiplies its in_proj_weight itself"
    if not isinstance(layer, LAYERS):
        return f"{type(layer).__module__}.{type(layer).__name__} is not torch's own Linear or Conv2d"
    return "no pattern was set"


def _sparse_backend(layer, shape, calls, arch, batch):
    """(name, reason) of the back end that computes the compressed layer."""
    held = layer.values if isinstance(layer, Compressed) else layer.weight
    where, dtype = held.device, product_dtype(held)
    if arch:
        where, dtype = ARCHS[arch], torch.float32 if arch == "cpu" else torch.bfloat16
    elif isinstance(layer, Compressed):
        measured = layer.measured(batch * calls.rows if isinstance(layer, CompressedLinear) else None)
        if measured:
            return measured.choice.backend, str(measured)
    others = {"device": None if arch else held.device, "pattern": str(layer.pattern)}
    if isinstance(layer, Linear | CompressedLinear):
        choice, why = rule_of_thumb(request_on(where, LINEAR, dtype, batch * calls.rows, *shape, **others))
        return choice.backend, why
    geometry = [getattr(layer, k) for k in GEOMETRY]
    others["image"] = calls.image
    request = conv_request(where, dtype, batch * calls.rows, *shape[:2], shape[2:], *geometry, **others)
    choice, why = rule_of_thumb(request)
    return choice.backend, why if request.operation == CONV else f"a 1 x 1 convolution is a matrix product: {why}"


@dataclass
class _Calls:
    """A layer's calls in one forward at batch 1: the MACs of all calls; rows and image of the largest call."""

    macs: int = 0
    rows: int = 0  # of a Linear's input, or pixels of a convolution's output
    image: tuple = (1, 1)  # (H', W') of that output


def _count(model, example_inputs, on_meta):
    """({layer's name: _Calls}, MACs of the attention products), from one forward at batch 1.

    The attention products are all products that torch's counter sees outside the layers.
    """
    calls, counter = {}, FlopCounterMode(display=False)
    started, inside = [], []

    def enter(layer, inputs):
        started.append(counter.get_total_flops())

    def leave(layer, inputs, options, output):
        counted = counter.get_total_flops() - started.pop()
        shape = weight_shape(layer)
        call = calls.setdefault(layer, _Calls())
        if isinstance(layer, nn.MultiheadAttention):
            names = ("query", "key", "value")
            three = {**dict(zip(names, inputs)), **options}
            if not all(name in three for name in names):  # a subclass that takes other arguments
                three = dict.fromkeys(names, next(x for x in (*inputs, *options.values()) if torch.is_tensor(x)))
            projected = layer.embed_dim * sum(three[name].numel() for name in names)
            rows = three["query"].numel() // layer.embed_dim
            call.macs += projected
            out = calls.setdefault(layer.out_proj, _Calls())
            out.macs, out.rows = out.macs + rows * layer.embed_dim**2, max(out.rows, rows)
            counted = 2 * (projected + rows * layer.embed_dim**2)
        elif isinstance(layer, FOREIGN):
            call.macs += counted // 2
        else:
            call.macs += output.numel() * math.prod(shape[1:])
            rows = output.numel() // max(shape[0], 1)
            if rows > call.rows:
                call.rows, call.image = rows, tuple(output.shape[-2:])
        inside.append(counted)

    inputs = example_inputs
    if on_meta:
        model = meta_twin(model)
        inputs = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, inputs)
    arguments, options = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    arguments = arguments if isinstance(arguments, tuple | list) else (arguments,)
    layers = [(name, m) for name, m in model.named_modules() if is_layer(m)]
    hooks = [m.register_forward_pre_hook(enter) for _, m in layers]
    hooks += [m.register_forward_hook(leave, with_kwargs=True) for _, m in layers]
    training = [m for m in model.modules() if m.training]
    try:
        with torch.no_grad(), counter:
            model.eval()(*arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    named = {name: calls[layer] for name, layer in layers if layer in calls}
    return named, (counter.get_total_flops() - sum(inside)) // 2
