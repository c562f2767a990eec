"""sparsedm: 2:4 (and N:M) sparse diffusion models. The public names are imported on first use."""

import importlib

__version__ = "0.2.0"

_HOME = {
    "Pattern": "sparsedm.kernels.pattern",
    "Linear": "sparsedm.layers",
    "Conv2d": "sparsedm.layers",
    "CompressedLinear": "sparsedm.layers",
    "CompressedConv2d": "sparsedm.layers",
    "Linear24": "sparsedm.layers",
    "Conv2d24": "sparsedm.layers",
    "sparsify": "sparsedm.sparsity",
    "compress": "sparsedm.sparsity",
    "decompress": "sparsedm.sparsity",
    "permute_channels": "sparsedm.permutation",
    "inspect": "sparsedm.inspection",
    "build_model": "sparsedm.models",
    "save_model": "sparsedm.model_files",
    "load_model": "sparsedm.model_files",
    "InputError": "sparsedm.errors",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'sparsedm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
