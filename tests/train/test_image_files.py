"""Folders and zips of images: what they mean, and that whatever is wrong with them is one sentence naming the file."""

import io
import json
import os
import stat
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm.errors import InputError
from sparsedm.train import image_files
from sparsedm.train.image_files import read_image_files, resized


def picture(seed=0, size=(6, 4), mode="RGB", format="PNG", **options):
    """The bytes of an image file of random pixels; size is (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def pixels_of(content):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


def folder_of(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zip_of(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(params=["folder", "zip"])
def place(request, tmp_path):
    """A function that puts files {name: bytes} into a folder or a zip file and returns its path."""
    if request.param == "folder":
        return lambda files: folder_of(tmp_path / "set", files)
    return lambda files: zip_of(tmp_path / "set.zip", files)


FILES = {"cat/b.png": picture(1), "cat/a.png": picture(2), "ant/z.png": picture(3)}


def test_classes_are_folders_in_alphabetical_order(place):
    parts = read_image_files(place(FILES))
    images, labels = parts.splits["all"]
    assert parts.class_names == ("ant", "cat")
    assert labels.tolist() == [0, 1, 1]
    assert labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([pixels_of(FILES[n]) for n in ("ant/z.png", "cat/a.png", "cat/b.png")]))


def test_no_class_folders_no_labels(place):
    parts = read_image_files(place({"b.png": picture(1), "a.png": picture(2)}))
    images, labels = parts.splits["all"]
    assert labels is None
    assert parts.class_names == ()
    assert torch.equal(images[0], pixels_of(picture(2)))


def test_folders_around_everything_and_below_a_class_mean_nothing(place):
    files = {f"my/set/{name}": content for name, content in FILES.items()}
    parts = read_image_files(place(files | {"my/set/dog/deep/er/a.png": picture()}))
    assert parts.class_names == ("ant", "cat", "dog")


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_train_and_test_folders_are_the_splits(place, held_out):
    train = {f"set/train/{name}": content for name, content in FILES.items()}
    parts = read_image_files(place(train | {f"set/{held_out}/cat/q.png": picture(9)}))
    assert {name: labels.tolist() for name, (_, labels) in parts.splits.items()} == {"train": [0, 1, 1], "test": [1]}
    assert torch.equal(parts.splits["test"][0][0], pixels_of(picture(9)))
    assert torch.equal(parts.splits["train"][0][0], pixels_of(FILES["ant/z.png"]))


def test_three_splits_are_one_too_many(place):
    path = place({f"{name}/a.png": picture() for name in ("train", "test", "val")})
    with pytest.raises(InputError, match="holds test, train, val: beside train there may be one of test, val,"):
        read_image_files(path)


def test_what_lies_beside_the_splits_is_named(place):
    path = place({"train/a.png": picture(), "test/a.png": picture(), "readme.txt": b"x"})
    with pytest.raises(
        InputError, match=r"holds test, train, readme\.txt: beside train there may be one of test, val,"
    ):
        read_image_files(path)


def test_hidden_files_are_ignored(place):
    hidden = ["__MACOSX/cat/._a.png", ".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "desktop.ini", ".git/HEAD"]
    parts = read_image_files(place(FILES | dict.fromkeys(hidden, b"no image")))
    assert len(parts.splits["all"][0]) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    content = picture(mode=mode, format="TIFF")
    images, _ = read_image_files(folder_of(tmp_path, {"a.tif": content})).splits["all"]
    assert torch.equal(images[0], pixels_of(content))


def test_sixteen_bits_are_refused_instead_of_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png in .* has pixels of mode I(;16)?: 8 bits per channel are read"):
        read_image_files(tmp_path)


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    content = picture(size=(6, 4), exif=exif)
    images, _ = read_image_files(folder_of(tmp_path, {"a.png": content})).splits["all"]
    assert torch.equal(images[0], pixels_of(content).rot90(-1, (1, 2)))


def test_size_crops_the_middle_square_and_resizes(place):
    """Flat regions survive any filter: the left and right quarter, which the crop removes, are of another colour."""
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = (200, 100, 50)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    path = place({"wide.png": file.getvalue(), "small.png": picture(size=(3, 3))})
    images, _ = read_image_files(path, size=4).splits["all"]
    assert images.shape == (2, 3, 4, 4)
    assert torch.equal(images[1], torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))


def test_resized_arrays_are_what_resized_files_are(tmp_path):
    content = picture(size=(9, 7))
    from_file = read_image_files(folder_of(tmp_path, {"a.png": content}), size=5).splits["all"][0]
    assert torch.equal(resized(pixels_of(content)[None], 5), from_file)
    grey = pixels_of(picture(mode="L"))[None, :1]
    assert torch.equal(resized(grey, 5).expand(1, 3, 5, 5), resized(grey.expand(1, 3, 4, 6).contiguous(), 5))


def test_a_large_set_keeps_its_order(tmp_path):
    files = {f"{i % 3}/{i:03}.png": picture(i) for i in range(200)}  # several chunks for the threads
    images, labels = read_image_files(zip_of(tmp_path / "a.zip", files)).splits["all"]
    assert torch.equal(images, torch.stack([pixels_of(files[name]) for name in sorted(files)]))
    assert labels.tolist() == sorted(i % 3 for i in range(200))


def test_mixed_sizes_name_two_files_and_the_way_out(place):
    path = place({"a.png": picture(size=(6, 4)), "b.png": picture(size=(5, 4))})
    with pytest.raises(InputError, match=r"a\.png is 6x4 and b\.png is 5x4 pixels, but all need one size"):
        read_image_files(path)


def test_a_file_that_is_no_image_is_named(place):
    with pytest.raises(InputError, match=r"cat/notes\.txt in .*set.* is not an image"):
        read_image_files(place(FILES | {"cat/notes.txt": b"remember the milk"}))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP"])
def test_a_truncated_image_is_named(place, format):
    content = picture(size=(40, 40), format=format)
    with pytest.raises(InputError, match=r"cannot read cat/cut in .*truncated"):
        read_image_files(place(FILES | {"cat/cut": content[: len(content) // 2]}), size=4)


def test_images_beside_class_folders_are_not_dropped(place):
    with pytest.raises(InputError, match=r"has class folders such as ant, but loose\.png lies in none"):
        read_image_files(place(FILES | {"loose.png": picture()}))


@pytest.mark.parametrize("files", [{}, {".DS_Store": b""}], ids=["nothing", "hidden"])
def test_an_empty_set_is_refused(tmp_path, files):
    (tmp_path / "folder").mkdir()
    for path in (zip_of(tmp_path / "a.zip", files), folder_of(tmp_path / "folder", files)):
        with pytest.raises(InputError, match=f"{path.name} holds no images"):
            read_image_files(path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_zip_is_refused(tmp_path, keep):
    path = zip_of(tmp_path / "a.zip", FILES)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"a\.zip is not a readable zip file, perhaps cut short"):
        read_image_files(path)


def test_a_flipped_bit_in_a_zip_is_found(tmp_path):
    path = zip_of(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.index(FILES["cat/a.png"]) + 60] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read cat/a\.png in .*CRC"):
        read_image_files(path)


@pytest.mark.parametrize("name", ["../evil.png", "cat/../../evil.png", "/etc/evil.png", "..\\evil.png"])
def test_a_path_that_climbs_out_of_a_zip_is_refused(tmp_path, name):
    path = zip_of(tmp_path / "in" / "a.zip", FILES | {name: picture()})
    with pytest.raises(InputError, match="a path in a zip file must stay inside it"):
        read_image_files(path)
    assert os.listdir(tmp_path) == ["in"]


def test_a_symbolic_link_in_a_zip_is_refused(tmp_path):
    path = zip_of(tmp_path / "a.zip", FILES)
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match=r"'cat/link\.png', a symbolic link"):
        read_image_files(path)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = zip_of(tmp_path / "a.zip", {"a.png": picture()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"'a\.png', which is encrypted"):
        read_image_files(path)


def test_a_linked_folder_is_not_skipped_in_silence(tmp_path):
    folder_of(tmp_path / "set", FILES)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "set" / "cat")
    with pytest.raises(InputError, match="set/dog is a link to a folder: links are not followed"):
        read_image_files(tmp_path / "set")


def test_a_pipe_in_a_folder_does_not_block(tmp_path):
    os.mkfifo(folder_of(tmp_path, FILES) / "cat" / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png is not a plain file"):
        read_image_files(tmp_path)


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MOST_FILE_BYTES", 71, r"of \d+ bytes, more than 71"),
        ("MOST_PIXELS", 23, "6x4 pixels, more than 23"),
    ],
)
def test_bombs_are_bounded(tmp_path, monkeypatch, limit, value, message):
    monkeypatch.setattr(image_files, limit, value)
    with pytest.raises(InputError, match=message):
        read_image_files(zip_of(tmp_path / "a.zip", FILES))


def test_a_set_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 14)  # pages of so many bytes, and so many of them
    with pytest.raises(InputError, match=r"not enough memory: .*a.zip, 3 images of 6x4 pixels, takes"):
        read_image_files(zip_of(tmp_path / "a.zip", FILES))


def test_a_program_is_no_image(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(InputError, match=r"a.png in .* is PostScript, a program, which is not run"):
        read_image_files(tmp_path)


@pytest.mark.parametrize("change", ["method", "damaged", "twice"])
def test_a_strange_archive_is_one_sentence(tmp_path, change):
    labels = {"labels": [["cat/a.png", 0], ["cat/a.png", 1]] if change == "twice" else []}
    path = zip_of(tmp_path / "a.zip", FILES | {"dataset.json": json.dumps(labels).encode() * (1 + (change != "twice"))})
    content = bytearray(path.read_bytes())
    place = content.rindex(b"PK\x01\x02", 0, content.rindex(b"dataset.json"))  # in the list of members
    if change == "method":
        content[place + 10] = 99
    if change == "damaged":
        content[content.index(b"dataset.json") + 12 + 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not a readable zip file|dataset.json in .* is damaged"):
        read_image_files(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path):
    folder_of(tmp_path, FILES)
    (tmp_path / "cat").chmod(0)
    with pytest.raises(InputError, match=r"cannot read .*cat: Permission denied"):
        read_image_files(tmp_path)
    (tmp_path / "cat").chmod(0o700)


def test_images_of_one_pixel_across_keep_their_colours():
    images = torch.tensor([[10, 20, 30, 40], [50, 60, 70, 80], [90, 100, 110, 120]], dtype=torch.uint8)
    for shape, axis in (((1, 3, 1, 4), 3), ((1, 3, 4, 1), 2)):
        fitted = resized(images.view(shape), 1)
        assert torch.equal(fitted.flatten(), images.view(shape).narrow(axis, 1, 1).flatten()), "the middle pixel"
    grey = torch.tensor([7, 8, 9], dtype=torch.uint8).view(1, 1, 3, 1)
    assert resized(grey, 2).unique().tolist() == [8]


# ---- CelebA's crop, and labels in a list -----------------------------------------------------------------------------


def test_celebas_crop_is_the_originals(tmp_path):
    """U-ViT and DDIM: x from 25, y from 57, 128 pixels each way, then bilinear; other sizes as always."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (218, 178, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cut = Image.fromarray(pixels[57 : 57 + 128, 25 : 25 + 128])
    for size, expected in ((128, np.asarray(cut)), (64, np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR)))):
        images, _ = read_image_files(tmp_path, size, crop="celeba").splits["all"]
        assert np.array_equal(images[0].numpy().transpose(1, 2, 0), expected)
        square, _ = read_image_files(tmp_path, size).splits["all"]
        assert not torch.equal(square, images)
    Image.fromarray(pixels[:100, :90]).save(tmp_path / "a.png")
    assert torch.equal(*(read_image_files(tmp_path, 64, crop=crop).splits["all"][0] for crop in ("celeba", "square")))


def listed(folder, labels):
    for name in ("00000/a.png", "00000/b.png", "00001/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / name)
    (folder / "dataset.json").write_text(json.dumps(labels) if not isinstance(labels, str) else labels)
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_dataset_json_gives_the_labels(tmp_path, packed):
    labels = {"labels": [["00001/c.png", 0], ["00000/b.png", 4], ["00000/a.png", 2]]}
    source = listed(tmp_path / "set", labels)
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for file in source.rglob("*.*"):
                archive.write(file, file.relative_to(tmp_path))
        source = tmp_path / "set.zip"
    parts = read_image_files(source)
    assert parts.splits["all"][1].tolist() == [2, 4, 0]
    assert parts.class_names == ("0", "1", "2", "3", "4")


def test_dataset_json_without_labels(tmp_path):
    parts = read_image_files(listed(tmp_path, {"labels": None}))
    assert parts.splits["all"][1] is None
    assert parts.class_names == ()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"labels": [["00000/a.png", 1], ["00000/b.png", 0]]}, r"gives 00001/c.png the label None"),
        ({"labels": [["00000/a.png", -1], ["00000/b.png", 0], ["00001/c.png", 0]]}, "the label -1"),
        ({"labels": [["00000/a.png", 1.5], ["00000/b.png", 0], ["00001/c.png", 0]]}, "the label 1.5"),
        ({"classes": []}, "dataset.json in .* is damaged"),
        ("[" * 100_000, "dataset.json in .* is damaged"),
        ({"labels": [3]}, "dataset.json in .* is damaged"),
    ],
    ids=["missing", "negative", "fraction", "no labels", "deep", "no pairs"],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        read_image_files(listed(tmp_path, labels))


def test_other_sizes_are_resized_by_lanczos():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((5, 5), Image.Resampling.LANCZOS))
    fitted = resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], 5, progress=False)
    assert np.array_equal(fitted[0].permute(1, 2, 0).numpy(), expected)
