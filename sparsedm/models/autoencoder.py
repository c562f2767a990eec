"""Images to latents and back, by an AutoencoderKL of the `diffusers` library in a local folder.

    latent = (z - mean) * scale,   z ~ N(μ(image), σ(image)²)

The folder's configuration gives mean and scale: 0 and 0.18215 for the autoencoder of Stable Diffusion (arXiv
2112.10752, appendix D.1), on whose latents U-ViT and DiT were trained. U-ViT's text-conditional networks have the scale
0.2301 instead. The moments are the mean of the latent and, behind it, the logarithm of its variance.
"""

import importlib
import math
from pathlib import Path

import torch
from tqdm import tqdm

from sparsedm.errors import InputError, check_memory
from sparsedm.files import read_json, regular_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {  # of weights, as diffusers names them, the most exact first -> its name for the variant
    WEIGHTS: None,
    f"{WEIGHTS}.index.json": None,
    "diffusion_pytorch_model.fp16.safetensors": "fp16",
    f"{WEIGHTS}.index.fp16.json": "fp16",
}
BATCH = 16  # images at a time
MOST = 2**16  # channels


class Autoencoder:
    """An AutoencoderKL in eval mode. channels: of its latents; factor: pixels per side of one number of a latent."""

    def __init__(self, network, name, scale=None):
        self.network, self.name, config = network, name, network.config
        self.channels, self.factor = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self.mean = self._channels(config.latents_mean or [config.shift_factor or 0.0])
        self.scale = (scale or config.scaling_factor) / self._channels(config.latents_std or [1.0])

    def _channels(self, numbers):
        return torch.tensor(numbers, device=self.network.device).view(1, -1, 1, 1)

    def moments(self, images, progress=False):
        """uint8 (n, 3, h, w) -> float32 (n, 2 channels, h / factor, w / factor) on the CPU.

        Raises: InputError for images of another shape, or more moments than memory.
        """
        n, channels, *sides = images.shape
        if channels != self.network.config.in_channels or any(side % self.factor for side in sides):
            rule = f"{self.network.config.in_channels} channels and sides that are multiples of {self.factor}"
            raise InputError(f"{self.name} takes images of {rule}, not {tuple(images.shape[1:])}")
        check_memory(8 * n * self.channels * math.prod(sides) // self.factor**2, f"{n} moments")

        def encode(part):
            found = self.network.encode(part.float() / 127.5 - 1).latent_dist
            return torch.cat(((found.mean - self.mean) * self.scale, found.logvar + 2 * self.scale.log()), 1)

        found = self._in_parts(encode, images, "encode", progress)
        if not found.isfinite().all():
            raise InputError(f"{self.name} gives moments that are not finite: are its weights?")
        return found

    def decode(self, latents, progress=False):
        """(n, channels, h, w) -> images in about [-1, 1], float32 (n, 3, h * factor, w * factor) on the CPU."""
        check_memory(12 * len(latents) * math.prod(latents.shape[2:]) * self.factor**2, f"{len(latents)} images")

        def decode(part):
            return self.network.decode(part.float() / self.scale + self.mean).sample

        return self._in_parts(decode, latents, "decode", progress)

    @torch.no_grad()
    def _in_parts(self, function, tensor, name, progress):
        bar = tqdm(tensor.split(BATCH), name, disable=None if progress else True)
        return torch.cat([function(part.to(self.network.device)).cpu() for part in bar])


def load_autoencoder(folder, device="cpu", scale=None):
    """The Autoencoder in a folder that diffusers wrote: an AutoencoderKL's own, or a pipeline's with one in `vae`.

    scale: of the latents; None: the folder's.
    Nothing is downloaded, and no code of the folder runs: the weights must be safetensors.
    Raises: InputError where diffusers is not installed, or the folder holds something else, or not all weights.
    """
    folder = Path(folder)
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    config = read_json(folder / "config.json", _class_name=str)
    if config["_class_name"] != "AutoencoderKL":
        raise InputError(f"{folder} holds a {config['_class_name']}: an AutoencoderKL is needed")
    _check(config, folder / "config.json")
    file = next((name for name in FILES if (folder / name).exists()), None)
    if file is None and (pickles := sorted(folder.glob("*.bin"))):
        raise InputError(f"{pickles[0]} is a pickle, which can run any code: save the autoencoder as safetensors")
    regular_file(folder / (file or WEIGHTS))
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(f"latents need diffusers: pip install 'sparsedm[interop]' ({error})") from error
    options = {"local_files_only": True, "use_safetensors": True, "torch_dtype": torch.float32, "variant": FILES[file]}
    try:
        network, found = diffusers.AutoencoderKL.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # of what is wrong with a configuration any
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} is no readable AutoencoderKL ({reason})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise InputError(f"{folder} does not fit its config.json: {what.replace('_', ' ')} {found[what][0]}")
    return Autoencoder(network.to(device).eval().requires_grad_(False), str(folder), scale)


def _check(config, file):
    """Raise InputError if a configuration holds numbers that no autoencoder has. What it leaves out has a default."""

    def count(value, most=MOST):
        return type(value) is int and 1 <= value <= most

    def number(value, least=-math.inf):
        return type(value) in (int, float) and least < value < math.inf

    def each(values, rule, lengths):
        return isinstance(values, list) and len(values) in lengths and all(map(rule, values))

    channels = config.get("latent_channels", 4)
    per_channel = "null, or a number for each latent channel"
    rules = {
        "latent_channels": (count, f"a whole number from 1 to {MOST}"),
        "in_channels": (count, f"a whole number from 1 to {MOST}"),
        "norm_num_groups": (count, f"a whole number from 1 to {MOST}"),
        "layers_per_block": (lambda n: count(n, 100), "a whole number from 1 to 100"),
        "block_out_channels": (lambda v: each(v, count, range(1, 11)), f"1 to 10 whole numbers from 1 to {MOST}"),
        "scaling_factor": (lambda v: number(v, 0), "a number above 0"),
        "shift_factor": (lambda v: v is None or number(v), "null or a number"),
        "latents_mean": (lambda v: v is None or each(v, number, (channels,)), per_channel),
        "latents_std": (lambda v: v is None or each(v, lambda n: number(n, 0), (channels,)), f"{per_channel}, above 0"),
    }
    for name, (holds, rule) in rules.items():
        if name in config and not holds(config[name]):
            raise InputError(f"{file} has {name} {str(config[name])[:40]}: must be {rule}")
