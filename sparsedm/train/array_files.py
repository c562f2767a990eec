"""Read images stored as arrays: numpy's .npz, and CIFAR-10 (Krizhevsky, 2009) as its author distributes it.

.npz: images under one of the names images, x, arr_0; optional labels under labels, y or arr_1. Latents may be stored as
`moments` (n, 2 c, h, w) instead of images: c means, then c logarithms of variances. Text-conditional networks need
`context` (n, tokens, width), the encoded text of each image. The optional `null_context` (tokens, width) is the
encoded empty text.
CIFAR-10: python batches or binary batches, in a folder or a tar.gz. Binary batch: records of 3073 bytes, the label and
then 3 x 32 x 32 pixels, plane by plane. Python batch: a pickled dict with `data` (uint8, n x 3072, the same pixels) and
`labels`. A pickle can run any code, so the unpickler here knows no classes, only stand-ins for the few classes in a
batch.
"""

import contextlib
import gzip
import io
import os
import pickle
import tarfile
from zipfile import ZipFile

import numpy as np
import torch
from tqdm import tqdm

from sparsedm.errors import InputError, check_memory
from sparsedm.files import cache_folder, download, regular_file
from sparsedm.train.image_files import Parts

# in an .npz file
IMAGE_KEYS, LABEL_KEYS = ("images", "x", "arr_0", "moments"), ("labels", "y", "arr_1")
TEXT_KEYS = ("context", "null_context")
MIRRORED = "mirrored"  # in a file that `sparsedm encode --mirror` wrote
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
MOST_BATCH_BYTES = 1 << 28  # limit for one batch (which has 31 MB), against decompression bombs
MOST_TAR_BYTES = 1 << 31
MOST_LOG_VARIANCE = 60  # diffusers clips them at 20


def read_npz(path):
    """Read an .npz file of plain arrays, see the top of this file. Returns Parts; InputError names the rule."""
    arrays = _arrays(path)
    twins = arrays.pop(MIRRORED, None) is not None
    images, labels, texts = ([key for key in arrays if key in names] for names in (IMAGE_KEYS, LABEL_KEYS, TEXT_KEYS))
    if len(images) != 1 or len(labels) > 1 or len(images + labels + texts) < len(arrays):
        rule = f"one of {', '.join(IMAGE_KEYS)} is needed, one of {', '.join(LABEL_KEYS)} may be there"
        raise InputError(
            f"{path} holds the arrays {', '.join(arrays) or 'none'}: {rule}, and {' and '.join(TEXT_KEYS)}"
        )
    context, null_context = _context(path, arrays)
    rest = {"null_context": null_context, "moments": images == ["moments"]}
    images, labels = _as_images(path, arrays[images[0]]), arrays[labels[0]] if labels else None
    if not rest["moments"] and images.is_floating_point() and {1, 3} & {*images.shape[1::2]} and images.min() >= 0:
        held = f"these lie from {images.min():g} to {images.max():g}, like pixels"
        raise InputError(f"{path}: floating-point images are latents, and {held}: store pixels as uint8")
    if rest["moments"] and not (images.is_floating_point() and images.shape[1] % 2 == 0):
        raise InputError(
            f"{path}: moments must be floating point with an even number of channels, not {images.shape[1]}"
        )
    if rest["moments"] and (most := float(images[:, images.shape[1] // 2 :].max())) > MOST_LOG_VARIANCE:
        rule = f"must be logarithms of variances, at most {MOST_LOG_VARIANCE}"
        raise InputError(f"{path}: the second half of the channels of moments {rule}, not {most:g}")
    if context is not None and len(context) != len(images):
        raise InputError(f"{path}: context must be one for each of the {len(images)} images, not {len(context)}")
    if twins and len(images) % 2:
        raise InputError(f"{path}: {MIRRORED} needs images and as many mirrored ones, not {len(images)} in all")
    if labels is None:
        return Parts({"all": (images, None, context)}, rest=rest, twins=twins)
    one_each = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not one_each or labels.min() < 0 or labels.max() > 65535:
        raise InputError(f"{path}: labels must be {len(images)} integers from 0 to 65535, one for each image")
    labels = torch.from_numpy(labels.astype(np.int64))
    return Parts({"all": (images, labels, context)}, tuple(map(str, range(labels.max() + 1))), rest=rest, twins=twins)


def read_context(path):
    """(context, null_context or None) of an .npz file, which need hold nothing else. Raises: InputError."""
    context, null_context = _context(path, _arrays(path, TEXT_KEYS))
    if context is None:
        raise InputError(f"{path} holds no array `context` of floating-point numbers (n, tokens, width)")
    return context, null_context


def context_shape(path):
    """The shape of `context` in an .npz file, None where there is none; only its header is read. Raises: InputError."""
    with _opened(path) as archive:
        if "context.npy" not in archive.namelist():
            return None
        with archive.open("context.npy") as file:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            return read[np.lib.format.read_magic(file)](file)[0]


@contextlib.contextmanager
def _opened(path):
    """The ZipFile of an .npz file; what is wrong with it is an InputError."""
    try:
        with ZipFile(regular_file(path)) as archive:
            check_memory(sum(member.file_size for member in archive.infolist()), f"unpacking {path}")
            yield archive
    except InputError:
        raise
    except Exception as error:  # of a damaged archive any
        raise InputError(f"{path} is not a readable .npz file of plain arrays ({error})") from error


def _arrays(path, names=None):
    """{name: array} of an .npz file. names: only of these."""
    with _opened(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if names is None or name in names}
    if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise InputError(f"{path} holds {', '.join(others)}, which is no numpy array")
    return arrays


def _context(path, arrays):
    """(context (n, tokens, width), null_context (tokens, width)), floating-point tensors, each None if not there."""
    found = [arrays.get(name) for name in TEXT_KEYS]
    for name, array, axes in zip(TEXT_KEYS, found, ("(n, tokens, width)", "(tokens, width)")):
        if array is None:
            continue
        if array.dtype.kind != "f" or array.ndim != axes.count(",") + 1 or not array.size:
            raise InputError(f"{path}: {name} must be floating point {axes}, not {array.dtype} {array.shape}")
        if not all(np.isfinite(part).all() for part in array):
            raise InputError(f"{path}: {name} holds NaN or infinity")
    context, null = (
        array if array is None else torch.from_numpy(array if array.dtype == np.float16 else array.astype(np.float32))
        for array in found
    )
    if null is not None and (context is None or null.shape != context.shape[1:]):
        raise InputError(f"{path}: null_context {tuple(null.shape)} must have the shape of one context")
    return context, null


def _as_images(path, array):
    """Tensor uint8 (n, 1 or 3, h, w), or float32 (n, c, h, w) latents."""
    if array.ndim == 4 and not array.size:
        raise InputError(f"{path}: images of shape {array.shape} hold nothing: at least one image is needed")
    if array.ndim != 4:
        raise InputError(f"{path}: images of shape {array.shape} must be (n, h, w, c) or (n, c, h, w)")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{path}: the latents hold NaN or infinity")
        return torch.from_numpy(array)
    last, first = array.shape[3] in (1, 3), array.shape[1] in (1, 3)
    if array.dtype != np.uint8 or last == first:
        rule = "uint8 with 1 or 3 channels on the second or the last axis (or floating-point latents)"
        raise InputError(f"{path}: images of {array.dtype} {array.shape} must be {rule}")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if last else array))


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def download_cifar10(folder=None, url=None, progress=True):
    """The path of cifar-10-python.tar.gz in `folder` (default: the cache), downloaded unless it is there.

    url: a mirror; default $SPARSEDM_CIFAR10_URL, else the author's page. The file must have the author's checksum.
    """
    url = url or os.environ.get("SPARSEDM_CIFAR10_URL") or URL
    return download(url, (folder or cache_folder()) / "cifar-10-python.tar.gz", SHA256, progress)


def cifar10_folder(folder):
    """`folder`, or cifar-10-batches-py or -bin inside it, whichever holds CIFAR-10 batches; else None."""
    for candidate in (folder, *(child for child in sorted(folder.glob("cifar-10-batches-*")) if child.is_dir())):
        if any((candidate / name).is_file() for name in (TRAIN[0], TRAIN[0] + ".bin", TEST[0], TEST[0] + ".bin")):
            return candidate
    return None


def read_cifar10(path, progress=True):
    """Read a folder (see cifar10_folder) or tar.gz file. Returns Parts: train and test, uint8 (n, 3, 32, 32).

    Raises InputError, naming the file, if a batch is missing or damaged, or if its pickle holds anything else.
    """
    batches = _folder_batches(path) if path.is_dir() else _tar_batches(path)
    batches = dict(tqdm(batches, f"read {path.name}", total=6, unit="batch", disable=None if progress else True))
    for name in TRAIN + TEST:
        if name not in batches:
            raise InputError(f"{path} lacks {name}: CIFAR-10 is data_batch_1 to data_batch_5 and test_batch")
    splits = {}
    for split, names in {"train": TRAIN, "test": TEST}.items():
        images, labels = zip(*(batches[name] for name in names))
        splits[split] = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
    return Parts(splits, CLASSES)


def _folder_batches(folder):
    for name in TRAIN + TEST:
        for file in (folder / name, folder / f"{name}.bin"):
            if file.is_file():
                if file.stat().st_size > MOST_BATCH_BYTES:
                    raise InputError(f"{file} is larger than {MOST_BATCH_BYTES} bytes, which no CIFAR-10 batch is")
                yield name, _batch(file, file.read_bytes())


def _tar_batches(path):
    """Read the needed files into memory, by the last part of their names. Nothing is extracted."""
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            unpacked = 0
            for member in archive:
                unpacked += member.size
                if unpacked > MOST_TAR_BYTES:
                    raise InputError(f"{path} unpacks to more than {MOST_TAR_BYTES} bytes, which CIFAR-10 does not")
                if member.size > MOST_BATCH_BYTES:
                    raise InputError(f"{path} holds {member.name!r} of {member.size} bytes, which no CIFAR-10 batch is")
                name = os.path.basename(member.name)
                if member.isreg() and name.removesuffix(".bin") in TRAIN + TEST:
                    yield name.removesuffix(".bin"), _batch(f"{path}/{name}", archive.extractfile(member).read())
            file.read(MOST_BATCH_BYTES)  # to the end, because gzip checks its checksum there
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise InputError(f"{path} is not a readable tar.gz file, perhaps cut short ({error})") from error


def _batch(name, content):
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) from the bytes of one batch."""
    try:
        pixels, labels = (_binary if str(name).endswith(".bin") else _pickled)(content)
        if len(labels) != len(pixels) or not 0 <= labels.min() <= labels.max() < len(CLASSES):
            raise ValueError("a label for each image, from 0 to 9, is the rule")
        return pixels.reshape(-1, 3, 32, 32), labels
    except _Foreign as error:
        raise InputError(f"{name} asks for {error}, which no CIFAR-10 batch needs: refused") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{name} is not a CIFAR-10 batch ({error})") from error


def _binary(content):
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _pickled(content):
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    _, shape, dtype, fortran, raw = batch["data"].state
    if dtype.code not in ("u1", b"u1"):
        raise ValueError(f"pixels of type {dtype.code} instead of u1")
    pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    return pixels.reshape(-1, 3072), np.array(batch["labels"], np.int64)


class _Foreign(Exception):
    """A pickle names a class that no batch needs."""


class _Array:
    """Stands for numpy.ndarray in a pickle: `state` is (version, shape, dtype, column-major, bytes)."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class _DType:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, code, *args):
        self.code = code

    def __setstate__(self, state):
        pass


class _Unpickler(pickle.Unpickler):
    """Knows only the stand-ins, so no code of numpy or Python runs."""

    def find_class(self, module, name):
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return _Array
            case "numpy", "dtype":
                return _DType
            case "_codecs", "encode":  # how Python 3 writes bytes for Python 2
                return lambda text, encoding: text.encode("latin1")
        raise _Foreign(f"{module}.{name}")
