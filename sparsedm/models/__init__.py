"""The models by name. `build_model` makes a network from a name or from a checkpoint's configuration.

Every model is an nn.Module with
    forward(x, t, y=None) -> noise     x (B, C, H, W); t (B,) in units 0..999; y (B,) int64 labels or None
    config                             frozen dataclass, JSON through dataclasses.asdict; always has kind, image_size,
                                       channels, schedule (a name in `diffusion.SCHEDULES`) and num_classes
                                       (0 = unconditional; label num_classes = the null label)
    sparse_layers                      regular expression on layer names: the layers that `sparsify` masks by default
    example_inputs(batch=1)            arguments for forward
"""

import contextlib
import json
import warnings
from dataclasses import fields, replace

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsedm.errors import InputError, check_memory
from sparsedm.models.ddpm import DDPM, DDPMConfig
from sparsedm.models.ddpm import PRESETS as DDPM_PRESETS
from sparsedm.models.dit import PRESETS as DIT_PRESETS
from sparsedm.models.dit import DiT, DiTConfig
from sparsedm.models.slimmable import PRESETS as SLIMMABLE_PRESETS
from sparsedm.models.slimmable import SlimmableConfig, SlimmableDDPM
from sparsedm.models.uvit import PRESETS as UVIT_PRESETS
from sparsedm.models.uvit import UViT, UViTConfig

MODELS = {**UVIT_PRESETS, **DIT_PRESETS, **DDPM_PRESETS, **SLIMMABLE_PRESETS}
MOST_LAYERS, MOST_NUMBER = 128, 2**24  # limits of a configuration, against networks that could never be built
_KINDS = {
    "uvit": (UViTConfig, UViT),
    "dit": (DiTConfig, DiT),
    "ddpm": (DDPMConfig, DDPM),
    "slimmable": (SlimmableConfig, SlimmableDDPM),
}


def build_model(
    model: str | dict | object,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides,
) -> torch.nn.Module:
    """A network with fresh random weights, drawn from torch's global generator of the device.

    model: a name in MODELS, a configuration object, or a configuration as a dict (such as a checkpoint's JSON).
    device: where to create it; "meta" for shapes without memory. dtype: of the parameters. overrides: options of the
    model's configuration, for example image_size=16.
    Raises: InputError for an unknown name or option, a value of the wrong type, or options that do not fit together.
    """
    config = model_config(model, **overrides)
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise InputError(f"dtype={dtype!r}: a dtype of floating-point numbers is needed, such as torch.bfloat16")
    try:
        place = contextlib.nullcontext() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r} is not a device of torch") from error
    with _within_memory(), place:
        network = _KINDS[config.kind][1](config)
    return network if dtype is None else network.to(dtype)


@contextlib.contextmanager
def _within_memory():
    """Raise InputError as soon as a network's parameters exceed the memory. The system would kill the process."""
    held = 0

    def add(module, name, parameter):
        nonlocal held
        if parameter is not None and parameter.device.type == "cpu":
            held += parameter.nbytes
            check_memory(held, "the network")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def model_config(model, **overrides):
    """The configuration that `build_model` would use. Builds nothing; same arguments and errors."""
    if isinstance(model, dict):
        options = dict(model)
        kind = options.pop("kind", None)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise InputError(f"unknown model kind {kind!r}: one of {', '.join(_KINDS)}")
        config_class = _KINDS[kind][0]
        config = config_class(**_checked(config_class, options))
        if "schedule" not in model and (note := schedule_note(config)):
            warnings.warn(f"a file from before schedules were stored: {note}; import the original again", stacklevel=3)
    elif isinstance(model, tuple(config_class for config_class, _ in _KINDS.values())):
        config = model
    elif isinstance(model, str) and model in MODELS:
        config = MODELS[model]
    else:
        raise InputError(f"unknown model {model!r}: one of {', '.join(MODELS)}")
    return replace(config, **_checked(type(config), overrides))


# how a slimmable network is trained; the biases that SparseDM's networks have beside the published ones
_VARIANTS = ("passes", "same_images", "qkv_bias")


def same_network(config, preset, *free):
    """Whether a configuration is of the preset's network; `_VARIANTS` and the options `free` are not compared."""
    if type(config) is not type(preset):
        return False
    return config == replace(preset, **{n: getattr(config, n) for n in (*_VARIANTS, *free) if hasattr(preset, n)})


def schedule_note(config):
    """A sentence if the network was published with another noise schedule than it has here, else None."""
    for name, published in MODELS.items():
        if published.schedule != config.schedule and same_network(config, published, "schedule"):
            return f"schedule {config.schedule}: {name} was published with {published.schedule}"
    return None


def parse_overrides(texts):
    """["image_size=16", "final_conv=false"] -> {"image_size": 16, "final_conv": False}. A value is JSON, else text.

    Raises: InputError for an entry without "=".
    """
    overrides = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r}: write name=value, for example --set image_size=16")
        try:
            overrides[name] = json.loads(value)
        except (ValueError, RecursionError):
            overrides[name] = value
    return overrides


def _checked(config_class, options):
    """`options` with lists as tuples. Raises InputError if one is no field of `config_class` or has another type."""
    types = {field.name: field.type for field in fields(config_class) if field.name != "kind"}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in options.items():
        if name not in types:
            raise InputError(f"unknown model option {name!r}: one of {', '.join(types)}")
        if not _fits(value, types[name]):
            such_as = {bool: ", true or false", tuple: ", whole numbers such as [1,2]"}.get(types[name], "")
            raise InputError(f"model option {name}={value!r}: must be of type {types[name].__name__}{such_as}")
        numbers = value if isinstance(value, tuple) else (value,) if type(value) in (int, float) else ()
        most = MOST_LAYERS if name in ("depth", "blocks") else MOST_NUMBER
        if len(numbers) > MOST_LAYERS or not all(-most <= number <= most for number in numbers):
            shown = f"{value!r:.40}"
            rule = f"at most {MOST_LAYERS} numbers, each" if isinstance(value, tuple) else "must be"
            raise InputError(f"model option {name}={shown}: {rule} from -{most} to {most}")
    return options


def _fits(value, wanted):
    if wanted is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    return type(value) in ((int, float) if wanted is float else (wanted,))
