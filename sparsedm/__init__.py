"""sparsedm: 2:4 (and N:M) sparse diffusion models. The public names are imported on first use."""

import importlib

TYPE_CHECKING = False  # type checkers read it as True
if TYPE_CHECKING:
    from sparsedm.compressed import CompressedConv2d, CompressedLinear, Conv2d24, Linear24
    from sparsedm.compression import bake, compress, decompress
    from sparsedm.errors import InputError
    from sparsedm.inspection import inspect
    from sparsedm.kernels.pattern import Pattern
    from sparsedm.layers import Conv2d, Linear
    from sparsedm.model_files import load_model, save_model
    from sparsedm.models import build_model
    from sparsedm.optim import MaskedAdamW
    from sparsedm.permutation import permute_channels
    from sparsedm.sparsity import hold_masks, set_masking, sparsify

__version__ = "0.2.0"

_HOME = {
    "Pattern": "sparsedm.kernels.pattern",
    "Linear": "sparsedm.layers",
    "Conv2d": "sparsedm.layers",
    "CompressedLinear": "sparsedm.compressed",
    "CompressedConv2d": "sparsedm.compressed",
    "Linear24": "sparsedm.compressed",
    "Conv2d24": "sparsedm.compressed",
    "sparsify": "sparsedm.sparsity",
    "set_masking": "sparsedm.sparsity",
    "hold_masks": "sparsedm.sparsity",
    "MaskedAdamW": "sparsedm.optim",
    "compress": "sparsedm.compression",
    "decompress": "sparsedm.compression",
    "bake": "sparsedm.compression",
    "permute_channels": "sparsedm.permutation",
    "inspect": "sparsedm.inspection",
    "build_model": "sparsedm.models",
    "save_model": "sparsedm.model_files",
    "load_model": "sparsedm.model_files",
    "InputError": "sparsedm.errors",
}
# spelled out, because type checkers take only these names for public
__all__ = [
    "Pattern",
    "Linear",
    "Conv2d",
    "CompressedLinear",
    "CompressedConv2d",
    "Linear24",
    "Conv2d24",
    "sparsify",
    "set_masking",
    "hold_masks",
    "MaskedAdamW",
    "compress",
    "decompress",
    "bake",
    "permute_channels",
    "inspect",
    "build_model",
    "save_model",
    "load_model",
    "InputError",
]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'sparsedm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
