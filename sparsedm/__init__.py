"""sparsedm: 2:4 (and N:M) sparse diffusion models. The public names are imported on first use."""

import importlib
import sys
import types

__version__ = "0.2.0"

_HOME = {
    "Pattern": "sparsedm.kernels.pattern",
    "Linear": "sparsedm.layers",
    "Conv2d": "sparsedm.layers",
    "CompressedLinear": "sparsedm.layers",
    "CompressedConv2d": "sparsedm.layers",
    "Linear24": "sparsedm.layers",
    "Conv2d24": "sparsedm.layers",
    "sparsify": "sparsedm.sparsify",
    "compress": "sparsedm.sparsify",
    "decompress": "sparsedm.sparsify",
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


class _Package(types.ModuleType):
    """`sparsedm.sparsify` stays the function when the module of that name is imported, which binds its name here."""

    def __setattr__(self, name, value):
        own = isinstance(value, types.ModuleType) and name in _HOME
        super().__setattr__(name, getattr(value, name) if own else value)


sys.modules[__name__].__class__ = _Package


def __dir__():
    return sorted([*globals(), *_HOME])
