"""`MaskedAdamW`: AdamW that also selects the masks; and the choices that it and `sparsity.hold_masks` keep for a while.

A choice is what was selected from a weight, with a checksum of what the weight was. Whoever uses a choice compares the
checksum afterwards, so that a weight written by anybody else, unseen by torch, is an InputError and not a stale mask.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from numbers import Real
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.adam import adam
from torch.utils._pytree import tree_map_only

from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw as kernel
from sparsedm.kernels.checksum import checksum_on_gpu, checksums
from sparsedm.kernels.cpu import products, rules
from sparsedm.kernels.launch import forced_backend
from sparsedm.kernels.mask import Selection
from sparsedm.kernels.masked_adamw import Rates, Work
from sparsedm.kernels.pattern import Pattern, check_weight, memory_format
from sparsedm.kernels.straight_through import GradientRule, apply_rule
from sparsedm.layers import Conv2d, Linear, Masked, is_sharded

CHANGED = "the weight of {} was changed while its mask was held, or since it was selected: step after the block"
RELOAD = "moments are moved by optimizer.load_state_dict(optimizer.state_dict())"
NAN = "{}: some of its weights are NaN, which has no magnitude order"

# ---- choices ---------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    weight: nn.Parameter
    pattern: Pattern
    selection: Selection
    checksum: torch.Tensor | int  # int64: () by the kernel of `masked_adamw`, (1,) by `_checksum`; an int of a CPU's
    version: int | None  # of the weight: what torch has seen of writes

    @classmethod
    def of(cls, layer, selection, checksum):
        return cls(layer.weight, layer.pattern, selection, checksum, _version(layer.weight))


def _version(weight):
    return None if weight.is_inference() else weight._version


def choose(dtypes, names):
    """{layer: Choice} of the current weights; on a GPU one launch for all layers of a kind, see `kernels.masked_adamw`.

    dtypes: {layer: dtype of its product}. names: {layer: what errors call it}. Raises: InputError for NaN, on a GPU at
    one of the next calls.
    """
    found = {}
    for layers in _by_device(layer for layer in dtypes if kernel.serves(layer.weight)):
        works = [_work(layer, dtypes[layer] if layer.mask is None else None) for layer in layers]
        totals = kernel.launch(works)
        for layer, work, checksum in zip(layers, works, totals[0]):
            selection = work.selection or layer.selection(dtypes[layer])  # a frozen mask is not selected
            found[layer] = Choice.of(layer, selection, checksum)
        report(totals[2] != 0, [names[layer] for layer in layers], NAN)
    on_cpu = [la for la, dtype in dtypes.items() if la not in found and _served_on_cpu(la, dtype)]
    found |= _chosen_on_cpu(on_cpu, names)
    for layer, dtype in dtypes.items():
        if layer not in found:
            selection = layer.selection(dtype, names[layer])
            found[layer] = Choice.of(layer, selection, _checksum(layer.weight))
    return found


def _served_on_cpu(layer, dtype):
    weight = layer.weight
    plain = layer.mask is None and layer._held is None and type(weight) in (torch.Tensor, nn.Parameter)
    return plain and dtype == torch.float32 and forced_backend() not in ("torch", "dense") and rules.serves(weight)


def _chosen_on_cpu(layers, names):
    """{layer: Choice} by one call of the C library; without the layers whose weights are NaN somewhere."""
    for layer in layers:
        check_weight(layer.weight, layer.pattern, names[layer])
    if not layers:  # there may be no library
        return {}
    selected = products.select_masks([layer.weight for layer in layers], [layer.pattern for layer in layers])
    return {
        layer: Choice.of(layer, Selection(masked, mask), checksum)
        for layer, (masked, mask, nan, checksum) in zip(layers, selected)
        if not nan
    }


def _by_device(layers):
    devices = {}
    for layer in layers:
        devices.setdefault(layer.weight.device, []).append(layer)
    return devices.values()


def _work(layer, dtype):
    """What selects the layer's mask; with dtype None, what sums its weight up."""
    weight = layer.weight.detach()
    selection = dtype and kernel.new_selection(weight, dtype, layer.needs_mask())
    return Work(weight, layer.pattern or Pattern(2, 4), selection)


def check(choices, names):
    """Raise InputError, naming the layer, for a weight that is not what it was when it was chosen from.

    choices: {layer: Choice}. On a GPU nothing waits: the error is raised by one of the next calls.
    """
    summed = {}
    for layer, choice in choices.items():
        weight = layer.weight
        if isinstance(choice.checksum, int):
            if weight is not choice.weight or not weight.is_cpu or _checksum(weight) != choice.checksum:
                raise InputError(CHANGED.format(names[layer]))
            continue
        by_kernel = not choice.checksum.dim()
        moved = weight.device != choice.checksum.device or (by_kernel and weight.dtype not in kernel.DTYPES)
        if moved or weight is not choice.weight:
            raise InputError(CHANGED.format(names[layer]))
        if by_kernel:
            summed.setdefault(weight.device, []).append(layer)
            continue
        report(_checksum(weight) != choice.checksum, [names[layer]], CHANGED)
    for layers in summed.values():
        now = kernel.launch([_work(layer, None) for layer in layers])[0]
        report(now != torch.stack([choices[layer].checksum for layer in layers]), [names[la] for la in layers], CHANGED)


def _checksum(weight):
    """int64 (1,), one more dimension than by the kernel; of a weight on the CPU an int."""
    return checksums(weight)[0] if weight.is_cpu else checksum_on_gpu(weight)[None]


_unseen = []  # (event, flags in host memory, names, message) of the reports from a GPU that have not been looked at


def report(flags, names, message):
    """Raise InputError for the first name whose flag is set; on a GPU, once the flags have arrived."""
    arrived = []
    if flags.is_cuda:
        event, here = torch.cuda.Event(), torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        here.copy_(flags, non_blocking=True)
        event.record()
        _unseen.append((event, here, names, message))
        while _unseen and _unseen[0][0].query():
            arrived.append(_unseen.pop(0)[1:])
    elif not flags.is_meta:
        arrived.append((flags.bool(), names, message))
    for flags, names, message in arrived:
        for name in itertools.compress(names, flags.tolist()):
            raise InputError(message.format(name))


# ---- the optimizer ---------------------------------------------------------------------------------------------------

# what a state dict of torch.optim.AdamW may say of how it computes
_PLAIN = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
_REFUSED = {
    "amsgrad": "there is no maximum of second moments",
    "maximize": "it minimises",
    "differentiable": "nothing differentiates through a step",
    "capturable": "the rates of a step come from the CPU",
    "fused": "it chooses its kernel itself",
    "foreach": "it chooses its kernel itself",
}


class MaskedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that adds the SR-STE decay itself and, in the same pass, selects the masks of new weights.

    On a GPU one kernel reads each masked weight, its gradient and moments once, and writes them, the masked copy for
    the next products and the bits of the mask: 30.1 bytes per weight, computed from the loads and stores. Elsewhere,
    and for other weights than fp32 or frozen masks, the same numbers come from torch. Unmasked parameters get plain
    AdamW. Use:

        optimizer = MaskedAdamW(model.parameters(), lr=2e-4, model=model)
        for x in batches:
            with hold_masks(model, optimizer=optimizer):  # takes over what the last step selected
                loss(model, x).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    params, lr, betas, eps, weight_decay: of AdamW; params may be groups with options of their own.
    model: the module, or several, whose masked layers' weights are among the parameters. Layers that `sparsify` makes
        sparse later, count too.

    Decay: while the optimizer exists, the layers add no decay to the gradients of these weights. The step adds
    decay * (1 - m) * w, with the layer's own `set_masking` decay, after whatever was done to the gradients: they can be
    clipped, accumulated, averaged by DDP or unscaled by a GradScaler, and the decay needs no correction.
    State: as AdamW's, in the parameters' dtype; `state_dict` and `load_state_dict` fit torch.optim.AdamW both ways.
    After loading, and for a model that was loaded, masks are selected anew at the next block. Under a GradScaler a
    skipped step changes nothing.

    Raises: InputError for an option or a parameter that it cannot serve (see the messages), before anything is changed.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module | Iterable[nn.Module],
        **others: object,
    ) -> None:
        for name, value in others.items():
            if value or name not in _REFUSED:
                raise InputError(f"MaskedAdamW has no {name}={value!r}: {_REFUSED.get(name, 'it is no option of it')}")
        models = [model] if isinstance(model, nn.Module) else list(model)
        if not all(isinstance(one, nn.Module) for one in models):
            raise InputError(f"model={model!r}: must be a module, or several")
        found = ((name, m) for one in models for name, m in one.named_modules())
        self._names = {m: name or type(m).__name__ for name, m in found if isinstance(m, nn.Linear | nn.Conv2d)}
        self._choices = {}  # layer: Choice, of the last step or block
        self._wanted = {}  # layer: dtype of the masked weight that the last block asked for
        self._owed = {}  # layer: Choice that a block used, and that the next step compares with what it reads
        self._token = object()
        _check_rates({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(params, lr, betas, eps, weight_decay)
        self._take_over(anew=True)
        weakref.finalize(self, _give_back, list(self._names), self._token).atexit = False

    def __getstate__(self):
        raise InputError("a MaskedAdamW belongs to its model: make another one, and load its state_dict")

    def add_param_group(self, param_group: dict) -> None:
        """As of AdamW. Raises: InputError for parameters or options that it cannot serve."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except InputError:
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of a MaskedAdamW or of a torch.optim.AdamW, fused or not.

        Raises: InputError if it was made with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise InputError(f"the state was made with {name}={group[name]}: {_REFUSED[name]}")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            rates = {
                name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "initial_lr") if name in group
            }
            group.update(tree_map_only(torch.Tensor, float, rates), **_PLAIN)
        for state in self.state.values():
            if "step" in state:
                state["step"] = state["step"].detach().float().cpu()
        self._choices, self._owed = {}, {}

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> object:
        """One step; closure: computes the loss again, which is returned. Raises: InputError, before anything changes,
        for sparse gradients, gradients and moments of another dtype, shape or device than the parameter, and what
        `add_param_group` refuses; naming the layer, for a weight that was changed while its mask was held, and for NaN:
        on a GPU at a later step, on a CPU NaN at the next block."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_group(group)
        layers = {}  # weight: the first of the layers that hold it
        for layer in self._names:
            if isinstance(layer, Masked) and layer.pattern is not None:
                layers.setdefault(layer.weight, layer)
        last, self._choices = self._choices, {}
        self._choices = {layer: choice for layer, choice in last.items() if layer.weight.grad is None}
        del last  # the new masked copies take its memory
        works = {}
        for group in self.param_groups:
            works |= self._step_group(group, layers)
        self._take_over()
        self._finish(works, [layer for layer in layers.values() if layer.weight.grad is not None])
        return loss

    def _step_group(self, group, layers):
        """Makes the step of what torch computes; returns {layer: Work} of what the kernel does."""
        works, plain = {}, ([], [], [], [], [])
        lr, (beta1, beta2), eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state, layer = self._state(weight), layers.get(weight)
            mine = layer is not None and layer._decayed is not None and layer._decayed[1] is self._token
            decay = layer.rule.decay if mine else 0.0
            if layer is not None and layer.mask is None and weight.dtype == torch.float32 and kernel.serves(weight):
                state["step"] += 1
                rates = Rates(lr, (beta1, beta2), eps, weight_decay, decay, int(state["step"]))
                works[layer] = self._step_work(layer, state, rates)
                continue
            g = weight.grad
            if decay:
                g = apply_rule(g, weight, layer.current_mask(), GradientRule(decay))
            for values, value in zip(plain, (weight, g, state["exp_avg"], state["exp_avg_sq"], state["step"])):
                values.append(value)
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        adam(*plain[:4], [], plain[4], decoupled_weight_decay=True, amsgrad=False, maximize=False, **options)
        return works

    def _state(self, weight):
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    def _step_work(self, layer, state, rates):
        order = memory_format(layer.weight)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous(memory_format=order)
        gradient = layer.weight.grad.contiguous(memory_format=order)
        work = _work(layer, self._wanted.get(layer))
        return work._replace(moments=(gradient, state["exp_avg"], state["exp_avg_sq"]), rates=rates)

    def _finish(self, works, stepped):
        """Launch the works, compare what they read with what is owed, and keep what was selected."""
        owed, self._owed = self._owed, {}
        try:
            check({layer: choice for layer, choice in owed.items() if layer not in works}, self._names)
            for layers in _by_device(works):
                totals = kernel.launch([works[layer] for layer in layers])
                for layer, checksum in zip(layers, totals[1]):
                    if works[layer].selection:
                        self._choices[layer] = Choice.of(layer, works[layer].selection, checksum)
                names = [self._names[layer] for layer in layers]
                report(totals[2] != 0, names, NAN)
                before = [owed[layer].checksum if layer in owed else totals[0, i] for i, layer in enumerate(layers)]
                report(totals[0] != torch.stack(before), names, CHANGED)
        except InputError:
            self._choices = {}
            raise
        # held: an older mask; frozen: no choice of the weight, and wrong once it is thawed
        rest = [la for la in stepped if la in self._wanted and la not in works and not la._held and la.mask is None]
        try:
            self._choices |= choose({layer: self._wanted[layer] for layer in rest}, self._names)
        except InputError:  # NaN: the next block, which selects anew, says so
            self._choices = {}

    # ---- with `hold_masks`

    def choices(self, dtypes, names):
        """{layer: Choice}: of the last step, if pattern, dtype and memory format are still the same and torch has seen
        no write to the weight, else a new one."""
        mine = {layer: d for layer, d in dtypes.items() if layer in self._names and layer.mask is None}
        ready = {}
        for layer, dtype in mine.items():
            choice = self._choices.get(layer)
            known = choice and (choice.pattern, choice.version) == (layer.pattern, _version(layer.weight))
            if known and choice.weight is layer.weight:
                masked, mask, *_ = choice.selection
                fits = masked.dtype == dtype and masked.device == layer.weight.device
                fits = fits and memory_format(masked) == memory_format(layer.weight)  # in which its checksum was taken
                if fits and (mask is not None or not layer.needs_mask()):
                    ready[layer] = choice
        self._wanted |= mine
        fresh = choose({layer: d for layer, d in dtypes.items() if layer not in ready}, names)
        self._choices |= {layer: choice for layer, choice in fresh.items() if layer in mine and not layer._held}
        return ready | fresh

    def settle(self, choices, names):
        """After a block: check what it used; of a training step on a GPU let the step compare what it reads anyway."""
        later = {}
        if torch.is_grad_enabled():
            mine = {la: c for la, c in choices.items() if self._choices.get(la) is c and kernel.serves(la.weight)}
            later = {layer: choice for layer, choice in mine.items() if not choice.checksum.dim()}
        self._owed |= later
        try:
            check({layer: choice for layer, choice in choices.items() if layer not in later}, names)
        except InputError:
            self._choices = {}
            raise

    # ---- what it takes over, and what it refuses

    def _take_over(self, anew=False):
        """The decay of the weights among the parameters. anew: also from another MaskedAdamW."""
        owned = {p for group in self.param_groups for p in group["params"]}
        for layer in self._names:
            if not isinstance(layer, Masked) or layer.weight not in owned:
                continue
            if anew or layer._decayed is None or layer._decayed[0] is not layer.weight:
                layer._decayed = layer.weight, self._token

    def _check_group(self, group):
        _check_rates(group)
        for name, rule in _REFUSED.items():
            if group.get(name):
                raise InputError(f"MaskedAdamW has no {name}={group[name]!r}: {rule}")
        for p in group["params"]:
            if is_sharded(p):
                raise InputError(f"MaskedAdamW: a parameter of shape {tuple(p.shape)} is sharded (a DTensor)")
            if not p.is_floating_point():
                raise InputError(f"MaskedAdamW: a parameter is {p.dtype}, and must be real floating point")
            if p.grad is not None and p.grad.layout != torch.strided:
                raise InputError(f"MaskedAdamW: a gradient of shape {tuple(p.shape)} is sparse: it must be dense")
            for name, tensor in {} if p.grad is None else {"grad": p.grad, **self.state.get(p, {})}.items():
                if name != "step" and _form(tensor) != _form(p):
                    found = f"{name} is {_form(tensor)}, its parameter {_form(p)}"
                    raise InputError(f"MaskedAdamW: {found}, and they must be alike ({RELOAD})")
        others = (p for other in self.param_groups for p in other["params"])  # one of them tells the device of all
        devices = {p.device for p in itertools.chain(group["params"], itertools.islice(others, 1))}
        if len(devices) > 1:
            names = " and ".join(sorted(map(str, devices)))
            raise InputError(f"MaskedAdamW: all parameters must be on one device, not on {names}")


def _form(tensor):
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _check_rates(group):
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise InputError(f"MaskedAdamW: {name}={value!r} must be a number of at least 0, and finite")
    betas = group["betas"]
    two = isinstance(betas, tuple | list) and len(betas) == 2
    if not two or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas):
        raise InputError(f"MaskedAdamW: betas={betas!r} must be two numbers from 0 to 1, 1 excluded")


def _give_back(layers, token):
    """The layers add the decay themselves again: their optimizer is gone."""
    for layer in layers:
        if isinstance(layer, Linear | Conv2d) and layer._decayed is not None and layer._decayed[1] is token:
            layer._decayed = None
