"""How much memory one image takes in a network: of a forward pass, and of what autograd keeps for the backward pass."""

import torch

from sparsedm.copying import meta_twin
from sparsedm.inspection import LAYERS, is_layer, weight_shape


def most_kept_per_image(model):
    """An upper bound of `kept_per_image` for networks such as ours, from the widths of their layers. Runs nothing."""
    config = model.config
    positions = (config.image_size // getattr(config, "patch_size", 1)) ** 2 + getattr(config, "context_tokens", 0) + 2
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    widths = sum(sum(weight_shape(layer)[:2]) for layer in layers)
    attention = len(layers) * getattr(config, "heads", 0) * positions // 4  # in about every fourth layer
    return 4 * 4 * positions * (widths + attention)  # of 4 bytes each, 0.1 to 1.45 times as many are kept


def kept_per_image(model):
    """Bytes of one image that autograd keeps for the backward pass, from two forwards that compute nothing.

    0 if the network cannot run on meta tensors.
    """
    sizes, least = [], max(1, getattr(model.config, "passes", 0))  # a slimmable network divides a batch among widths
    for batch in (least, 2 * least):
        kept = {}  # each tensor once, held so that no other takes its address

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = _on_meta(model, batch, train=True)
        if out is None:
            return 0
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
        del out
    return max(0, sizes[1] - sizes[0]) // least


def _on_meta(model, batch, train=False, hook=None):
    """The output of a copy of the model on meta tensors, None if it cannot run there. hook: of each layer's forward."""
    try:
        twin = meta_twin(model).train(train)
        for module in twin.modules() if hook else ():
            module.register_forward_hook(hook)
        with torch.random.fork_rng([]):
            return twin(*(None if x is None else x.to("meta") for x in model.example_inputs(batch)))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


@torch.no_grad()
def live_per_image(model):
    """Bytes of one image that a forward needs at once, at least: the input and output of its widest layer."""
    most = [0]

    def note(layer, inputs, output):
        if is_layer(layer) and isinstance(output, torch.Tensor):
            most.append(sum(4 * x.numel() for x in (*inputs[:1], output)))

    _on_meta(model, 1, hook=note)
    return max(most)
