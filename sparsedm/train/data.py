"""Images as one tensor on the training device, from several sources. Pure functions make the batches.

There is no data loader. A set is decoded once into uint8, stored in the cache, and moved to the device; a batch is an
index and a scale. The images of a batch are a function of (seed, step), so a resumed run needs no state.

    source             what it is
    synthetic          shapes of sparsedm.train.synthetic; synthetic:32 for 32x32 instead of 12x12
    cifar10            downloaded
    folder, .zip       images in class folders (see sparsedm.train.image_files)
    folder, .tar.gz    CIFAR-10's python or binary batches (see sparsedm.train.array_files)
    .npz               numpy arrays: images uint8 (NHWC or NCHW), or latents float (NCHW) or their moments; labels;
                       context, for a text-conditional network (array_files too)

A source without a test split is divided: 2% of the images, but at least 64 and at most half, drawn with a fixed seed,
are "test"; the rest is "train".
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsedm.errors import InputError
from sparsedm.files import atomic_file, cache_folder, checksum, parse_json, regular_file
from sparsedm.train.array_files import cifar10_folder, context_shape, download_cifar10, read_cifar10, read_npz
from sparsedm.train.image_files import CROPS, Parts, different_sizes, ignored, read_image_files, resized
from sparsedm.train.synthetic import LEAST, synthetic

SPLITS = ("train", "test")
SYNTHETIC = {"train": {"count": 20_000, "seed": 0}, "test": {"count": 4_000, "seed": 1}}
HOLD_OUT_SEED = 240410445
KINDS = ("images", "labels")  # of tensor, in the cache
TARS = (".tar.gz", ".tgz")
ENDINGS = (".zip", ".npz", *TARS)
END_BYTES = 1 << 20  # at each end of a file, part of its signature


@dataclass(frozen=True, eq=False)
class ImageSet:
    """images: uint8 (n, c, h, w) in 0..255, or float32 latents; labels: int64 (n,) or None; class_names: one per label;
    source: the argument of `load`; sizes: the original sizes of image files, see `image_files.Parts`.

    context: floating point (n, tokens, width), the encoded text of each image, or None; null_context: (tokens, width),
    the encoded empty text. moments: whether `images` holds means and, in the second half of the channels, logarithms of
    variances, from which every batch draws its latents."""

    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: tuple
    source: str
    sizes: dict = field(default_factory=dict)
    context: torch.Tensor | None = None
    null_context: torch.Tensor | None = None
    moments: bool = False

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        """(c, h, w) of what a batch holds."""
        channels, *sides = self.images.shape[1:]
        return (channels // 2 if self.moments else channels, *sides)

    @property
    def is_latent(self):
        return self.images.is_floating_point()

    def to(self, device):
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **moved)

    def every(self, most):
        """At most so many of the images, evenly spaced, so that all classes stay."""
        if most >= len(self):
            return self
        chosen = torch.arange(most, device="cpu") * len(self) // most
        images, labels, context = _chosen((self.images, self.labels, self.context), chosen)
        return dataclasses.replace(self, images=images, labels=labels, context=context)


def load(source, split="train", *, size=None, crop="square", limit=None, progress=True, cache=None):
    """Load one split ("train" or "test") of `source` (see the top of this file) into an ImageSet on the CPU.

    size: side in pixels; other images are cropped to a centred square and resized. crop: see `read_image_files`.
    limit: the largest number of images, evenly spaced through the split, so that all classes stay. cache: folder for
    downloads and decoded sets; default: `sparsedm.files.cache_folder()`. A decoded set is used only if the source is
    unchanged (size and times of every file, both ends of a zip or tar.gz). Raises InputError if the source is missing,
    empty or damaged, or has mixed sizes and `size` is None.
    """
    source, cache = str(source), Path(cache or cache_folder())
    if split not in SPLITS:
        raise InputError(f"the split {split!r} must be one of {', '.join(SPLITS)}")
    for name, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if crop not in list(CROPS):
        raise InputError(f"the crop {crop!r} must be one of {', '.join(CROPS)}")
    if source.partition(":")[0] == "synthetic":
        *tensors, class_names = synthetic(size=_synthetic_size(source, size), **SYNTHETIC[split])
        parts = Parts({split: tensors}, class_names)
    else:
        parts = _read(source, split, size, progress, cache, crop)
    images, labels, *context = parts.splits.get(split) or _held_out(source, parts.splits["all"], split, parts.twins)
    found = ImageSet(images, labels, parts.class_names, source, parts.sizes, *context, **parts.rest)
    return found if limit is None else found.every(limit)


def load_images(source, split, size, limit=None, crop="square"):
    """Images in the size of the network. Mixed sizes are refused; another size is resized, with a log message."""
    found = load(source, split, size=size, limit=limit, crop=crop)
    if len(found.sizes) > 1:
        raise InputError(f"{source}: {different_sizes(found.sizes)}")
    if found.sizes and (held := next(iter(found.sizes))) != f"{size}x{size}":
        how = "cropped to squares"
        if CROPS[crop] and held == "{}x{}".format(*CROPS[crop][0]):
            how = "cut to 128x128 at (25, 57), as U-ViT and DDIM cut CelebA,"
        print(f"the {split} images of {held} pixels are {how} and resized to {size}x{size}")
    return found


def check_source(source, config=None, size=None, out=None):
    """Raise InputError, before anything is read, if `source` is no source of `load`.

    config: of the network to train; a text-conditional one needs a context for every image. size: the side that drawn
    images must have, by default the network's. out: a file that will be written, which must not be one of the source's.
    """
    path = Path(os.path.expanduser(source))
    if source.partition(":")[0] == "synthetic":
        _synthetic_size(source, size or getattr(config, "image_size", None))
    elif source != "cifar10":
        if not path.exists():
            raise InputError(f"data {source!r}: no such file or folder, and not synthetic or cifar10")
        if not path.is_dir():
            regular_file(path)
            if not path.name.lower().endswith(ENDINGS):
                raise InputError(f"data {path}: must be a folder, or end in {', '.join(ENDINGS)}")
        elif out is not None and not cifar10_folder(path):
            _check_outside(path, out)
    if config is not None:
        check_context(config, context_shape(path) if path.suffix.lower() == ".npz" else None, source)


def _check_outside(folder, out):
    """Raise InputError if a file `out` would be read as one of the images in a folder."""
    folder, path = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if path.is_relative_to(folder) and not any(map(ignored, path.relative_to(folder).parts)):
        raise InputError(f"{out} lies in data {folder}, and would be read as an image: write to another folder")


def check_context(config, shape, source):
    """Raise InputError if a text-conditional network gets no context, or one of another size.

    shape: of the context in `source`, (n, tokens, width), or None.
    """
    tokens = getattr(config, "context_tokens", 0)
    if tokens and (shape is None or tuple(shape[1:]) != (tokens, config.context_dim)):
        rule = f"an .npz file with an array `context` (N, {tokens}, {config.context_dim}) is needed"
        found = "no context" if shape is None else f"a context of shape {tuple(shape)}"
        raise InputError(f"the network takes a text for every image, but {source} holds {found}: {rule}")
    if tokens and config.num_classes:
        raise InputError("the network takes a class and a text: data with both is not supported")


def batch(images, indices, *, flip_generator=None, generator=None, text=False):
    """The images `indices` (int64 (b,), any device) of an ImageSet as network inputs, on the device of the set.

    flip_generator: torch.Generator (any device); each image is mirrored with probability 1/2, latents never.
    generator: draws latents from their moments; None: the means. text: whether y is the context.
    Returns x float32 (b, c, h, w), with images in [-1, 1] and latents unchanged, and y: int64 (b,), with `text` float32
    (b, tokens, width), or None.
    """
    device = images.images.device
    indices = indices.to(device)
    x = images.images[indices]
    y = images.context if text else images.labels
    if y is not None:
        y = y[indices].float() if text else y[indices]
    if images.moments:
        x, log_variance = x.chunk(2, dim=1)
        if generator is not None:
            noise = torch.randn(x.shape, generator=generator, device=generator.device).to(device)
            x = x + (log_variance / 2).exp() * noise
    if images.is_latent:
        return x, y
    if flip_generator is not None:
        flip = torch.rand(len(indices), generator=flip_generator, device=flip_generator.device) < 0.5
        x = torch.where(flip.to(device)[:, None, None, None], x.flip(-1), x)
    return x.float() / 127.5 - 1, y


def batch_indices(n, batch, step, seed):
    """The images of step `step` (0, 1, ...), out of n: int64 (batch,) on the CPU, a pure function of the arguments.

    The steps go through one shuffled epoch after another and skip no image. A batch may span two epochs.
    """
    epoch, start = divmod(step * batch, n)
    pieces = []
    while batch:
        pieces.append(_shuffled(n, seed, epoch)[start : start + batch])
        batch -= len(pieces[-1])
        epoch, start = epoch + 1, 0
    return torch.from_numpy(np.concatenate(pieces))


@functools.lru_cache(maxsize=4)
def _shuffled(n, *key):
    """A permutation int64 (n,), the same on all machines and with all versions of numpy (its shuffle may change)."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


def _chosen(tensors, indices):
    return [None if tensor is None else tensor[indices] for tensor in tensors]


def _held_out(source, tensors, split, twins):
    """The tensors of a split. twins: see `Parts`; an image and its twin are not divided, and the test has no twins."""
    n = len(tensors[0]) // (2 if twins else 1)
    count = min(max(64, n // 50), n // 2)
    if not count:
        raise InputError(f"{source} holds one image, so none can be held out for validation")
    order = torch.from_numpy(_shuffled(n, HOLD_OUT_SEED))
    indices = (order[count:] if split == "train" else order[:count]).sort().values
    return _chosen(tensors, torch.cat((indices, indices + n)) if twins and split == "train" else indices)


def _synthetic_size(source, size):
    given = source.partition(":")[2] or str(size or 12)
    if not (given.isascii() and given.isdecimal() and len(given) < 10):
        raise InputError(f"data {source!r}: write synthetic or synthetic:SIZE")
    if size not in (None, int(given)):
        raise InputError(f"data {source!r}: drawn images are not resized, and {size}x{size} is needed: write synthetic")
    if int(given) < LEAST:
        raise InputError(f"data {source!r}: drawn images need size >= {LEAST}, not {int(given)}")
    return int(given)


def _read(source, split, size, progress, cache, crop):
    """Parts of any source except synthetic; from the cache only the needed split."""
    try:
        check_source(source)
        path = download_cifar10(cache, progress=progress) if source == "cifar10" else Path(os.path.expanduser(source))
        if path.suffix.lower() == ".npz":
            return _resize(path, read_npz(path), size, progress, crop)
        fitted = str(size) if crop == "square" else f"{size} {crop}"
        signature = _signature(path, fitted)
        place = hashlib.sha256(f"{os.path.realpath(path)} {fitted}".encode(errors="surrogateescape")).hexdigest()[:16]
        cached = cache / "decoded" / f"{path.name}-{place}.safetensors"
        parts = _from_cache(cached, signature, split)
        if parts is None:
            parts = _decode(path, size, progress, crop)
            _to_cache(cached, signature, parts)
        return parts
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror or error}") from error


def _decode(path, size, progress, crop):
    is_tar = path.name.lower().endswith(TARS)
    if cifar10 := cifar10_folder(path) if path.is_dir() else path if is_tar else None:
        return _resize(path, read_cifar10(cifar10, progress), size, progress, crop)
    return read_image_files(path, size, progress, crop)


def _resize(path, parts, size, progress, crop):
    def fit(images):
        if size is None or images.shape[2:] == (size, size):
            return images
        if images.is_floating_point():
            side = f"{images.shape[3]}x{images.shape[2]}"
            raise InputError(f"{path} holds latents of {side}, which cannot be resized to {size}")
        return resized(images, size, progress, crop)

    sizes = parts.sizes or {"{3}x{2}".format(*images.shape): name for name, (images, *_) in parts.splits.items()}
    splits = {name: (fit(images), *rest) for name, (images, *rest) in parts.splits.items()}
    return parts._replace(splits=splits, sizes=sizes)


def _signature(path, size):
    """A hash of the name, size and times of all files, and of the first and last bytes of a zip or tar.gz file."""
    facts = hashlib.sha256(f"2 {size}".encode())  # 2: version of the readers; raise it when their output changes
    found = [path]
    if path.is_dir():
        found = []
        for root, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not ignored(name)]
            found += (Path(root, name) for name in folders + files if not ignored(name))
        found.sort()
    for file in found:
        state = file.stat()
        facts.update(
            f"{file} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\n".encode(errors="surrogateescape")
        )
    if path.is_file():
        with open(path, "rb") as file:
            facts.update(file.read(END_BYTES))
            file.seek(max(0, path.stat().st_size - END_BYTES))
            facts.update(file.read(END_BYTES))
    return facts.hexdigest()


def _from_cache(cached, signature, split):
    """Parts with the tensors of `split`; None if the cache has none, or an old or damaged one."""
    try:
        with safe_open(regular_file(cached), "pt") as file:
            facts = file.metadata() or {}
            if facts.get("signature") != signature:
                return None
            keys = set(file.keys())
            splits = {
                name: tuple(file.get_tensor(key) if (key := f"{name}.{kind}") in keys else None for kind in KINDS)
                for name in (split, "all")
                if f"{name}.images" in keys
            }
            for name, tensors in splits.items():
                for kind, tensor in zip(KINDS, tensors):
                    if tensor is not None and checksum(tensor) != facts.get(f"{name}.{kind}"):
                        return None
            names, sizes = (parse_json(facts.get(name), cached) for name in ("class_names", "sizes"))
            return Parts(splits, tuple(names), dict(sizes))
    except (OSError, SafetensorError, InputError, TypeError, ValueError):
        return None


def _to_cache(cached, signature, parts):
    pairs = {f"{name}.{kind}": t for name, pair in parts.splits.items() for kind, t in zip(KINDS, pair)}
    pairs = {name: tensor for name, tensor in pairs.items() if tensor is not None}
    facts = {"signature": signature, "class_names": json.dumps(parts.class_names), "sizes": json.dumps(parts.sizes)}
    try:
        with atomic_file(cached) as partial:
            save_file(pairs, partial, facts | {name: checksum(tensor) for name, tensor in pairs.items()})
    except (InputError, SafetensorError) as error:
        warnings.warn(f"the decoded images are not kept for the next run: {error}", stacklevel=4)
