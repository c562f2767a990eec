"""A hook on a masked weight that adds the decay of SR-STE to its gradient, once per backward (arXiv 2102.04010).

`layers.Masked` makes the hooks, and says in `rule_of_forward` which backward adds the decay without one.
"""

import weakref

import torch

from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.straight_through import GradientRule, apply_rule
from sparsedm.kernels.tracing import transformed


class DecayHook:
    """A hook on a weight: adds decay * (1 - m) * w to its gradient.

    The rule is that of the layer whose forward this backward passes. In a compiled graph no layer notes itself: then
    the rule is that of the last layer that hooked the weight and still has it, and a pattern.
    """

    __torch_unserializable__ = True  # another process hooks its own

    def __init__(self, place):
        self.layers = []  # weak references, the latest first
        self.place = place  # of the tensor behind the weight
        self.used = None, None, None  # number of a backward, layer, weight: under functional_call not the layer's own
        self.left = None  # number of a backward that adds the decay to a weight which is computed from this one

    @classmethod
    def on(cls, weight):
        """The hook of a weight, which is made if need be."""
        hook = decay_hook_of(weight)  # sought every time: `swap_tensors` leaves the hooks, which then are never called
        if hook is None or hook.place != weight._cdata:
            weight._backward_hooks = None if hook else weight._backward_hooks  # or torch thinks that it knows them
            hook = cls(weight._cdata)
            weight.register_hook(hook)
        return hook

    def take(self, layer):
        if not self.layers or self.layers[0]() is not layer:
            self.layers = [weakref.ref(layer), *(known for known in self.layers if known() not in (None, layer))]

    def acts(self, layer, lent=False):
        return layer.pattern is not None and layer.rule.decay != 0.0 and (lent or not layer._is_decayed())

    def note(self, layer, weight):
        self.used = torch._C._current_graph_task_id(), layer, weight

    def leave(self):
        self.left = torch._C._current_graph_task_id()

    def __call__(self, g):
        (backward, layer, weight), self.used = self.used, (None, None, None)
        now = torch._C._current_graph_task_id()
        if self.left == now:
            return None
        if backward != now:
            living = (known() for known in self.layers)
            mine = (la for la in living if la is not None and decay_hook_of(la.weight) is self and self.acts(la))
            layer = next(mine, None)
            if layer is None:
                return None
            weight = layer.weight
        if not self.acts(layer, lent=weight is not layer.weight):
            return None
        mask = layer.mask
        if weight is layer.weight:
            mask = layer.current_mask()
        elif mask is None:
            mask = select_mask(weight, layer.pattern).mask
        return apply_rule(g, weight, mask, GradientRule(layer.rule.decay))


def is_computed_from(weight, leaf):
    """Whether `functional_call` lends a weight whose eager graph reaches this leaf."""
    if weight.is_leaf or transformed() or torch.compiler.is_compiling():
        return False
    nodes = seen = {weight.grad_fn}
    while nodes:
        if any(getattr(node, "variable", None) is leaf for node in nodes):
            return True
        nodes = {after for node in nodes for after, _ in node.next_functions if after} - seen
        seen = seen | nodes
    return False


def decay_hook_of(weight):
    """The `DecayHook` among the hooks of a weight, or None."""
    hooks = (weight._backward_hooks or {}).values()
    return next((hook for hook in hooks if isinstance(hook, DecayHook)), None)


def remove_decay_hook(weight):
    hooks = weight._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, DecayHook)]:
        del hooks[key]
