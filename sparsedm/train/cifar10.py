"""CIFAR-10 (Krizhevsky, 2009) as its author distributes it: python batches or binary batches, in a folder or a tar.gz.

Binary batch: records of 3073 bytes, the label and then 3 x 32 x 32 pixels, plane by plane. Python batch: a pickled
dict with `data` (uint8, n x 3072, the same pixels) and `labels`. A pickle can run any code, so these are read with an
unpickler that knows no class at all but stand-ins for the few a batch is made of.
"""

import gzip
import io
import os
import pickle
import tarfile
import zlib

import numpy as np
import torch
from tqdm import tqdm

from sparsedm.errors import InputError
from sparsedm.files import cache_folder, download
from sparsedm.train.image_files import Parts

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
MOST_BYTES = 1 << 28  # of one batch, which has 31 MB; the limit is against bombs


def download_cifar10(folder=None, url=None, progress=True):
    """The path of cifar-10-python.tar.gz in `folder` (default: the cache), downloaded unless it is there.

    url: a mirror; default $SPARSEDM_CIFAR10_URL, else the author's page. The file must have the author's checksum.
    """
    url = url or os.environ.get("SPARSEDM_CIFAR10_URL") or URL
    return download(url, (folder or cache_folder()) / "cifar-10-python.tar.gz", md5=MD5, progress=progress)


def cifar10_folder(folder):
    """`folder`, or cifar-10-batches-py or -bin inside it, whichever holds CIFAR-10 batches; else None."""
    for candidate in (folder, *(child for child in sorted(folder.glob("cifar-10-batches-*")) if child.is_dir())):
        if any((candidate / name).is_file() for name in (TRAIN[0], TRAIN[0] + ".bin", TEST[0], TEST[0] + ".bin")):
            return candidate
    return None


def read_cifar10(path, progress=True):
    """Read a folder (see cifar10_folder) or tar.gz file. Returns Parts: train and test, uint8 (n, 3, 32, 32).

    InputError, naming the file: a batch missing, damaged or with anything else in its pickle.
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
                if file.stat().st_size > MOST_BYTES:
                    raise InputError(f"{file} is larger than {MOST_BYTES} bytes, which no CIFAR-10 batch is")
                yield name, _batch(file, file.read_bytes())


def _tar_batches(path):
    """Read in memory what is needed, by the last part of its name: nothing is extracted, so no path can climb out."""
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.size > MOST_BYTES:
                    raise InputError(f"{path} holds {member.name!r} of {member.size} bytes, which no CIFAR-10 batch is")
                name = os.path.basename(member.name)
                if member.isreg() and name.removesuffix(".bin") in TRAIN + TEST:
                    yield name.removesuffix(".bin"), _batch(f"{path}/{name}", archive.extractfile(member).read())
            file.read(MOST_BYTES)  # to the end, where gzip compares its checksum
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
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
    """A pickle names something that is not in a batch."""


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
    """Nothing but the stand-ins can be named, so nothing of numpy or Python runs."""

    def find_class(self, module, name):
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") | ("numpy", "ndarray"):
                return _Array
            case "numpy", "dtype":
                return _DType
            case "_codecs", "encode":  # how Python 3 writes bytes for Python 2
                return lambda text, encoding: text.encode("latin1")
        raise _Foreign(f"{module}.{name}")
