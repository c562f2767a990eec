"""Read a folder or zip of images into one uint8 array. Nothing is extracted: zip members are decoded in memory.

The meaning of files and folders:
- hidden files and folders (the name starts with a dot), `__MACOSX`, `Thumbs.db` and `desktop.ini` are ignored; every
  other file must be an image that Pillow reads.
- a folder around everything (`set.zip` with only `set/...`) has no meaning.
- folders `train` and one of `test`, `val`, `valid`, `validation`, with nothing beside them, are the two splits.
- the next folder is the class, in alphabetical order; deeper folders have no meaning. No such folder: no labels.
- dataset.json beside them, as NVIDIA's data set tools write it, {"labels": [["00000/img0.png", 6], ...]}, gives the
  labels, whatever the folders are; "labels": null: there are none.
- pixels: RGB, 8 bits, turned upright by their EXIF tag; transparency is dropped; of an animation the first frame
  counts.
"""

import io
import json
import os
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from sparsedm.errors import InputError, check_memory

IGNORED = {"__MACOSX", "Thumbs.db", "desktop.ini"}
LISTING = "dataset.json"
HELD_OUT = {"test", "val", "valid", "validation"}
# celeba: images of the first size (width, height) are cut to a square of that side at (left, top); then bilinear
CROPS = {"square": None, "celeba": ((178, 218), (25, 57), 128)}
MOST_FILE_BYTES = 1 << 28  # of one image file; and
MOST_PIXELS = 1 << 26  # of one image, against decompression bombs


class Parts(NamedTuple):
    """A set of images. splits: name -> (images uint8 (n, c, h, w), labels int64 (n,) or None); .npz: also the context.

    The names are "train" and "test", or "all" if the source has no splits. sizes: the original sizes of the images,
    "WIDTHxHEIGHT" -> the first file of that size. rest: other fields of `data.ImageSet`. twins: whether the second half
    of the images mirrors the first.
    """

    splits: dict
    class_names: tuple = ()
    sizes: dict = {}
    rest: dict = {}
    twins: bool = False


def read_image_files(path, size=None, progress=True, crop="square"):
    """Read a folder or zip file. size: crop every image to a centred square and resize it to size x size.

    crop: "celeba" crops images of 178x218 pixels to 128x128 at (25, 57), as U-ViT and DDIM do with CelebA.

    Returns Parts. Raises InputError, naming the file: unreadable, truncated, no image, too large, mixed sizes without
    `size`, a path that leaves the zip, a link, or files beside class folders.
    """
    if path.is_dir():
        return _read(path, _files_below(path), lambda name: _read_file(path / name), size, progress, crop)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for name, info in members.items():
                _check_member(path, name, info)
            return _read(path, list(members), lambda name: archive.read(members[name]), size, progress, crop)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of a damaged archive any, and of a method of compression that Python lacks
        raise InputError(f"{path} is not a readable zip file, perhaps cut short ({error})") from error


def resized(images, size, progress=True, crop="square"):
    """Images uint8 (n, c, h, w) with c 1 or 3, cropped and resized to (n, c, size, size)."""
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8, device="cpu")
    for source, target in zip(tqdm(images.numpy(), "resize", disable=None if progress else True), out.numpy()):
        image = Image.fromarray(source[0] if len(source) == 1 else source.transpose(1, 2, 0))
        target[:] = np.atleast_3d(_fit(image, size, crop)).transpose(2, 0, 1)
    return out


def _fit(image, size, crop="square"):
    if CROPS[crop] and image.size == CROPS[crop][0]:
        _, (left, top), side = CROPS[crop]
        return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def _files_below(folder):
    def fail(error):
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    names = []
    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not ignored(name)]
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                raise InputError(f"{os.path.join(root, name)} is a link to a folder: links are not followed")
        names += (Path(root, name).relative_to(folder).as_posix() for name in files if not ignored(name))
    return names


def _read_file(path):
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_FILE_BYTES:
        raise InputError(f"{path} is not a plain file of at most {MOST_FILE_BYTES} bytes")
    return path.read_bytes()


def _check_member(path, name, info):
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        raise InputError(f"{path} holds {name!r}: a path in a zip file must stay inside it")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise InputError(f"{path} holds {name!r}, a symbolic link: only plain files are read")
    if info.flag_bits & 1:
        raise InputError(f"{path} holds {name!r}, which is encrypted")
    if info.file_size > MOST_FILE_BYTES:
        raise InputError(f"{path} holds {name!r} of {info.file_size} bytes, more than {MOST_FILE_BYTES}")


def ignored(part):
    return part in IGNORED or part.startswith(".")


def _read(path, names, read, size, progress, crop):
    """Parts from the images `names` (paths relative to `path`). read(name): the bytes of an image."""
    names = sorted(name for name in names if not any(map(ignored, PurePosixPath(name).parts)))
    listing = next((name for name in names if PurePosixPath(name).name == LISTING), None)
    names = [name for name in names if name != listing]
    if not names:
        raise InputError(f"{path} holds no images")
    listed = listing and _listed(path, listing, names, read(listing))
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    while folders[0] and len({parts[:1] for parts in folders}) == 1:  # a folder around everything
        folders = [parts[1:] for parts in folders]
    split, folders = _splits(path, names, folders)
    labels, class_names = listed or _classes(path, names, folders)
    images, sizes = _decode(path, names, read, size, progress, crop)
    # the names are sorted, so each split is a slice
    first, count = np.unique(split, return_index=True, return_counts=True)[1:]
    parts = {str(split[i]): slice(i, i + n) for i, n in zip(first, count)}
    splits = {n: (images[of], None if labels is None else labels[of]) for n, of in parts.items()}
    return Parts(splits, class_names, sizes)


def _listed(path, listing, names, content):
    """Labels int64 (n,) and class names, or None and (), from a dataset.json."""
    try:
        entries = json.loads(content)["labels"]
        given = None if entries is None else {name: label for name, label in entries}
        if given is not None and len(given) < len(entries):
            raise ValueError("a name is there twice")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{listing} in {path} is damaged: {{"labels": [[name, label], ...]}} is the rule') from error
    if given is None:
        return None, ()
    above = "".join(f"{part}/" for part in PurePosixPath(listing).parts[:-1])
    labels = [given.get(name.removeprefix(above)) for name in names]
    for name, label in zip(names, labels):
        if type(label) is not int or not 0 <= label <= 65535:
            raise InputError(
                f"{listing} in {path} gives {name} the label {label!r}: an integer from 0 to 65535 is needed"
            )
    return torch.tensor(labels, device="cpu"), tuple(map(str, range(max(labels) + 1)))


def _splits(path, names, folders):
    """The split of each file, and its folders below the split's folder."""
    tops = {"".join(parts[:1]) for parts in folders}
    if "train" not in tops or not tops & HELD_OUT:
        return np.array(["all"] * len(folders)), folders
    if len(tops) > 2:
        rule = f"beside train there may be one of {', '.join(sorted(HELD_OUT))} and nothing else"
        beside = [PurePosixPath(name).name for name, parts in zip(names, folders) if not parts]
        raise InputError(f"{path} holds {', '.join([*sorted(filter(None, tops)), *beside[:3]])}: {rule}")
    split = np.array(["train" if parts[0] == "train" else "test" for parts in folders])
    return split, [parts[1:] for parts in folders]


def _classes(path, names, folders):
    """Labels int64 (n,) and class names; None and () if no file is in a class folder."""
    class_names = tuple(sorted({parts[0] for parts in folders if parts}))
    if not class_names:
        return None, ()
    for name, parts in zip(names, folders):
        if not parts:
            raise InputError(f"{path} has class folders such as {class_names[0]}, but {name} lies in none")
    index = {name: i for i, name in enumerate(class_names)}
    return torch.tensor([index[parts[0]] for parts in folders], device="cpu"), class_names


def _decode(path, names, read, size, progress, crop):
    """Images uint8 (n, 3, h, w), and `Parts.sizes`."""
    first, _ = _image(path, names[0], read, size, crop)
    check_memory(first.size * len(names), f"{path}, {len(names):,} images of {_format(first)} pixels,")
    images = torch.empty((len(names), *first.shape), dtype=torch.uint8, device="cpu")
    pixels = images.numpy()

    def decode(indices):
        sizes = {}
        for i in indices:
            image, found = _image(path, names[i], read, size, crop)
            sizes.setdefault(found, names[i])
            if image.shape != first.shape:
                raise InputError(f"{path}: {different_sizes({_format(first): names[0], found: names[i]})}")
            pixels[i] = image
        return len(indices), sizes

    chunks = [range(start, min(start + 64, len(names))) for start in range(0, len(names), 64)]
    bar = tqdm(total=len(names), desc=f"read {path.name}", unit="image", disable=None if progress else True)
    sizes = {}
    with bar, ThreadPoolExecutor() as pool:
        for done, more in pool.map(decode, chunks):
            bar.update(done)
            sizes = more | sizes
    return images, sizes


def different_sizes(sizes):
    """The message about images of several sizes. sizes: `Parts.sizes`."""
    (one, first), (other, second), *_ = sizes.items()
    return f"{first} is {one} and {second} is {other} pixels, but all need one size: crop or resize them first"


def _image(path, name, read, size, crop):
    """One image uint8 (3, h, w), and its original size."""
    try:
        with Image.open(io.BytesIO(read(name))) as image:
            if image.format == "EPS":
                raise InputError(f"{name} in {path} is PostScript, a program, which is not run: pixels are read")
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{name} in {path} has {image.width}x{image.height} pixels, more than {MOST_PIXELS}")
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{name} in {path} has pixels of mode {image.mode}: 8 bits per channel are read")
            image = ImageOps.exif_transpose(image).convert("RGB")
            fitted = _fit(image, size, crop) if size else image
            return np.asarray(fitted).transpose(2, 0, 1), f"{image.width}x{image.height}"
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} in {path} is not an image") from error
    except Exception as error:  # the decoders have no common exception for damaged files
        raise InputError(f"cannot read {name} in {path} ({error})") from error


def _format(image):
    return f"{image.shape[2]}x{image.shape[1]}"
