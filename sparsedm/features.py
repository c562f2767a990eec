"""Fixed networks that turn images into features: a random one that needs no download, Inception, or a user's file.

Images are uint8 (n, C, h, w), or floating point in [-1, 1]; features are float64 (n, d).
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

from sparsedm.errors import InputError
from sparsedm.files import cache_folder, download, regular_file

INCEPTION_URL = (
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/inception-2015-12-05.pt"
)
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class Features:
    """A fixed network. Calling it turns images (n, 3 or 1, h, w) into float64 features (n, d) on the CPU.

    Networks whose outputs can differ have different names.
    """

    name: str
    network: Callable[[torch.Tensor], torch.Tensor]  # uint8 (n, 3, h, w) -> (n, d)
    device: torch.device

    def __call__(self, images, *, batch_size=250, progress=False):
        images = to_uint8(images)
        if images.shape[1] not in (1, 3):
            raise InputError(f"features {self.name} need images of 1 or 3 channels, not {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
        out = []
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        bar = tqdm(images.split(batch_size), desc=self.name, disable=None if progress else True)
        with torch.no_grad(), exact:
            for batch in bar:
                try:
                    features = self.network(batch.contiguous().to(self.device))
                except (
                    RuntimeError,
                    TypeError,
                    IndexError,
                ) as error:  # of a user's own network
                    if isinstance(self.network, RandomConv) or "memory" in str(error):
                        raise
                    reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
                    raise InputError(f"features {self.name} fail on uint8 {tuple(batch.shape)}: {reason}") from error
                if not (isinstance(features, torch.Tensor) and features.ndim == 2 and len(features) == len(batch)):
                    found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
                    raise InputError(f"features {self.name} must give ({len(batch)}, d), but gave {found}")
                out.append(features.cpu().double())
        out = torch.cat(out)
        if not out.isfinite().all():
            raise InputError(f"features {self.name} gave NaN or infinity")
        return out


def load_features(spec="random-conv", device="cpu", *, weights=None):
    """The feature network named by `spec`.

    "random-conv"  the default, which needs no download: see RandomConv. Its Fréchet distance is not a FID.
    "inception"    the Inception network of the original FID (2048 features): NVIDIA's TorchScript file of 96 MB, which
                   resizes images like the original. weights: its path; if there is no file, it is downloaded to this
                   path. None: $SPARSEDM_INCEPTION, else the cache folder. The file must have the right checksum.
    a file         TorchScript (torch.jit.save) or torch.export (.pt2, with a dynamic batch axis): a module from uint8
                   (n, 3, h, w) to (n, d) that does its own scaling. Loading RUNS the code in the file: only load files
                   you trust. Plain pickles (torch.save) are refused.
    Raises InputError if a file is missing or has another format, or if the download fails.
    """
    device = torch.device(device)
    if spec == "random-conv":
        return Features("random-conv-1", RandomConv().to(device), device)
    if spec == "inception":
        path = Path(weights or os.environ.get("SPARSEDM_INCEPTION") or cache_folder() / "inception-2015-12-05.pt")
        download(INCEPTION_URL, path, INCEPTION_SHA256)
        network = _load_network(path, device)
        return Features("inception", lambda images: network(images, return_features=True), device)
    path = Path(spec)
    if not path.exists():
        raise InputError(f"unknown features {spec!r}: random-conv, inception, or a file")
    with open(regular_file(path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Features(f"{path.name}-{digest[:12]}", _load_network(path, device), device)


def _load_network(path, device):
    kind = f"{path} is not a TorchScript or torch.export file"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2] for name in archive.namelist()}
        if "models/model.json" in entries:
            return move_to_device_pass(torch.export.load(path), device).module()
        if any(entry.startswith("code/") for entry in entries):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated, but this is its format
                return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{kind} of this torch ({reason})") from error
    raise InputError(f"{kind}: a plain pickle can run any code and is refused")


class RandomConv(torch.nn.Module):
    """144 statistics of a fixed random network at the image's own resolution (8 x 8 or more); no training, no download.

    There are three scales; each next scale averages 2 x 2 pixels of the last. At each: r = |16 random 3x3 filters|,
    q = |16 random 3x3 filters over r|. The features are log(1/64 + mean over the image) of r and q (how much structure
    of each kind), and the mean colours of a 4 x 4 grid (where it is). Each filter has mean zero, so that brightness
    does not dominate.

    The weights come from the raw bits of numpy's PCG64, which are equal in all versions of numpy and torch.
    """

    def __init__(self):
        super().__init__()
        for scale in range(3):
            self.register_buffer(f"first{scale}", _random_filters((16, 3, 3, 3), seed=2 * scale))
            self.register_buffer(f"second{scale}", _random_filters((16, 16, 3, 3), seed=2 * scale + 1))

    def forward(self, images):
        """uint8 (n, 3, H, W) -> float32 features (n, d). Raises: InputError for fewer than 8 x 8 pixels."""
        if min(images.shape[2:]) < 8:
            raise InputError(f"features random-conv need images of 8 x 8 pixels or more, not {tuple(images.shape[2:])}")
        x = images.float() / 127.5 - 1
        colours = F.adaptive_avg_pool2d(x, 4).flatten(1)
        out = []
        for scale in range(3):
            r = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), getattr(self, f"first{scale}")).abs()
            q = F.conv2d(F.pad(r, (1, 1, 1, 1), mode="reflect"), getattr(self, f"second{scale}")).abs()
            out += [(z.mean((2, 3)) + 1 / 64).log() for z in (r, q)]
            x = F.avg_pool2d(x, 2)
        return torch.cat([*out, colours], 1)


def _random_filters(shape, seed):
    """(out, in, 3, 3) float32, each filter of mean zero over its 3 x 3 places and of length one."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(11)).reshape(shape) * 2.0**-52 - 1
    centred = uniform - uniform.mean((2, 3), keepdims=True)
    length = np.sqrt(np.square(centred).sum((1, 2, 3), keepdims=True))
    return torch.tensor(centred / length, dtype=torch.float32)


def to_uint8(images):
    """uint8 images as they are, floating-point ones from [-1, 1] rounded and clamped; InputError for others and NaN."""
    if images.ndim != 4:
        raise InputError(f"images must be (n, C, h, w), not of shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise InputError(f"images must be uint8 or floating point in [-1, 1], not {images.dtype}")
    bad = (~images.isfinite()).flatten(1).any(1).sum().item()
    if bad:
        raise InputError(f"{bad} of the {len(images)} images hold NaN or infinity")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
