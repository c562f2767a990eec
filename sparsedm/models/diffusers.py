"""Convert weights and configuration of our DDPM U-Net and DiT to the `diffusers` library and back.

    config = config_from_diffusers(json.load(open("config.json")))
    model = build_model(config)
    model.load_state_dict(from_diffusers(safetensors.torch.load_file("diffusion_pytorch_model.safetensors"), config))

and back: UNet2DModel(**config_to_diffusers(config)).load_state_dict(to_diffusers(model.state_dict(), config)).

Each network is a row of `FORMATS`. diffusers publishes the official weights of DiT, but its network differs: the
epsilon of norm2 is 1e-5 (unless its configuration says more), officially 1e-6; the time frequencies go down to 1e-4,
officially not quite. Our DiT follows the official code.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparsedm.errors import InputError
from sparsedm.models import model_config
from sparsedm.models.dit import position_embedding


class Format(NamedTuple):
    """How diffusers stores one kind of network.

    names: our names -> diffusers' names, for parts of dotted names. N is the number of any block; if only diffusers'
    name has an N, each block holds a copy. old_names: diffusers' -> our names, in older checkpoints. fixed: options
    with only one value in our network. left_out: the meaning of a missing option, if it is not the value in `fixed`.
    rules: of `_RULES`, for options that to_config computes with. ignored: options without effect. computed: {name:
    function of the configuration}, our tensors that diffusers does not have.
    """

    to_options: Callable
    to_config: Callable
    names: dict
    old_names: dict
    fixed: dict
    left_out: dict
    rules: dict  # {option: name}
    ignored: frozenset = frozenset()
    computed: dict = {}


def _ddpm_options(config):
    if config.ddsm:
        raise InputError(
            f"ddsm={config.ddsm}: a network that computes as DDSM's code does is no UNet2DModel of this kind"
        )
    attend = ["Attn" if resolution in config.attention else "" for resolution in config.resolutions]
    return FORMATS["ddpm"].fixed | {
        "sample_size": config.image_size,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "block_out_channels": [config.width * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.blocks,
        "down_block_types": [f"{attn}DownBlock2D" for attn in attend],
        "up_block_types": [f"{attn}UpBlock2D" for attn in reversed(attend)],
        "norm_num_groups": config.groups,
        "dropout": config.dropout,
        "num_class_embeds": config.label_rows or None,
    }


def _ddpm_config(options):
    size, channels = options["sample_size"], options["block_out_channels"]
    return dict(
        kind="ddpm",
        image_size=size,
        channels=options["in_channels"],
        width=channels[0],
        multipliers=tuple(count // channels[0] for count in channels),
        blocks=options["layers_per_block"],
        attention=tuple(size >> i for i, kind in enumerate(options["down_block_types"]) if kind == "AttnDownBlock2D"),
        groups=options["norm_num_groups"],
        dropout=options["dropout"],
        num_classes=options["num_class_embeds"] or 0,
        null_label=not options["num_class_embeds"],
    )


def _dit_options(config):
    if not (config.num_classes and config.null_label):
        raise InputError("the network has no null label, and DiTTransformer2DModel always has one")
    if config.mlp_ratio != 4:
        raise InputError(f"mlp_ratio={config.mlp_ratio}: DiTTransformer2DModel always has 4")
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.image_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": 1e-6,
    }


def _dit_config(options):
    channels, outputs = options["in_channels"], options["out_channels"] or options["in_channels"]
    if outputs not in (channels, 2 * channels):
        raise InputError(f"diffusers option out_channels={outputs!r}: DiT has in_channels={channels} or twice as many")
    options["out_channels"] = outputs
    return dict(
        kind="dit",
        image_size=options["sample_size"],
        channels=channels,
        patch_size=options["patch_size"],
        dim=options["num_attention_heads"] * options["attention_head_dim"],
        depth=options["num_layers"],
        heads=options["num_attention_heads"],
        num_classes=options["num_embeds_ada_norm"],
        learn_sigma=outputs == 2 * channels,
    )


def _positive(value):
    return type(value) is int and value > 0


_POSITIVE = "a positive integer"
_RULES = {
    _POSITIVE: _positive,
    "a list of positive integers": lambda value: type(value) is list and value and all(map(_positive, value)),
    "a list": lambda value: type(value) is list,
}


def _pairs(text):
    return dict(pair.split(":") for pair in text.split())


_DIT_SIZES = {  # and their defaults there
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
FORMATS = {  # by our kind
    "ddpm": Format(
        _ddpm_options,
        _ddpm_config,
        names=_pairs(
            "down:down_blocks mid:mid_block up:up_blocks blocks:resnets attns:attentions time_proj:time_emb_proj "
            "shortcut:conv_shortcut downsample:downsamplers.0 upsample:upsamplers.0 norm:group_norm "
            "norm_out:conv_norm_out q:to_q k:to_k v:to_v proj:to_out.0 time_embed:time_embedding fc1:linear_1 "
            "fc2:linear_2 label_embed:class_embedding"
        ),
        old_names=_pairs("query:q key:k value:v proj_attn:proj"),  # before 2023: google/ddpm-cifar10-32
        fixed={
            "act_fn": "silu",
            "add_attention": True,
            "attention_head_dim": None,
            "attn_norm_num_groups": None,
            "center_input_sample": False,
            "class_embed_type": None,
            "downsample_padding": 0,
            "downsample_type": "conv",
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2D",
            "norm_eps": 1e-6,
            "num_train_timesteps": None,
            "resnet_time_scale_shift": "default",
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "upsample_type": "conv",
        },
        left_out={
            "out_channels": 3,
            "attention_head_dim": 8,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "norm_eps": 1e-5,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "dropout": 0.0,
            "num_class_embeds": None,
        },
        rules=dict.fromkeys(("sample_size", "in_channels", "layers_per_block", "norm_num_groups"), _POSITIVE)
        | dict.fromkeys(("down_block_types", "up_block_types"), "a list")
        | {"block_out_channels": "a list of positive integers"},
    ),
    "dit": Format(
        _dit_options,
        _dit_config,
        names=_pairs(
            "x_embedder:pos_embed blocks:transformer_blocks adaLN_modulation.1:norm1.linear attn.q:attn1.to_q "
            "attn.k:attn1.to_k attn.v:attn1.to_v attn.proj:attn1.to_out.0 mlp.fc1:ff.net.0.proj mlp.fc2:ff.net.2 "
            "final_layer.adaLN_modulation.1:proj_out_1 final_layer.linear:proj_out_2 "
            "t_embedder.mlp.0:transformer_blocks.N.norm1.emb.timestep_embedder.linear_1 "
            "t_embedder.mlp.2:transformer_blocks.N.norm1.emb.timestep_embedder.linear_2 "
            "y_embedder:transformer_blocks.N.norm1.emb.class_embedder"
        ),
        old_names={},
        fixed={
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_type": "default",
            "dropout": 0.0,
            "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero",
        },
        left_out=_DIT_SIZES | {"out_channels": None},
        rules=dict.fromkeys(_DIT_SIZES, _POSITIVE),
        ignored=frozenset({"norm_num_groups", "norm_eps", "upcast_attention"}),  # norm_eps: see the top of this file
        computed={"pos_embed": lambda config: position_embedding(config.dim, config.image_size // config.patch_size)},
    ),
}
CLASSES = {"UNet2DModel": "ddpm", "DiTTransformer2DModel": "dit", "Transformer2DModel": "dit"}  # the last until 2024


def config_to_diffusers(config):
    """DDPMConfig or DiTConfig -> the arguments of UNet2DModel or DiTTransformer2DModel, as a dict that JSON can hold.

    Raises: InputError for a network that diffusers' class cannot express.
    """
    return _format(config).to_options(config)


_OF_EMA = {  # what diffusers' EMAModel stores among the options of the network
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power",
}  # fmt: skip


def config_from_diffusers(options):
    """The config.json of a UNet2DModel, DiTTransformer2DModel or Transformer2DModel, as a dict -> our configuration.

    All labels of a U-Net count as real classes (no null label).
    Raises: InputError if an option is missing, unknown, or needs a network that we do not have.
    """
    name = options.get("_class_name", "UNet2DModel" if "block_out_channels" in options else "DiTTransformer2DModel")
    if name not in list(CLASSES):
        raise InputError(
            f"a diffusers folder of a {name}, and only UNet2DModel and DiTTransformer2DModel have a counterpart here: "
            "sparsify the diffusers model itself"
        )
    kind = CLASSES[name]
    form, ours = FORMATS[kind], {"ddpm": "DDPM", "dit": "DiT"}[kind]
    left_out = form.left_out | ({"norm_type": "layer_norm"} if name == "Transformer2DModel" else {})
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    options = left_out | {key: value for key, value in options.items() if not key.startswith("_")}
    for key, rule in form.rules.items():
        if not _RULES[rule](options.get(key)):
            raise InputError(f"diffusers option {key}={options.get(key)!r}: must be {rule}")
    config = model_config(form.to_config(options))
    expected = form.fixed | form.to_options(config)
    for key, value in options.items():
        # Transformer2DModel also stores all options that it does not use
        if key not in expected and key not in form.ignored | _OF_EMA and value not in (None, False):
            raise InputError(f"diffusers option {key}={value!r}: {ours} knows no such option")
        if key in expected and key not in form.ignored and value != expected[key]:
            raise InputError(f"diffusers option {key}={value!r}: {ours} would need {expected[key]!r}")
    return config


def _format(config):
    return FORMATS["dit" if config.kind == "dit" else "ddpm"]  # a slimmable network is a DDPM


def _rename(key, names):
    """`key` with the dotted parts that `names` lists renamed, longer ones first. N in a name stands for any number."""
    parts = "|".join(re.escape(part).replace(r"\.N\.", r"\.\d+\.") for part in sorted(names, key=len, reverse=True))

    def other(match):
        part = match[1]
        return names[part] if part in names else names[re.sub(r"\.\d+\.", ".N.", part, count=1)]

    return re.sub(rf"(?<![^.])({parts})(?![^.])", other, key)


def to_diffusers(state, config):
    """Our state dict -> a state dict of diffusers' class. The tensors are shared, except q, k and v.

    The weights are not masked: for a sparse model put masked weights into `state` first.
    Raises: InputError for a frozen mask, or a network that diffusers' class cannot express.
    """
    form = _format(config)
    form.to_options(config)
    blocks = sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}, key=int)
    renamed = {}
    for key, value in state.items():
        if key.endswith(".mask"):
            raise InputError(f"{key} is a frozen mask, which diffusers cannot hold: multiply it into the weight")
        if key in form.computed:
            continue
        parts = {key: value}
        if ".qkv." in key:
            parts = {key.replace(".qkv.", f".{letter}."): p.clone() for letter, p in zip("qkv", value.chunk(3))}
        for name, part in parts.items():
            other = _rename(name, form.names)
            copies = [other.replace(".N.", f".{number}.") for number in blocks] if ".N." in other else [other]
            renamed |= dict.fromkeys(copies, part)
    return renamed


def from_diffusers(state, config):
    """A state dict of diffusers, with current or old attention names -> one for the network of `config`.

    The inverse of `to_diffusers`. Unknown keys stay, so that `load_state_dict` lists them.
    Raises: InputError if an attention lacks one of q, k and v, or if the copies of an embedder differ.
    """
    form = _format(config)
    names = {theirs: ours for ours, theirs in form.names.items()} | form.old_names
    with next(iter(state.values()), torch.empty(0)).device:  # not torch's default one
        computed = {name: compute(config) for name, compute in form.computed.items()}
    return rename_state(state, names, computed)


def rename_state(state, names, computed=None):
    """A state dict with parts of names renamed by `names`, each q, k, v joined to qkv, and `computed` added.

    Raises: InputError if q, k or v is missing, or two tensors of one new name differ.
    """
    split = dict(computed or {})
    for key, value in state.items():
        name = _rename(key, names)
        if name in split and not torch.equal(split[name], value):
            raise InputError(f"{key} differs from that of another block, and our network has one for all")
        split[name] = value
    renamed = {}
    for key, value in split.items():
        match = re.fullmatch(r"(.*\.)[qkv](\.\w+)", key)
        if match:
            parts = [match[1] + letter + match[2] for letter in "qkv"]
            missing = [part for part in parts if part not in split]
            if missing:
                raise InputError(f"the state dict has {key} but not {' and '.join(missing)}")
            value = torch.cat([split[part] for part in parts])
        renamed[f"{match[1]}qkv{match[2]}" if match else key] = value
    return renamed
