"""Files of tensors, whole, in shards, foreign and hostile."""

import json
import os
import pickle
import shutil
import warnings
import zipfile

import pytest
import torch
from torch import nn

from sparsedm import tensor_files
from sparsedm.errors import InputError, check_memory
from sparsedm.tensor_files import fill, read_tensors, remove_shards, write_shards, write_tensors

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 3).bfloat16(), "c": torch.zeros(100), "d": torch.ones(1)}


def test_shards_are_no_larger_than_asked_and_come_back_in_order(tmp_path):
    index = write_shards(tmp_path / "m.safetensors", TENSORS, {"sparsedm": "{}"}, 50)
    assert index == tmp_path / "m.safetensors.index.json"
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert json.loads(index.read_text())["metadata"]["total_size"] == 24 + 12 + 400 + 4
    tensors, header = read_tensors(index)
    assert list(tensors) == list(TENSORS)
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert header == {"sparsedm": "{}"}


@pytest.mark.parametrize("writer", ["json_text", "write_tensors"])
def test_a_writing_cut_short_leaves_what_was_there(writer, tmp_path, monkeypatch):
    write_shards(tmp_path / "m.safetensors", TENSORS, {"sparsedm": "{}"}, 50)
    before, write, calls = (
        {path.name: path.read_bytes() for path in tmp_path.iterdir()},
        getattr(tensor_files, writer),
        [],
    )

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if writer == "write_tensors" else 1):
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(tensor_files, writer, full_disk)
    with pytest.raises((OSError, InputError), match="No space left"):
        write_shards(tmp_path / "m.safetensors", {name: value + 1 for name, value in TENSORS.items()}, {}, 200)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_an_earlier_writing_do_not_stay(tmp_path):
    foreign = tmp_path / "m-00001-of-00009.safetensors"
    foreign.touch()
    for size, files in ((50, 3), (10**6, 1)):
        write_shards(tmp_path / "m.safetensors", TENSORS, {"sparsedm": "{}"}, size)
        assert len(list(tmp_path.glob("m-*-of-*.safetensors"))) == files + foreign.exists()
    index = tmp_path / "m.safetensors.index.json"
    shutil.copy(index, tmp_path / "copy.safetensors.index.json")
    remove_shards(tmp_path / "copy.safetensors")
    assert set(read_tensors(index)[0]) == set(TENSORS), "the shards that a copied index lists are of another model"
    index.write_text(index.read_text().replace("m-00001-of-00001.safetensors", "."))
    remove_shards(tmp_path / "m.safetensors")
    write_shards(tmp_path / "n.safetensors", TENSORS, {}, 50)
    remove_shards(tmp_path / "n.safetensors")
    assert len(list(tmp_path.glob("n-*-of-*.safetensors"))) == 3, "perhaps somebody else's"
    assert foreign.exists()


def test_shards_are_written_through_links(tmp_path):
    file, ours = tmp_path / "m.safetensors", {"sparsedm": "{}"}
    index = write_shards(file, TENSORS, ours, 50)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(tmp_path.glob("m*"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    write_shards(
        tmp_path / "m.safetensors", {name: value + 1 for name, value in TENSORS.items()}, {"sparsedm": "{}"}, 50
    )
    assert all(torch.equal(value, TENSORS[name] + 1) for name, value in read_tensors(index)[0].items())
    assert all(path.is_symlink() for path in tmp_path.glob("m*"))


def test_an_index_that_cannot_be_replaced_is_one_sentence(tmp_path):
    (tmp_path / "m.safetensors.index.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*m\.safetensors\.index\.json: "):
        write_shards(tmp_path / "m.safetensors", TENSORS, {}, 50)


def test_tied_weights_are_written_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    write_tensors(tmp_path / "a.safetensors", model.state_dict(), {})
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["0.weight"], model[0].weight)
    assert torch.equal(tensors["1.weight"], model[0].weight)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: index.write_text("{"), "is damaged: it holds no readable JSON"),
        (lambda index: index.write_text('{"weight_map": ["a"]}'), "is damaged"),
        (
            lambda index: index.write_text('{"weight_map": {"a": "../else.safetensors"}}'),
            r"else.safetensors is missing",
        ),
        (
            lambda index: index.with_name("m-00002-of-00003.safetensors").unlink(),
            "00003.safetensors is missing",
        ),
        (lambda index: index.write_text(index.read_text().replace('"d"', '"e"')), r"lack 1 tensors \(e\)"),
    ],
    ids=["json", "list", "elsewhere", "shard", "tensor"],
)
def test_damaged_shards_are_refused(damage, message, tmp_path):
    index = write_shards(tmp_path / "m.safetensors", TENSORS, {}, 50)
    damage(index)
    with pytest.raises(InputError, match=message):
        read_tensors(index)


@pytest.mark.parametrize("content", [{1: torch.ones(1)}, {"a": 1}, [torch.ones(1)]], ids=["number", "value", "list"])
def test_only_names_of_tensors_are_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth is not a state dict: it must map names to tensors"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize(("count", "end"), [(6, r"5\)"), (7, r"5, \.\.\.\)")])
def test_at_most_six_of_what_does_not_fit_are_named(count, end):
    with pytest.raises(InputError, match=rf"{count} missing \(0, 1, 2, 3, 4, {end}"):
        fill(nn.ParameterDict({str(i): torch.ones(1) for i in range(count)}), {}, "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hi\n", b"PK\x03\x04 no archive", bytes(range(256)), bytes(1000)],
    ids=["empty", "text", "zip", "bytes", "zeros"],
)
def test_whatever_is_in_a_file_it_is_refused_in_one_sentence(content, suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"a{suffix} is (missing, truncated or of another format|refused)"):
            read_tensors(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(2).to_sparse(), "holds a, which is sparse or quantised"),
        (torch.ones(2, device="meta"), "holds a, which is on the meta device|might run code"),
        (torch.ones(1).expand(1 << 50), "not enough memory: holding"),
    ],
    ids=["sparse", "meta", "expanded"],
)
def test_tensors_that_hold_no_plain_values_are_refused(tmp_path, value, message):
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path / "a.pt")


def test_a_file_that_unpacks_to_more_than_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    place = content.rindex(b"PK\x01\x02") + 24  # its size, unpacked
    content[place : place + 4] = b"\xff\xff\xff\xfe"
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"a.pt is missing, truncated or of another format|not enough memory"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("needed", "there", "words"),
    [
        (2**20, 2**19, "takes 1 MiB or more, and there are 0.5 MiB"),
        (1.25 * 2**30, 2**30, "takes 1.25 GiB or more, and there are 1 GiB"),
        (2**41, 2**36, "takes 2,048 GiB or more, and there are 64 GiB"),
    ],
)
def test_memory_is_counted_in_a_unit_that_shows_what_lacks(needed, there, words):
    with pytest.raises(InputError, match=f"^not enough memory: it {words}$"):
        check_memory(needed, "it", there)


class Payload:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_a_file_that_holds_code_is_refused_and_not_run(tmp_path, form):
    payload = Payload()
    payload.path = str(tmp_path / "executed")
    file = tmp_path / "evil.pth"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"a": payload}))
    else:
        torch.save({"a": payload}, file, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"evil.pth is refused: it is damaged, or holds more than tensors"):
            read_tensors(file)
    assert not (tmp_path / "executed").exists()
