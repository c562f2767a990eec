"""CIFAR-10 in its author's four forms, and pickles that want more than to be read."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import pickletools
import tarfile
import threading

import numpy as np
import pytest
import torch

from sparsedm.errors import InputError
from sparsedm.train import array_files
from sparsedm.train.array_files import CLASSES, TEST, TRAIN, cifar10_folder, download_cifar10, read_cifar10

N = 4  # images in a batch here


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (N, 3072), np.uint8)


def labels(index):
    return [(index * N + i) % 10 for i in range(N)]


def as_pickle(index, protocol=2):
    return pickle.dumps({b"batch_label": b"x", b"data": pixels(index), b"labels": labels(index)}, protocol)


def as_python_2(index):
    """What Python 2 wrote: the same opcodes with its byte strings, and numpy's old module name."""
    raw = pixels(index).tobytes()

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R"
    dtype += b"(K\3" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    array += b"(K\1K" + bytes([N]) + b"M\0\x0c\x86" + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    some = b"](" + bytes(byte for label in labels(index) for byte in (ord("K"), label)) + b"e"
    rest = text(b"labels") + some + text(b"filenames") + b"](" + text(b"a.png") + b"e"
    return b"\x80\2}(" + text(b"data") + array + rest + b"u."


def as_binary(index):
    return np.column_stack([np.array(labels(index), np.uint8), pixels(index)]).tobytes()


FORMS = {"python 3": (as_pickle, ""), "python 2": (as_python_2, ""), "binary": (as_binary, ".bin")}


def batches(form="python 2", **changed):
    """{file name: bytes} of a whole set; changed: name=bytes to put something else there, name=None to leave it out."""
    write, suffix = FORMS[form]
    files = {f"{name}{suffix}": write(i) for i, name in enumerate(TRAIN + TEST)} | {"readme.html": b"<html>"}
    return {name: content for name, content in (files | changed).items() if content is not None}


def folder_of(path, files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def tar_of(path, files, inside="cifar-10-batches-py/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(inside + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_pickles_of_this_test_are_what_python_reads():
    """The hand-written Python 2 pickle, read by Python's own unpickler, is the batch it says it is."""
    pickletools.dis(as_python_2(1), out=io.StringIO())
    batch = pickle.loads(as_python_2(1).replace(b"numpy.core.", b"numpy._core."), encoding="bytes")
    assert np.array_equal(batch[b"data"], pixels(1))
    assert batch[b"labels"] == labels(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_every_form_gives_the_same_images(tmp_path, form, packed):
    path = tar_of(tmp_path / "a.tar.gz", batches(form)) if packed else folder_of(tmp_path / "a", batches(form))
    parts = read_cifar10(path)
    assert parts.class_names == CLASSES
    for split, numbers in {"train": range(5), "test": [5]}.items():
        images, found = parts.splits[split]
        assert images.dtype == torch.uint8
        expected = np.concatenate([pixels(i) for i in numbers]).reshape(-1, 3, 32, 32)
        assert torch.equal(images, torch.from_numpy(expected))
        assert torch.equal(found, torch.tensor([label for i in numbers for label in labels(i)]))


def test_a_column_major_array_is_read_as_one(tmp_path):
    content = pickle.dumps({b"data": np.asfortranarray(pixels(0)), b"labels": labels(0)}, 2)
    parts = read_cifar10(folder_of(tmp_path / "a", batches(data_batch_1=content)))
    assert torch.equal(parts.splits["train"][0][:N].flatten(1), torch.from_numpy(pixels(0)))


def test_cifar10_folder_finds_the_batches(tmp_path):
    inside = folder_of(tmp_path / "root" / "cifar-10-batches-bin", batches("binary"))
    assert cifar10_folder(inside) == inside
    assert cifar10_folder(tmp_path / "root") == inside
    assert cifar10_folder(tmp_path) is None


class Creates:
    """Unpickled by Python itself, this creates the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, packed):
    target = tmp_path / "pwned"
    evil = pickle.dumps({b"data": pixels(0), b"labels": Creates(target)}, 2)
    pickle.loads(evil)
    assert target.exists(), "this pickle must be able to do harm, or the test shows nothing"
    target.unlink()
    files = batches(data_batch_3=evil)
    path = tar_of(tmp_path / "a.tar.gz", files) if packed else folder_of(tmp_path / "a", files)
    with pytest.raises(InputError, match=r"data_batch_3 asks for (_io|io)\.open, which no .*: refused"):
        read_cifar10(path)
    assert not target.exists()


FOREIGN = [
    "builtins eval",
    "os system",
    "numpy load",
    "numpy.core.multiarray scalar",
    "_codecs decode",
    "numpy dtype.type",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_no_other_name_is_looked_up(tmp_path, name):
    content = b"\x80\2c" + name.replace(" ", "\n").encode() + b"\n."
    with pytest.raises(InputError, match=f"asks for {name.replace(' ', '.')}, which"):
        read_cifar10(folder_of(tmp_path / "a", batches(data_batch_1=content)))


GOOD = {b"data": pixels(0), b"labels": labels(0)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        as_pickle(0)[:-500],
        pickle.dumps([1], 2),
        pickle.dumps({b"labels": labels(0)}, 2),
        pickle.dumps(GOOD | {b"labels": labels(0)[1:]}, 2),
        pickle.dumps(GOOD | {b"labels": [0, 1, 2, 10]}, 2),
        pickle.dumps(GOOD | {b"labels": [0, 1, 2, -1]}, 2),
        pickle.dumps(GOOD | {b"labels": [0, 1, 2, b"x"]}, 2),
        pickle.dumps(GOOD | {b"data": pixels(0)[:, :-1]}, 2),
        pickle.dumps(GOOD | {b"data": pixels(0).astype(np.int8)}, 2),
    ],
    ids=lambda content: str(len(content)),
)
def test_a_damaged_batch_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"test_batch is not a CIFAR-10 batch \("):
        read_cifar10(folder_of(tmp_path / "a", batches(test_batch=content)))


@pytest.mark.parametrize("content", [b"", as_binary(0)[:-1], b"\x0a" + as_binary(0)[1:]], ids=["empty", "cut", "label"])
def test_a_damaged_binary_batch_is_named(tmp_path, content):
    with pytest.raises(InputError, match=r"test_batch\.bin is not a CIFAR-10 batch \("):
        read_cifar10(folder_of(tmp_path / "a", batches("binary") | {"test_batch.bin": content}))


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_a_missing_batch_is_not_left_out_in_silence(tmp_path, packed):
    files = batches(data_batch_4=None)
    path = tar_of(tmp_path / "a.tar.gz", files) if packed else folder_of(tmp_path / "a", files)
    with pytest.raises(InputError, match="lacks data_batch_4: CIFAR-10 is data_batch_1 to data_batch_5 and test_batch"):
        read_cifar10(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_tar_is_refused(tmp_path, keep):
    path = tar_of(tmp_path / "a.tar.gz", batches())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"a\.tar\.gz is not a readable tar\.gz file, perhaps cut short"):
        read_cifar10(path)


@pytest.mark.parametrize("place", [slice(-6, -5), slice(20_000, 60_000)], ids=["checksum", "stream"])
def test_a_damaged_gzip_is_refused(tmp_path, place):
    path = tar_of(tmp_path / "a.tar.gz", batches())
    content = bytearray(path.read_bytes())
    content[place] = bytes(255 - byte for byte in content[place])
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar\.gz is not a readable tar\.gz file"):
        read_cifar10(path)


def test_members_that_climb_out_are_read_in_memory_only(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", batches(), inside="../../")
    assert len(read_cifar10(path).splits["test"][0]) == N
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "MOST_BATCH_BYTES", 1000)
    with pytest.raises(InputError, match=r"'cifar-10-batches-py/data_batch_1' of .* bytes, which no CIFAR-10 batch is"):
        read_cifar10(tar_of(tmp_path / "a.tar.gz", batches()))
    with pytest.raises(InputError, match="data_batch_1 is larger than 1000 bytes"):
        read_cifar10(folder_of(tmp_path / "a", batches()))


def test_download(tmp_path, monkeypatch):
    path = tar_of(tmp_path / "mirror.tar.gz", batches())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("SPARSEDM_CIFAR10_URL", f"http://127.0.0.1:{server.server_port}/mirror.tar.gz")
        with pytest.raises(InputError, match=r"mirror\.tar\.gz was incomplete, or is another.*6d958be074577803d12ec"):
            download_cifar10(tmp_path / "cache")
        monkeypatch.setattr(array_files, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        found = download_cifar10(tmp_path / "cache")
        server.shutdown()
    assert found == tmp_path / "cache" / "cifar-10-python.tar.gz"
    assert len(read_cifar10(found).splits["train"][0]) == 5 * N
    assert gzip.decompress(found.read_bytes())


def test_the_names_of_cifar10_are_its_authors():
    assert " ".join(CLASSES) == "airplane automobile bird cat deer dog frog horse ship truck"
