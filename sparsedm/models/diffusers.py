"""The DDPM U-Net under the names of the `diffusers` library's UNet2DModel, both ways: weights and configuration.

    model = build_model(config_from_diffusers(json.load(open("config.json"))))
    model.load_state_dict(from_diffusers(safetensors.torch.load_file("diffusion_pytorch_model.safetensors")))

and back: UNet2DModel(**config_to_diffusers(model.config)).load_state_dict(to_diffusers(model.state_dict())).
"""

import re

import torch

from sparsedm.errors import InputError
from sparsedm.models.ddpm import DDPMConfig

# ours -> theirs, part by part of the dotted name; our qkv is three layers there
_NAMES = {
    "down": "down_blocks",
    "mid": "mid_block",
    "up": "up_blocks",
    "blocks": "resnets",
    "attns": "attentions",
    "time_proj": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj": "to_out.0",
    "norm_out": "conv_norm_out",
    "time_embed": "time_embedding",
    "fc1": "linear_1",
    "fc2": "linear_2",
    "label_embed": "class_embedding",
}
_INVERSE_NAMES = {theirs: ours for ours, theirs in _NAMES.items()} | {
    "query": "q",  # the last four are the names in checkpoints from before 2023, such as google/ddpm-cifar10-32
    "key": "k",
    "value": "v",
    "proj_attn": "proj",
}

# the options of UNet2DModel about which our network has no choice
_FIXED = {
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
}
# what leaving an option out means there, where that is not the value above
_LEFT_OUT = {
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
}


def _rename(key, names):
    parts = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda match: names[match[1]], key)


def to_diffusers(state):
    """A DDPM state dict -> one for UNet2DModel. The tensors are shared, except that q, k and v are new.

    The weights go as they are in `state`: for a sparse model put the masked ones in first.
    Raises: InputError for a frozen mask, which UNet2DModel has no place for.
    """
    renamed = {}
    for key, value in state.items():
        if key.endswith(".mask"):
            raise InputError(f"{key} is a frozen mask, which diffusers cannot hold: multiply it into the weight")
        if ".qkv." in key:
            for letter, part in zip("qkv", value.chunk(3)):
                renamed[_rename(key.replace(".qkv.", f".{letter}."), _NAMES)] = part.clone()
        else:
            renamed[_rename(key, _NAMES)] = value
    return renamed


def from_diffusers(state):
    """A UNet2DModel state dict, with today's or the old attention names -> one for DDPM. The inverse of `to_diffusers`.

    Keys that no DDPM has stay in it, so that `load_state_dict` lists them.
    Raises: InputError if an attention has only some of its q, k and v.
    """
    state = {_rename(key, _INVERSE_NAMES): value for key, value in state.items()}
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.)[qkv](\.\w+)", key)
        if match:
            parts = [match[1] + letter + match[2] for letter in "qkv"]
            missing = [part for part in parts if part not in state]
            if missing:
                raise InputError(f"the diffusers state dict has {key} but not {' and '.join(missing)}")
            renamed[f"{match[1]}qkv{match[2]}"] = torch.cat([state[part] for part in parts])
        else:
            renamed[key] = value
    return renamed


def config_to_diffusers(config):
    """DDPMConfig -> the arguments of UNet2DModel, as a dict that JSON can hold."""
    attend = ["Attn" if resolution in config.attention else "" for resolution in config.resolutions]
    return _FIXED | {
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


def config_from_diffusers(options):
    """The config.json of a UNet2DModel, as a dict -> DDPMConfig. All its labels count as real classes (no null label).

    Raises: InputError if an option is missing, unknown, or asks for a network that DDPM is not.
    """
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    options = _LEFT_OUT | {name: value for name, value in options.items() if not name.startswith("_")}
    lists = ("block_out_channels", "down_block_types", "up_block_types")
    for name, kind in [("sample_size", int), ("in_channels", int)] + [(name, list) for name in lists]:
        if not isinstance(options.get(name), kind) or not options[name]:
            raise InputError(f"diffusers option {name}={options.get(name)!r}: must be a non-zero {kind.__name__}")
    size, channels = options["sample_size"], options["block_out_channels"]
    config = DDPMConfig(
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
    ours = config_to_diffusers(config)
    for name, value in options.items():
        if name not in ours:
            raise InputError(f"diffusers option {name}={value!r}: DDPM knows no such option")
        if value != ours[name]:
            raise InputError(f"diffusers option {name}={value!r}: DDPM would need {ours[name]!r}")
    return config
