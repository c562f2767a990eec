"""One tensor from every kind of source, a cache that is never stale, and batches that are functions of (seed, step)."""

import os
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from sparsedm import files
from sparsedm.errors import InputError
from sparsedm.train import array_files, data
from sparsedm.train.data import ImageSet, batch, batch_indices, check_source, load
from tests.train.test_array_files import batches, folder_of, tar_of
from tests.train.test_image_files import FILES, picture, pixels_of, zip_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of this test; and no test may touch the user's."""
    monkeypatch.setenv("SPARSEDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(count, folder="cat"):
    return {f"{folder}/{i:04}.png": picture(i) for i in range(count)}


def npz_of(path, **arrays):
    np.savez(path, **arrays)
    return path


def image_rows(images):
    return {row.tobytes() for row in images.flatten(1).numpy()}


# ---- sources


@pytest.mark.skipif(os.name == "nt", reason="names of files are text there")
def test_names_that_are_not_utf_8_are_read_and_cached(tmp_path, cache):
    folder = tmp_path / "caf\udce9"
    for i in range(4):
        (folder / f"{'ab'[i % 2]}\udcff").mkdir(parents=True, exist_ok=True)
        (folder / f"{'ab'[i % 2]}\udcff" / f"\udcfe{i}.png").write_bytes(picture(i))
    first, again = load(folder), load(folder)
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert first.class_names == again.class_names == ("a\udcff", "b\udcff")
    assert torch.equal(first.images, again.images)


SIDES = [("synthetic", None, 12), ("synthetic", 20, 20), ("synthetic:32", None, 32)]


@pytest.mark.parametrize(("source", "size", "side"), SIDES)
def test_synthetic(source, size, side):
    images = load(source, "test", size=size, limit=100)
    assert images.images.shape == (100, 3, side, side)
    assert images.source == source
    assert int(images.labels.max()) < len(images.class_names)


def test_synthetic_splits_share_no_image():
    assert not image_rows(load("synthetic").images) & image_rows(load("synthetic", "test").images)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_cifar10_has_its_own_test_split(tmp_path, packed):
    if packed:
        path = inside = tar_of(tmp_path / "a.tgz", batches())
    else:
        path, inside = tmp_path, folder_of(tmp_path / "cifar-10-batches-py", batches())
    expected = array_files.read_cifar10(inside).splits
    for split in ("train", "test"):
        for _ in ("decoded", "cached"):
            images = load(path, split)
            assert torch.equal(images.images, expected[split][0])
            assert torch.equal(images.labels, expected[split][1])
            assert images.class_names == array_files.CLASSES


def test_cifar10_by_name_is_downloaded(tmp_path, monkeypatch, cache):
    path = tar_of(tmp_path / "a.tgz", batches())
    asked = []
    monkeypatch.setattr(data, "download_cifar10", lambda folder, progress: asked.append(folder) or path)
    assert len(load("cifar10")) == 20
    assert asked == [cache]


def test_sizes_are_changed_on_request(tmp_path):
    assert load(tar_of(tmp_path / "a.tgz", batches()), size=8).images.shape == (20, 3, 8, 8)
    assert load(zip_of(tmp_path / "a.zip", FILES), "test", size=5).images.shape == (1, 3, 5, 5)
    array = np.zeros((130, 6, 6, 1), np.uint8)
    assert load(npz_of(tmp_path / "a.npz", x=array), size=5).images.shape == (66, 1, 5, 5)
    assert load(npz_of(tmp_path / "a.npz", x=array), size=6).images.shape == (66, 1, 6, 6)


def test_a_zip_with_splits_is_not_split_again(tmp_path):
    files = {f"{split}/{name}": content for name, content in FILES.items() for split in ("train", "test")}
    for split in ("train", "test"):
        images = load(zip_of(tmp_path / "a.zip", files), split)
        assert len(images) == 3
        assert images.class_names == ("ant", "cat")


# ---- hold-out and limit


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (100, 50), (500, 64), (4000, 80)])
def test_what_is_held_out_is_a_fixed_part_and_never_trained_on(tmp_path, count, held_out):
    """64 at least, then 2%; of fewer than 128 images half."""
    array = np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1)
    path = npz_of(tmp_path / "a.npz", x=-array, y=np.arange(count) % 7)
    train, test = load(path), load(path, "test")
    assert len(test) == held_out
    together = -torch.cat([train.images, test.images]).flatten()
    assert torch.equal(together.sort().values, torch.arange(count, dtype=torch.float32))
    for images in (train, test):
        numbers = -images.images.flatten()
        assert torch.equal(images.labels, numbers.long() % 7)
        assert torch.equal(numbers, numbers.sort().values)
    assert torch.equal(load(path, "test").images, test.images)


def test_the_hold_out_rule_is_the_same_everywhere(tmp_path):
    """Recorded once: if it changes, images that older runs trained on become validation images."""
    path = npz_of(tmp_path / "a.npz", x=-np.arange(1000, dtype=np.float32).reshape(-1, 1, 1, 1))
    assert load(path, "test", limit=8).images.neg().flatten().tolist() == RECORDED


RECORDED = [27, 151, 248, 392, 581, 664, 775, 910]


def test_one_image_cannot_be_split(tmp_path):
    with pytest.raises(InputError, match=r"a\.zip holds one image, so none can be held out"):
        load(zip_of(tmp_path / "a.zip", {"a.png": picture()}))


def test_limit_keeps_all_classes(tmp_path):
    count = 1000
    path = npz_of(tmp_path / "a.npz", x=np.full((count, 1, 1, 1), -1.0), y=np.arange(count) // 100)
    images = load(path, limit=20)
    assert len(images) == 20
    assert images.labels.unique().tolist() == list(range(10))
    assert len(load(path, limit=10**6)) == count - 64


# ---- npz


def test_celebas_crop_is_for_arrays_too(tmp_path):
    image = np.random.default_rng(0).integers(256, size=(218, 178, 3), dtype=np.uint8)
    np.savez(tmp_path / "faces.npz", images=np.stack([image] * 4))
    (tmp_path / "faces").mkdir()
    for number in range(4):
        Image.fromarray(image).save(tmp_path / "faces" / f"{number}.png")
    for crop in ("celeba", "square"):
        arrays, files = (load(tmp_path / name, size=64, crop=crop) for name in ("faces.npz", "faces"))
        assert torch.equal(arrays.images[0], files.images[0])
    assert not torch.equal(arrays.images[0], load(tmp_path / "faces.npz", size=64, crop="celeba").images[0])


def test_npz_images_in_either_layout(tmp_path):
    nhwc = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
    for array in (nhwc, nhwc.transpose(0, 3, 1, 2)):
        path = npz_of(tmp_path / "a.npz", arr_0=array, arr_1=np.array([3, 1, 0, 2], np.uint8))
        images = torch.cat([load(path).images, load(path, "test").images])
        assert image_rows(images) == {row.tobytes() for row in nhwc.transpose(0, 3, 1, 2).reshape(4, -1)}
        assert images.is_contiguous()
        assert images.shape[1:] == (3, 8, 6)
        assert load(path).class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npz_latents_become_float32(tmp_path, dtype):
    latents = np.random.default_rng(0).normal(size=(2, 4, 3, 3)).astype(dtype)
    images = load(npz_of(tmp_path / "a.npz", images=latents))
    assert images.is_latent
    assert images.images.dtype == torch.float32
    assert images.labels is None
    assert any(np.array_equal(images.images[0].numpy(), one.astype(np.float32)) for one in latents)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 8, 8, 3), (4, 1, 8, 8)])
@pytest.mark.parametrize("top", [1, 255])
def test_pixels_in_floating_point_are_no_latents(tmp_path, shape, top):
    """They trained unscaled, and their samples were washed out."""
    pixels = np.random.default_rng(0).random(shape, np.float32) * top
    with pytest.raises(
        InputError, match=r"a\.npz: floating-point images are latents, and these lie from .*: store pixels"
    ):
        load(npz_of(tmp_path / "a.npz", images=pixels))
    assert load(npz_of(tmp_path / "b.npz", images=pixels - top / 2)).is_latent


def test_a_mirrored_twin_is_on_the_side_of_its_image(tmp_path):
    n = 200
    latents = np.random.default_rng(0).normal(size=(n, 4, 2, 2)).astype(np.float32)
    both = np.concatenate((latents, latents[..., ::-1]))
    path = npz_of(tmp_path / "a.npz", images=both, mirrored=True, labels=np.tile(np.arange(n), 2))
    train, test = load(path), load(path, "test")
    assert (len(train), len(test)) == (2 * (n - 64), 64)
    assert not set(train.labels.tolist()) & set(test.labels.tolist())
    assert torch.equal(train.images[: n - 64], train.images[n - 64 :].flip(-1))
    assert len(test.labels.unique()) == 64
    with pytest.raises(InputError, match="mirrored needs images and as many mirrored ones, not 399 in all"):
        load(npz_of(tmp_path / "b.npz", images=both[1:], mirrored=True))


def test_what_is_hidden_in_a_folder_need_not_be_readable(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(colour=number))
    (folder / ".#0.png").symlink_to("me@host.1:2")
    (folder / ".git").mkdir()
    (folder / ".git" / "gone").symlink_to("nowhere")
    assert len(load(folder)) + len(load(folder, "test")) == 3


def test_what_is_written_must_not_be_read_as_an_image(tmp_path):
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link"):
        for out in (folder / "a.json", folder / "runs" / "new" / "a.json", tmp_path / "link" / "cat" / "a.json"):
            with pytest.raises(InputError, match="would be read as an image: write to another folder"):
                check_source(str(place), out=out)
    for out in (tmp_path / "a.json", folder / ".runs" / "a.json", tmp_path / "images2" / "a.json"):
        check_source(str(folder), out=out)
    (folder / "data_batch_1.bin").touch()  # of CIFAR-10's folder nothing else is read
    check_source(str(folder), out=folder / "runs" / "a.json")


@pytest.mark.parametrize("source", ["~nobody_has_this_name/a", "~nobody_has_this_name.zip"])
def test_the_home_of_nobody_is_no_source(source):
    with pytest.raises(InputError, match="no such file or folder"):
        load(source)


OK = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds the arrays none: one of images, x, arr_0, moments is needed"),
        ({"x_train": OK}, "holds the arrays x_train: one of images, x, arr_0, moments is needed"),
        ({"x": OK, "images": OK}, "holds the arrays x, images"),
        ({"x": OK, "weights": OK}, "holds the arrays x, weights"),
        ({"x": OK[0]}, r"images of shape \(8, 8, 3\) must be"),
        ({"x": OK[:0]}, r"shape \(0, 8, 8, 3\) hold nothing: at least one"),
        ({"x": OK.astype(np.int64)}, r"images of int64 \(2, 8, 8, 3\) must be uint8"),
        ({"x": np.zeros((2, 8, 8, 4), np.uint8)}, r"images of uint8 \(2, 8, 8, 4\) must be uint8 with 1 or 3 channels"),
        ({"x": np.zeros((2, 3, 8, 3), np.uint8)}, r"images of uint8 \(2, 3, 8, 3\) must be"),
        ({"x": np.full((2, 4, 8, 8), np.nan)}, "the latents hold NaN or infinity"),
        ({"x": OK, "y": np.zeros(3, np.int64)}, "labels must be 2 integers from 0 to 65535"),
        ({"x": OK, "y": np.zeros((2, 1), np.int64)}, "labels must be 2 integers"),
        ({"x": OK, "y": np.zeros(2)}, "labels must be 2 integers"),
        ({"x": OK, "y": np.array([0, -1])}, "labels must be 2 integers"),
        ({"x": OK, "y": np.array([0, 2**40])}, "labels must be 2 integers"),
        ({"x": OK, "y": np.array([{}, {}])}, r"a\.npz is not a readable \.npz file of plain arrays \(Object arrays"),
    ],
)
def test_npz_refusals(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        load(npz_of(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"no zip", None], ids=["empty", "foreign", "cut"])
def test_a_damaged_npz_is_refused(tmp_path, content):
    path = npz_of(tmp_path / "a.npz", x=OK)
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(InputError, match=r"a\.npz is not a readable \.npz file"):
        load(path)


def test_a_member_of_an_npz_that_is_no_array_is_refused(tmp_path):
    with zipfile.ZipFile(npz_of(tmp_path / "a.npz", labels=np.arange(2)), "a") as archive:
        archive.writestr("images", b"pixels")
    with pytest.raises(InputError, match=r"a\.npz holds images, which is no numpy array"):
        load(tmp_path / "a.npz")


def test_an_npz_bomb_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 10)  # pages of so many bytes, and so many of them
    with pytest.raises(InputError, match=r"not enough memory: unpacking .*a\.npz takes"):
        load(npz_of(tmp_path / "a.npz", x=OK))


def test_a_way_of_compression_that_python_lacks_is_refused(tmp_path):
    path = npz_of(tmp_path / "a.npz", x=OK)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz is not a readable \.npz file .*compression"):
        load(path)


def test_latents_cannot_be_resized(tmp_path):
    with pytest.raises(InputError, match=r"a\.npz holds latents of 8x8, which cannot be resized to 16"):
        load(npz_of(tmp_path / "a.npz", x=np.zeros((2, 4, 8, 8))), size=16)


# ---- other refusals


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no/where", {}, "data 'no/where': no such file or folder, and not synthetic or cifar10"),
        ("synthetic", {"split": "val"}, "the split 'val' must be one of train, test"),
        ("synthetic", {"size": 0}, "size must be at least 1, not 0"),
        ("synthetic", {"limit": -1}, "limit must be at least 1, not -1"),
        ("synthetic:big", {}, "data 'synthetic:big': write synthetic or synthetic:SIZE"),
        ("synthetic:32", {"size": 16}, "drawn images are not resized, and 16x16 is needed: write synthetic"),
        ("synthetic:4", {}, "need size >= 8"),
    ],
)
def test_refusals(source, options, message):
    with pytest.raises(InputError, match=message):
        load(source, **options)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.rar: must be a folder, or end in \.zip, \.npz, \.tar\.gz, \.tgz"):
        load(tmp_path / "a.rar")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.tgz"])
def test_no_permission_is_one_sentence(tmp_path, name):
    (tmp_path / name).touch(mode=0)
    with pytest.raises(InputError, match=f"cannot read .*{name}: Permission denied"):
        load(tmp_path / name)


# ---- the cache


def decodes():
    """Counts how often a source is decoded."""
    return mock.patch.object(data, "_decode", wraps=data._decode)


@pytest.mark.parametrize("kind", ["zip", "folder", "tgz"])
def test_the_second_load_comes_from_the_cache(tmp_path, cache, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        zip_of(path, FILES)
    elif kind == "tgz":
        tar_of(path, batches())
    else:
        (path / "cat").mkdir(parents=True)
        for i in range(3):
            (path / "cat" / f"{i}.png").write_bytes(picture(i))
    with decodes() as decode:
        first = {split: load(path, split) for split in ("train", "test")}
        again = {split: load(path, split) for split in ("train", "test")}
    assert decode.call_count == 1
    for split in ("train", "test"):
        assert torch.equal(first[split].images, again[split].images)
        assert first[split].class_names == again[split].class_names
        if kind == "folder":
            assert first[split].labels is again[split].labels is None
        else:
            assert torch.equal(first[split].labels, again[split].labels)
    assert len(list((cache / "decoded").iterdir())) == 1


def test_the_cache_knows_sizes_apart(tmp_path):
    path = zip_of(tmp_path / "a.zip", FILES)
    with decodes() as decode:
        assert [load(path, size=size).images.shape[-1] for size in (None, 5, None, 5)] == [6, 5, 6, 5]
    assert decode.call_count == 2


def test_the_sizes_before_fitting_are_known_from_the_cache_too(tmp_path):
    path = zip_of(tmp_path / "a.zip", {"a.png": picture(size=(6, 4)), "b.png": picture(size=(5, 5))})
    with decodes() as decode:
        for _ in range(2):
            assert load(path, size=5).sizes == {"6x4": "a.png", "5x5": "b.png"}
    assert decode.call_count == 1
    array = np.zeros((4, 3, 7, 7), np.uint8)
    assert list(load(npz_of(tmp_path / "a.npz", x=array), size=5).sizes) == ["7x7"]


def test_a_changed_zip_is_decoded_again(tmp_path, cache):
    """Even where name, size and modification time stay as they were."""
    names = list(FILES)
    path = zip_of(tmp_path / "a.zip", FILES)
    before, old = load(path, "test"), path.stat()
    flipped = {name: FILES[other] for name, other in zip(names, reversed(names))}
    zip_of(path, flipped)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    after = load(path, "test")
    assert not torch.equal(before.images, after.images)
    assert len(list((cache / "decoded").iterdir())) == 1, "the old one must be replaced, not pile up"


def test_the_ends_of_a_file_belong_to_its_signature(tmp_path):
    """For file systems whose times are coarse: the end of a zip holds the checksum of every member."""
    signatures = []
    for content in (b"a" * 10, b"b" + b"a" * 9, b"a" * 9 + b"b"):
        (tmp_path / "a").write_bytes(content)
        with mock.patch.object(type(tmp_path), "stat", return_value=os.stat_result([0o100644] + [10] * 9)):
            signatures.append(data._signature(tmp_path / "a", None))
    assert len(set(signatures)) == 3


def folder_with_change(tmp_path, change):
    path = tmp_path / "set"
    for name, content in pictures(4).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    load(path)
    change(path / "cat")
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "0001.png").write_bytes(picture(77)),
        lambda folder: (folder / "0001.png").unlink(),
        lambda folder: (folder / "new.png").write_bytes(picture(78)),
        lambda folder: (folder / "0001.png").rename(folder / "9999.png"),
    ],
    ids=["changed", "removed", "added", "renamed"],
)
def test_a_changed_folder_is_decoded_again(tmp_path, change):
    path = folder_with_change(tmp_path, change)
    found = torch.cat([load(path).images, load(path, "test").images])
    expected = [pixels_of(file.read_bytes()) for file in sorted((path / "cat").iterdir())]
    assert image_rows(found) == image_rows(torch.stack(expected))


def test_a_damaged_or_foreign_cache_is_replaced(tmp_path, cache):
    path = zip_of(tmp_path / "a.zip", FILES)
    expected = load(path).images
    (cached,) = (cache / "decoded").iterdir()
    content = cached.read_bytes()
    without_facts = save(load_file(cached))
    one_bit = content[:-1] + bytes([content[-1] ^ 1])
    for damage in (b"", content[:-10], content[:20], b"x" * 100, without_facts, one_bit):
        cached.write_bytes(damage)
        with decodes() as decode:
            assert torch.equal(load(path).images, expected)
            assert torch.equal(load(path).images, expected)
        assert decode.call_count == 1


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    path = zip_of(tmp_path / "a.zip", FILES)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="are not kept for the next run: cannot write .*: Not a directory"):
        assert len(load(path, cache=tmp_path / "file")) == 2
    monkeypatch.setattr(files.os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(path)
    assert not list((tmp_path / "cache" / "decoded").iterdir())


def test_nothing_is_cached_of_a_source_that_is_refused(tmp_path, cache):
    with pytest.raises(InputError, match="not an image"):
        load(zip_of(tmp_path / "a.zip", FILES | {"cat/notes.txt": b""}))
    assert not cache.exists()


def test_a_cached_set_may_be_changed_and_outlives_its_file(tmp_path, cache):
    path = zip_of(tmp_path / "a.zip", FILES)
    load(path)
    with warnings.catch_warnings(action="error"):
        images = load(path)
    (cached,) = (cache / "decoded").iterdir()
    content = cached.read_bytes()
    images.images.fill_(0)
    assert cached.read_bytes() == content
    cached.unlink()
    assert images.images.sum() == 0


# ---- the set and its batches


def some(count=6, **options):
    shape = (count, 3, 4, 5)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count), tuple("abcdef"), "here", **options)


def test_an_image_set_moves_as_a_whole():
    images = some().to("meta")
    assert len(images) == 6
    assert images.images.device.type == images.labels.device.type == "meta"
    assert images.class_names == tuple("abcdef")
    assert ImageSet(images.images, None, (), "here").to("meta").labels is None


def test_batch_scales_bytes_to_one():
    images = ImageSet(torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1), None, (), "here")
    x, y = batch(images, torch.arange(256))
    assert y is None
    assert x.dtype == torch.float32
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), images.images), "what is sampled must find back"


def test_batch_takes_images_with_their_labels():
    images, indices = some(), torch.tensor([4, 0, 4])
    x, y = batch(images, indices)
    assert y.tolist() == [4, 0, 4]
    assert torch.equal(x, images.images[indices].float() / 127.5 - 1)


def test_each_image_is_mirrored_by_its_own_coin():
    images = some(1)
    x, _ = batch(images, torch.zeros(4000, dtype=torch.int64), flip_generator=torch.Generator().manual_seed(3))
    plain, _ = batch(images, torch.zeros(1, dtype=torch.int64))
    same = (x == plain).flatten(1).all(1)
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 4000**0.5  # five standard errors of a fair coin
    again, _ = batch(images, torch.zeros(4000, dtype=torch.int64), flip_generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, again)


def test_latents_are_neither_scaled_nor_mirrored():
    latents = torch.randn(6, 4, 3, 3)
    images = ImageSet(latents, None, (), "here")
    x, _ = batch(images, torch.tensor([5, 2]), flip_generator=torch.Generator())
    assert torch.equal(x, latents[[5, 2]])


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 10), (7, 20), (1, 2)], ids=str)
def test_batch_indices_walk_through_whole_epochs(n, size):
    stream = torch.cat([batch_indices(n, size, step, seed=5) for step in range(30)])
    assert stream.dtype == torch.int64
    assert len(stream) == 30 * size
    epochs = stream[: len(stream) // n * n].reshape(-1, n)
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))


def test_epochs_and_seeds_differ():
    epochs = [batch_indices(50, 50, step, seed).tolist() for step in range(3) for seed in (0, 1)]
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batch_indices_are_a_pure_function():
    """Whatever was asked before, in whatever order: this is what makes resuming exact."""
    wanted = batch_indices(100, 7, 123, seed=9)
    for step in (0, 500, 122, 124):
        batch_indices(100, 7, step, seed=9).zero_()
        batch_indices(100, 7, 123, seed=step).zero_()
    assert torch.equal(batch_indices(100, 7, 123, seed=9), wanted)


def test_batch_indices_are_the_same_everywhere():
    """Recorded once: if they change, no older run can be repeated or resumed exactly."""
    assert batch_indices(1000, 8, 1000, seed=3).tolist() == RECORDED_INDICES


RECORDED_INDICES = [57, 556, 389, 185, 735, 479, 312, 582]


@pytest.mark.gpu
def test_a_batch_on_the_gpu_is_the_batch_on_the_cpu():
    images, indices = some(), torch.tensor([1, 5, 5, 0])
    for here in (images, images.to("cuda")):
        x, y = batch(here, indices, flip_generator=torch.Generator().manual_seed(1))
        assert x.device == here.images.device
        assert torch.equal(x.cpu(), batch(images, indices, flip_generator=torch.Generator().manual_seed(1))[0])
        assert y.tolist() == [1, 5, 5, 0]


def test_a_pipe_and_a_device_are_refused_rather_than_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zero.zip").symlink_to("/dev/zero")
    for name in ("pipe.npz", "zero.zip"):
        with pytest.raises(InputError, match=f"{name} is a pipe, socket or device: a plain file is needed"):
            data.load(tmp_path / name)
