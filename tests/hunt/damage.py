"""Damage a file in one of many ways: its bytes, what stands in its place, or one value in a file that stays whole."""

import contextlib
import csv
import io
import json
import os
import pickle
import zipfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

JUNK = (b"", b"\0" * 64, b"[]", b"{}", b"null", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000, b"NaN", b"1e999")
JUNK += (
    b"PK\3\4",
    b"PK\5\6" + bytes(18),
    b"\x80\4.",
    b"(" * 5000,
    b"\x89PNG\r\n\x1a\n",
    b"\x93NUMPY\1\0",
    b"\r\n" * 99,
)
STRANGE = (None, True, -1, 0, 2**70, 10**400, 1.5, -0.0, "", "x" * 300, "\0", "\ud800", [], {}, [[]], {"a": {"a": []}})
STRANGE += ("2:4", "-1", 1e300)
CELLS = ("", "nan", "inf", "-inf", "1e400", "1e308", "-1", "0", "0.5", "x", "9" * 400, "$x_{$", "\0", "a\nb", '"', "é")
CELLS += ("0x10", "1_000", "ok", "failed", "2:4", "x" * 200_000, "CPU", "train@", "@", "2000-13-40")
NAMES = (
    "../x.png",
    "/x.png",
    "a\\b.png",
    ".hidden",
    "x" * 300,
    "train/x.png",
    "a/x.txt",
    "",
    "dataset.json",
    "é/ü.png",
)
FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff")


def change(file, random, others=()):
    """Damage one file; returns how. others: files whose content it may get."""
    content, kind = file.read_bytes(), random.random()
    if kind < 0.08:
        return replaced(file, random)
    if kind < 0.14:
        file.write_bytes(random.choice(JUNK))
        return "junk"
    if kind < 0.22:
        how = random.choice(["doubled", "half", "empty", "other"])
        other = random.choice([path for path in others if path != file and path.is_file()] or [file])
        others = {"doubled": 2 * content, "half": content[: len(content) // 2], "empty": b""}
        file.write_bytes(other.read_bytes() if how == "other" else others[how])
        return f"{how} {other.name if how == 'other' else ''}"
    inside = INSIDE.get(file.suffix) or (
        changed_batch if file.name.endswith(("batch", "1", "2", "3", "4", "5")) else None
    )
    if kind < 0.65 and inside:
        inside(file, random)
        return inside.__name__
    file.write_bytes(changed_bytes(content, random))
    return "bytes"


def replaced(file, random):
    """Nothing, a folder, a pipe or a link in place of the file."""
    file.unlink()
    how = random.choice(["gone", "folder", "pipe", "zero", "dangling", "itself"])
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how != "gone":
        file.symlink_to({"zero": "/dev/zero", "dangling": "nowhere", "itself": file.name}[how])
    return how


def changed_bytes(content, random):
    damaged, place = bytearray(content), random.randrange(len(content) + 1)
    match random.randrange(6):
        case 0:
            del damaged[place:]
        case 1:
            damaged += random.randbytes(random.choice([1, 100]))
        case 2:
            damaged[place : place + 16] = bytes(16)
        case 3:
            damaged[place : place + 40] = damaged[place : place + 40] * 3
        case _:
            near_an_end = random.choice([0, max(0, len(content) - 200)])  # where headers and tables of contents are
            for _ in range(random.choice([1, 1, 8])):
                at = (
                    near_an_end + random.randrange(200) if random.random() < 0.5 else random.randrange(len(content) + 1)
                )
                if at < len(damaged):
                    damaged[at] ^= 1 << random.randrange(8)
    return damaged


# ---- one value in a file that stays whole


def places(value, prefix=()):
    """The path to every value in JSON."""
    yield prefix
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*prefix, key))


def changed_json(text, random):
    """A JSON text of the same kind with one value replaced, removed, added or repeated."""
    value = json.loads(text)
    *path, last = random.choice([place for place in places(value) if place] or [(None,)])
    if last is None:
        return json.dumps(random.choice(STRANGE))
    inside = value
    for key in path:
        inside = inside[key]
    match random.choice(["replace", "replace", "replace", "remove", "add", "repeat", "infinite"]):
        case "replace":
            inside[last] = random.choice(STRANGE)
        case "remove":
            del inside[last]
        case "add" if isinstance(inside, dict):
            inside["another"] = random.choice(STRANGE)
        case "repeat" if isinstance(last, str):
            return text.replace(f'"{last}":', f'"{last}": 7, "{last}":', 1)
        case _:
            inside[last] = float("nan") if random.random() < 0.5 else float("inf")
    return json.dumps(value)


def changed_lines(file, random):
    """One JSON value in a file of one, or of one per line."""
    text = file.read_text()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    place = random.randrange(len(lines))
    lines[place] = changed_json(lines[place], random)
    file.write_text("\n".join(lines) + "\n", errors="surrogatepass")


def changed_tensors(file, random):
    """One tensor of a safetensors file, or its header."""
    tensors = load_file(file)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size]).get("__metadata__", {})
    name = random.choice(sorted(tensors))
    value = tensors[name]
    match random.choice(["dtype", "shape", "missing", "extra", "nan", "bit", "header", "header", "rename"]):
        case "dtype":
            tensors[name] = value.to(
                random.choice([torch.float16, torch.int64, torch.bool, torch.float64, torch.uint8])
            )
        case "shape":
            tensors[name] = random.choice([value[None], value.flatten()[:1], value.new_zeros(0)]).contiguous()
        case "missing":
            del tensors[name]
        case "extra":
            tensors["another.weight"] = torch.ones(2)
        case "rename":
            tensors[random.choice([name.upper(), "module." + name, "", name + "\n"])] = tensors.pop(name)
        case "nan" if value.is_floating_point():
            tensors[name] = torch.full_like(value, random.choice([float("nan"), float("inf"), 1e38]))
        case "bit":
            flat = value.clone().flatten().view(torch.uint8)
            flat[random.randrange(len(flat))] ^= 1 << random.randrange(8)
            tensors[name] = flat.view(value.dtype).view(value.shape)
        case _ if header:
            key = random.choice(sorted(header))
            with contextlib.suppress(ValueError):
                header[key] = changed_json(header[key], random)
    save_file(tensors, file, header or None)


def changed_table(file, random):
    """One cell, row or column of a CSV file."""
    rows = list(csv.reader(io.StringIO(file.read_text(), newline="")))
    row, column = random.randrange(1, len(rows)), random.randrange(len(rows[0]))
    match random.choice(["cell", "cell", "cell", "column", "no column", "no row", "twice", "cut", "name", "no rows"]):
        case "cell":
            filled = [place for place, cell in enumerate(rows[row]) if cell]  # an empty one is often not read
            rows[row][random.choice(filled)] = random.choice(CELLS)
        case "column":
            cell = random.choice(CELLS)
            for changed in rows[1:]:
                changed[column] = cell
        case "no column":
            rows = [cells[:column] + cells[column + 1 :] for cells in rows]
        case "no row":
            del rows[row]
        case "twice":
            rows.insert(row, list(rows[row]))
        case "cut":
            rows[row] = rows[row][:column]
        case "name":
            rows[0][column] = random.choice([*CELLS, rows[0][column - 1]])
        case "no rows":
            del rows[1:]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    file.write_text(text.getvalue(), newline="")


def changed_archive(file, random):
    """One member of a zip file."""
    with zipfile.ZipFile(file) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    place = random.randrange(len(members))
    info, content = members[place]
    match random.choice(["name", "name", "twice", "content", "content", "gone", "link", "method", "none", "folder"]):
        case "name":
            info.filename = random.choice([*NAMES, members[place - 1][0].filename])
        case "twice":
            members.append((info, members[place - 1][1]))
        case "content":
            content = random.choice([*JUNK, members[place - 1][1], changed_bytes(content, random)])
            members[place] = info, bytes(content)
        case "gone":
            del members[place]
        case "link":
            info.external_attr = 0o120777 << 16
        case "method":
            info.compress_type = random.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
        case "none":
            members = []
        case "folder":
            info.filename += "/"
    with zipfile.ZipFile(file, "w") as archive:
        for info, content in members:
            archive.writestr(info, content)


def changed_arrays(file, random):
    """One array of an .npz file."""
    if random.random() < 0.25:
        return changed_archive(file, random)
    with np.load(file) as opened:
        arrays = dict(opened)
    name = random.choice(sorted(arrays))
    value = arrays[name]
    match random.choice(["dtype", "dtype", "shape", "shape", "missing", "extra", "rename", "value", "order"]):
        case "dtype":
            kinds = ("f2", "f8", ">f4", "i8", ">i2", "u8", "?", "c8", "U3", "S2", "O", "M8[s]", "f4,i4", "V2", "g")
            with contextlib.suppress(TypeError, ValueError):
                arrays[name] = value.astype(random.choice(kinds))
        case "shape":
            forms = (value[None], value[:0], value[:1], value.reshape(-1), value.T, value.sum(), value[..., :0])
            arrays[name] = random.choice(forms)
        case "missing":
            del arrays[name]
        case "extra":
            arrays[random.choice(["another", "x", "y", "arr_0", "context", "moments"])] = np.ones((2, 2), "f4")
        case "rename":
            arrays[random.choice(["x", "y", "../a", "", "images.npy"])] = arrays.pop(name)
        case "value":
            changed = value.astype(random.choice(["f4", "f8", "i8", value.dtype]))
            strange = random.choice([-1, 255, 70_000, 2**40, np.nan, np.inf, 1e30])
            with contextlib.suppress(ValueError, OverflowError):
                changed.flat[random.randrange(changed.size)] = strange
            arrays[name] = changed
        case "order":
            arrays[name] = np.asfortranarray(value)
    np.savez(file, **{name: value for name, value in arrays.items() if name != "file"})


def changed_picture(file, random):
    """The mode, size, format or frames of a picture; its name stays."""
    image, form, more = Image.open(file).convert("RGB"), random.choice(FORMATS), {}
    match random.choice(["mode", "mode", "size", "format", "frames", "turned", "vast"]):
        case "mode":
            image = image.convert(random.choice(["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"]))
        case "size":
            image = image.resize(random.choice([(1, 1), (1, 300), (9, 8), (3000, 2)]))
        case "frames":
            form, more = "gif", {"save_all": True, "append_images": [image.resize((4, 4)), image]}
        case "turned":
            exif = Image.Exif()
            exif[0x0112] = random.choice([0, 3, 6, 8, 9, 65535])
            form, more = random.choice(["jpeg", "png", "webp"]), {"exif": exif}
        case "vast":
            form, image = "png", Image.new("1", (random.choice([9_000, 70_000]), 9_000))
    content = io.BytesIO()
    try:
        image.save(content, form, **more)
    except (OSError, ValueError, KeyError):  # a format without this mode
        image.convert("RGB").save(content, "png")
    file.write_bytes(content.getvalue())


RAN = "a-pickle-ran"  # the file that a pickle leaves in the current folder if its code runs


class _Runs:
    def __reduce__(self):
        return os.system, (f"touch {RAN}",)


def _pickled(random, images):
    values = [
        images,
        images.tolist(),
        images.T,
        images.astype("f4"),
        images[:0],
        None,
        "x" * 99,
        _Runs(),
        {"a": images},
    ]
    values += [torch.zeros(1).expand(2**40), torch.ones(3).to_sparse(), torch.ones(2, dtype=torch.complex64), [[]] * 9]
    return _Runs() if random.random() < 0.3 else random.choice(values)


def changed_batch(file, random):
    """A pickled batch of CIFAR-10 whose dict holds other things. A binary batch has none: its bytes change."""
    if file.suffix == ".bin" or file.read_bytes()[:1] != b"\x80":
        return file.write_bytes(changed_bytes(file.read_bytes(), random))
    batch = pickle.loads(file.read_bytes(), encoding="bytes")  # written by this test
    key = random.choice(sorted(batch))
    match random.choice(["value", "value", "missing", "extra", "labels"]):
        case "value":
            batch[key] = _pickled(random, batch[b"data"])
        case "missing":
            del batch[key]
        case "extra":
            batch[b"another"] = _pickled(random, batch[b"data"])
        case "labels":
            batch[b"labels"] = [random.choice([-1, 10, 2**70, 1.5, None, "1"]), *batch[b"labels"][1:]]
    file.write_bytes(pickle.dumps(batch, protocol=random.randrange(6)))


def changed_checkpoint(file, random):
    """A .pth file in which one thing is another."""
    held = torch.load(file, weights_only=True)
    inside = random.choice([held, held["ema"], held["model"]])
    key = random.choice(sorted(inside))
    match random.choice(["value", "value", "missing", "extra", "nested"]):
        case "value":
            inside[key] = _pickled(random, np.ones((2, 2), "f4"))
        case "missing":
            del inside[key]
        case "extra":
            inside[random.choice(["model_ema", "another", 7, "", None])] = _pickled(random, np.ones((2, 2), "f4"))
        case "nested":
            for _ in range(200):
                held = {random.choice(["ema", "model", "state_dict"]): held}
    torch.save(held, file)


INSIDE = {
    ".json": changed_lines,
    ".jsonl": changed_lines,
    ".safetensors": changed_tensors,
    ".csv": changed_table,
    ".zip": changed_archive,
    ".npz": changed_arrays,
    ".pth": changed_checkpoint,
    ".bin": changed_batch,
    **{f".{form}": changed_picture for form in FORMATS},
}
