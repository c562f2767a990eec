"""DiT under the names of the `diffusers` library's DiTTransformer2DModel, both ways: weights and configuration.

    config = config_from_diffusers(json.load(open("config.json")))
    model.load_state_dict(from_diffusers(safetensors.torch.load_file("diffusion_pytorch_model.safetensors"), config))

and back: DiTTransformer2DModel(**config_to_diffusers(config)).load_state_dict(to_diffusers(model.state_dict())).

diffusers publishes the official weights but computes otherwise: the epsilon of norm2 is 1e-5 there, unless its
configuration says more, and 1e-6 officially; the time frequencies go down to 1e-4 there, and officially not quite.
Ours are the official ones.
"""

import re

import torch

from sparsedm.errors import InputError
from sparsedm.models.dit import DiTConfig, position_embedding

_NAMES = {  # ours: theirs, N being the number of a block; of the embedders each block has a copy there
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.N.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.N.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "transformer_blocks.N.norm1.emb.class_embedder.embedding_table",
    "blocks.N.adaLN_modulation.1": "transformer_blocks.N.norm1.linear",
    "blocks.N.attn.q": "transformer_blocks.N.attn1.to_q",
    "blocks.N.attn.k": "transformer_blocks.N.attn1.to_k",
    "blocks.N.attn.v": "transformer_blocks.N.attn1.to_v",
    "blocks.N.attn.proj": "transformer_blocks.N.attn1.to_out.0",
    "blocks.N.mlp.fc1": "transformer_blocks.N.ff.net.0.proj",
    "blocks.N.mlp.fc2": "transformer_blocks.N.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_INVERSE_NAMES = {theirs: ours for ours, theirs in _NAMES.items()}

# the options of DiTTransformer2DModel about which our network has no choice
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
_IGNORED = {"norm_num_groups", "norm_eps", "upcast_attention"}  # norm_eps: see above; the others have no effect there
# what leaving an option out means there
_LEFT_OUT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def _rename(key, names, blocks=()):
    """`key` under its other names, as a list: one for each of `blocks`, if only the other name has a block's number."""
    name, _, part = key.rpartition(".")
    number = re.search(r"blocks\.(\d+)\.", name)
    other = names.get(name.replace(f".{number[1]}.", ".N.", 1) if number else name)
    if other is None:
        return [key]
    numbers = blocks if ".N." in other and not number else [number and number[1]]
    return [f"{other}.{part}".replace(".N.", f".{n}.") for n in numbers]


def to_diffusers(state):
    """A DiT state dict -> one for DiTTransformer2DModel. The tensors are shared, but for q, k and v, which are new.

    The weights go as they are in `state`: for a sparse model put the masked ones in first.
    Raises: InputError for a frozen mask or a network without labels, for which DiTTransformer2DModel has no place.
    """
    if "y_embedder.embedding_table.weight" not in state:
        raise InputError("the network has no labels, and DiTTransformer2DModel always has some")
    blocks = sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}, key=int)
    renamed = {}
    for key, value in state.items():
        if key.endswith(".mask"):
            raise InputError(f"{key} is a frozen mask, which diffusers cannot hold: multiply it into the weight")
        if key == "pos_embed":  # is computed there
            continue
        parts = {key: value}
        if ".qkv." in key:
            parts = {key.replace(".qkv.", f".{letter}."): p.clone() for letter, p in zip("qkv", value.chunk(3))}
        renamed |= {other: part for name, part in parts.items() for other in _rename(name, _NAMES, blocks)}
    return renamed


def from_diffusers(state, config):
    """A DiTTransformer2DModel state dict -> one for DiT, with the position embedding of `config`, a DiTConfig.

    Keys that no DiT has stay in it, so that `load_state_dict` lists them.
    Raises: InputError if an attention has only some of its q, k and v, or if the copies of an embedder differ.
    """
    ours = {"pos_embed": position_embedding(config.dim, config.image_size // config.patch_size)}
    for key, value in state.items():
        (name,) = _rename(key, _INVERSE_NAMES)
        if name in ours and not torch.equal(ours[name], value):
            raise InputError(f"{key} differs from that of another block, and DiT has one for all")
        ours[name] = value
    for query in [key for key in ours if re.fullmatch(r"blocks\.\d+\.attn\.q\.\w+", key)]:
        parts = [query.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        missing = [part for part in parts if part not in ours]
        if missing:
            raise InputError(f"the diffusers state dict gives {query} but not {' and '.join(missing)}")
        ours[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def config_to_diffusers(config):
    """DiTConfig -> the arguments of DiTTransformer2DModel, as a dict that JSON can hold. norm_eps is the official one.

    Raises: InputError for a network without the null label, which DiTTransformer2DModel always has.
    """
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


def config_from_diffusers(options):
    """The config.json of a DiTTransformer2DModel, or of its predecessor Transformer2DModel, as a dict -> DiTConfig.

    Raises: InputError if an option has another type, is unknown, or asks for a network that DiT is not.
    """
    predecessor = {"norm_type": "layer_norm"} if options.get("_class_name") == "Transformer2DModel" else {}
    options = _LEFT_OUT | predecessor | {name: value for name, value in options.items() if not name.startswith("_")}
    channels = options["in_channels"]
    outputs = options.pop("out_channels", None) or channels
    for name, value in options.items():
        if name in _LEFT_OUT and (type(value) is not int or value < 1):
            raise InputError(f"diffusers option {name}={value!r}: must be a positive integer")
        if name in _FIXED and value != _FIXED[name]:
            raise InputError(f"diffusers option {name}={value!r}: DiT would need {_FIXED[name]!r}")
        # the predecessor writes down everything that it was not asked to be
        if name not in _LEFT_OUT | _FIXED and name not in _IGNORED and value not in (None, False):
            raise InputError(f"diffusers option {name}={value!r}: DiT knows no such option")
    if outputs not in (channels, 2 * channels):
        raise InputError(f"diffusers option out_channels={outputs!r}: DiT has in_channels={channels} or twice as many")
    return DiTConfig(
        image_size=options["sample_size"],
        channels=channels,
        patch_size=options["patch_size"],
        dim=options["num_attention_heads"] * options["attention_head_dim"],
        depth=options["num_layers"],
        heads=options["num_attention_heads"],
        num_classes=options["num_embeds_ada_norm"],
        learn_sigma=outputs == 2 * channels,
    )
