"""N:M of activations instead of weights (RT-Lynx, arXiv 2605.26632): layers read only their largest inputs.

    y = W (r · m · x) + b,   m: the N largest |x| of every M inputs,   r = |x| / |m · x| for each token

r, the norm compensation, has no gradient. Only kept inputs pass a gradient on. This is an experiment: no kernel here
gains from it. Forward hooks implement it; a deep copy of the network has them, a model file does not, and says so.
"""

import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.inspection import inspect
from sparsedm.kernels.mask import select_mask
from sparsedm.kernels.pattern import Pattern


class KeepLargest:
    """A forward pre-hook of a Linear or Conv2d. Its groups run along the features or the input channels."""

    def __init__(self, pattern):
        self.pattern = pattern

    def __call__(self, layer, inputs):
        x, *more = inputs
        axis = -1 if isinstance(layer, nn.Linear) else 1
        return keep_largest(x, self.pattern, axis), *more


def keep_largest(x, pattern, axis=-1, compensate=True):
    """x with all but the `pattern.keep` largest of every group along `axis` set to 0; x's shape and dtype.

    compensate: scale the kept values so that the norm along `axis` does not change.
    """
    x = x.movedim(axis, -1)
    try:
        mask = select_mask(x.detach().flatten(0, -2), pattern, name="an activation").mask.view(x.shape)
    except InputError as error:  # which speaks of weights, and a GPU may mean an earlier one
        if nans := int(x.isnan().sum()):
            raise InputError(f"the inputs of a layer: {nans} of them are NaN, which has no magnitude order") from error
        raise
    kept = torch.where(mask, x, 0)
    if compensate:
        norms = [value.detach().float().norm(dim=-1, keepdim=True) for value in (x, kept)]
        kept = kept * (norms[0] / norms[1].clamp(min=1e-12)).to(kept.dtype)
    return kept.movedim(-1, axis)


def sparsify_activations(network, names, pattern="2:4"):
    """Hook the layers `names` of the network, in place, and return it.

    Raises: InputError if no layer can hold the pattern along its inputs.
    """
    pattern = Pattern.parse(pattern)
    layers = [network.get_submodule(name) for name in names]
    fitting = [layer for layer in layers if layer.weight.shape[1] % pattern.group == 0]
    if not fitting:
        raise InputError(f"no layer has inputs in groups of {pattern.group}: nothing can read {pattern} of them")
    for layer in fitting:
        layer.register_forward_pre_hook(KeepLargest(pattern))
    network.unsaved = f"hooks that prune its inputs to {pattern}"
    return network


def macs(network):
    """MACs of one image; hooked layers count only kept inputs. Without hooks the same as `inspect`."""
    hooks = {name: [h for h in layer._forward_pre_hooks.values() if isinstance(h, KeepLargest)]
             for name, layer in network.named_modules()}  # fmt: skip
    found = inspect(network)
    saved = sum(row.macs_after * (1 - hooks[row.name][0].pattern.density) for row in found.rows if hooks[row.name])
    return found.totals()["macs_after"] - round(saved)
