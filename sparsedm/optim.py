"""`MaskedAdamW`: AdamW that also selects the masks."""

import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from numbers import Real

import torch
from torch import nn
from torch.optim.adam import adam
from torch.utils._pytree import tree_map_only

from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw as kernel
from sparsedm.kernels.masked_adamw import Rates
from sparsedm.kernels.pattern import memory_format
from sparsedm.kernels.straight_through import GradientRule, apply_rule
from sparsedm.layers import Conv2d, Linear, Masked, is_sharded
from sparsedm.selections import (
    CHANGED,
    NAN,
    Selected,
    by_device,
    check_unchanged,
    raise_flagged,
    select_all,
    version_of,
    work_of,
)

RELOAD = "moments are moved by optimizer.load_state_dict(optimizer.state_dict())"
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
        if sys._getframe(1).f_globals.get("__name__", "").endswith("zero_redundancy_optimizer"):
            why = "it takes over the decay of the weights that it has, and in ZeRO each process has others"
            raise InputError(f"MaskedAdamW cannot be used by a ZeroRedundancyOptimizer: {why}; use torch.optim.AdamW")
        models = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
        if not all(isinstance(one, nn.Module) for one in models):
            raise InputError(f"model={model!r}: must be a module, or several")
        found = ((name, m) for one in models for name, m in one.named_modules())
        self._names = {m: name or type(m).__name__ for name, m in found if isinstance(m, nn.Linear | nn.Conv2d)}
        self._selected = {}  # layer: Selected, of the last step or block
        self._wanted = {}  # layer: dtype of the masked weight that the last block asked for
        self._owed = {}  # layer: Selected that a block used, and that the next step compares with what it reads
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
        self._selected, self._owed = {}, {}

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
        last, self._selected = self._selected, {}
        self._selected = {layer: one for layer, one in last.items() if layer.weight.grad is None}
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
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    def _step_work(self, layer, state, rates):
        order = memory_format(layer.weight)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous(memory_format=order)
        gradient = layer.weight.grad.contiguous(memory_format=order)
        work = work_of(layer, self._wanted.get(layer))
        return work._replace(moments=(gradient, state["exp_avg"], state["exp_avg_sq"]), rates=rates)

    def _finish(self, works, stepped):
        """Launch the works, compare what they read with what is owed, and keep what was selected."""
        owed, self._owed = self._owed, {}
        try:
            check_unchanged({layer: one for layer, one in owed.items() if layer not in works}, self._names)
            for layers in by_device(works):
                totals = kernel.launch([works[layer] for layer in layers])
                for layer, checksum in zip(layers, totals[1]):
                    if works[layer].selection:
                        self._selected[layer] = Selected.of(layer, works[layer].selection, checksum)
                names = [self._names[layer] for layer in layers]
                raise_flagged(totals[2] != 0, names, NAN)
                before = [owed[layer].checksum if layer in owed else totals[0, i] for i, layer in enumerate(layers)]
                raise_flagged(totals[0] != torch.stack(before), names, CHANGED)
        except InputError:
            self._selected = {}
            raise
        # held: an older mask; frozen: not selected from the weight, and wrong once it is thawed
        rest = [la for la in stepped if la in self._wanted and la not in works and not la._held and la.mask is None]
        try:
            self._selected |= select_all({layer: self._wanted[layer] for layer in rest}, self._names)
        except InputError:  # NaN: the next block, which selects anew, says so
            self._selected = {}

    # ---- with `hold_masks`

    def selected(self, dtypes, names):
        """{layer: Selected}: of the last step, if pattern, dtype and memory format are the same and torch has seen no
        write to the weight, else a new one."""
        mine = {layer: d for layer, d in dtypes.items() if layer in self._names and layer.mask is None}
        ready = {}
        for layer, dtype in mine.items():
            one = self._selected.get(layer)
            known = one and (one.pattern, one.version) == (layer.pattern, version_of(layer.weight))
            if known and one.weight is layer.weight:
                masked, mask, *_ = one.selection
                fits = masked.dtype == dtype and masked.device == layer.weight.device
                fits = fits and memory_format(masked) == memory_format(layer.weight)  # in which its checksum was taken
                if fits and (mask is not None or not layer.needs_mask()):
                    ready[layer] = one
        self._wanted |= mine
        fresh = select_all({layer: d for layer, d in dtypes.items() if layer not in ready}, names)
        self._selected |= {layer: one for layer, one in fresh.items() if layer in mine and not layer._held}
        return ready | fresh

    def settle(self, selected, names):
        """After a block: check what it used; of a training step on a GPU let the step compare what it reads anyway."""
        later = {}
        if torch.is_grad_enabled():
            mine = {la: c for la, c in selected.items() if self._selected.get(la) is c and kernel.serves(la.weight)}
            later = {layer: one for layer, one in mine.items() if not one.checksum.dim()}
        self._owed |= later
        try:
            check_unchanged({layer: one for layer, one in selected.items() if layer not in later}, names)
        except InputError:
            self._selected = {}
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
