"""What the other files of this kind hold, whole, foreign and hostile, is tested in test_checkpoint.py."""

import dataclasses
import functools
import json
import zipfile

import pytest
import torch
from torch import nn

from sparsedm import model_files
from sparsedm.errors import InputError
from sparsedm.model_files import fill, load_model, read_tensors, save_model, write_shards, write_tensors
from sparsedm.models import build_model
from sparsedm.sparsity import bake, compress, hold_masks, masked_layers, set_masking, sparsify

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


@pytest.mark.parametrize("form", ["masked", "compressed"])
def test_a_model_in_shards_is_built_again(form, tmp_path):
    model = sparsify(build_model("uvit-tiny"), "2:4")
    model = compress(model) if form == "compressed" else model
    index = save_model(tmp_path / "m.safetensors", model, shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = load_model(index, build_model)
    assert loaded.kind == form
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), model.state_dict().values()))


def test_a_writing_cut_short_leaves_no_index(tmp_path, monkeypatch):
    index = write_shards(tmp_path / "m.safetensors", TENSORS, {}, 50)
    calls = []

    def full_disk(file, *arguments):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write_tensors(file, *arguments)

    monkeypatch.setattr(model_files, "write_tensors", full_disk)
    with pytest.raises((OSError, InputError), match="No space left"):
        write_shards(tmp_path / "m.safetensors", {name: value + 1 for name, value in TENSORS.items()}, {}, 50)
    assert not index.exists()


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


@pytest.mark.parametrize(
    "content", [b"", b"hi\n", b"PK\x03\x04 no archive", bytes(range(256))], ids=["empty", "text", "zip", "bytes"]
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_whatever_is_in_a_file_it_is_refused_in_one_sentence(content, suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"a{suffix} is (missing, truncated or of another format|refused)"):
        read_tensors(file)


# ---- what could not be loaded is not written -------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = {"width": 8}
        self.block, self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.block(x))


def compiled_block(model):
    model.block = torch.compile(model.block, backend="eager")
    return model


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "block": compiled_block,
    "average": torch.optim.swa_utils.AveragedModel,
    "data parallel": nn.DataParallel,
    "compile twice": lambda m: torch.compile(torch.compile(m, backend="eager"), backend="eager"),  # a function
    "twice": lambda m: nn.DataParallel(torch.compile(compiled_block(m), backend="eager")),
}


@pytest.mark.parametrize("form", ["dense", "masked", "compressed"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_model_inside(tmp_path, wrap, form):
    model, x = Net(), torch.randn(3, 8)
    model = model if form == "dense" else sparsify(model, "2:4")
    model = (compress(model) if form == "compressed" else model).eval()
    expected = model(x)
    loaded = load_model(save_model(tmp_path / "m.safetensors", wrap(model)), Net)
    assert loaded.kind == form
    assert torch.equal(loaded.model(x), expected)


def test_a_model_compiled_twice_is_the_model_inside_everywhere():
    model, x = Net(), torch.randn(3, 8)
    twice = torch.compile(torch.compile(model, backend="eager"), backend="eager")
    assert sparsify(twice, "2:4") is model
    with hold_masks(twice):
        assert torch.equal(compress(twice)(x), bake(twice)(x))
    with pytest.raises(InputError, match="a function is no model"):
        compress(lambda x: x)


def not_json(model):
    model.config = {"kind": {1, 2}}
    return model


def with_config(config):
    def change(model):
        model.config = config
        return model

    return change


def with_buffer(value):
    def change(model):
        model.register_buffer("extra", value)
        return model

    return change


class Talks(Net):
    def get_extra_state(self):
        return {"said": 1}


@dataclasses.dataclass
class Config:
    inner: object = None


NESTED = functools.reduce(lambda inner, _: [inner], range(5000), [])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x.pt", lambda m: m, r"x.pt: a model file must be named .safetensors"),
        ("x", lambda m: m, r"x: a model file must be named .safetensors"),
        ("x.safetensors", not_json, r"Net.config cannot be saved: it is not JSON: .*set"),
        (
            "x.safetensors",
            with_config({"a": float("nan")}),
            r"Net.config cannot be saved: it is not JSON",
        ),
        ("x.safetensors", with_config({"a": NESTED}), r"Net.config cannot be saved"),
        ("x.safetensors", with_config(Config(NESTED)), r"Net.config cannot be saved"),
        ("x.safetensors", with_config(Config), r"Net.config cannot be saved"),
        ("x.safetensors", lambda m: m.to("meta"), r"cannot be kept in a model file: it is on the meta device"),
        ("x.safetensors", lambda m: Talks(), r"_extra_state cannot be kept in a model file: it is a dict, no tensor"),
        ("x.safetensors", with_buffer(torch.eye(2).to_sparse()), r"extra cannot be kept in a model file: it is sparse"),
        ("x.safetensors", with_buffer(torch.ones(2, dtype=torch.complex128)), r"have no dtype torch.complex128"),
    ],
)
def test_what_load_model_would_refuse_is_refused_before_it_is_written(tmp_path, name, change, message):
    for options in ({}, {"shard_bytes": 100}):
        with pytest.raises(InputError, match=message):
            save_model(tmp_path / name, change(Net()), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, -1, float("nan"), "1"])
def test_shards_of_no_size_are_refused(tmp_path, size):
    with pytest.raises(InputError, match="must be a whole number, at least 1"):
        save_model(tmp_path / "x.safetensors", Net(), shard_bytes=size)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_positions_of_another_dtype_are_refused(tmp_path, dtype):
    file = save_model(tmp_path / "x.safetensors", compress(sparsify(Net(), "2:4")))
    tensors, header = read_tensors(file)
    write_tensors(file, tensors | {"head.metadata": tensors["head.metadata"].to(dtype)}, header)
    with pytest.raises(InputError, match=rf"1 of another kind \(head.metadata {str(dtype)[6:]}\)"):
        load_model(file, Net)


def test_views_of_one_memory_are_written_apart(tmp_path):
    model = Net()
    model.register_buffer("part", model.head.weight.detach()[1:])
    tensors = read_tensors(save_model(tmp_path / "x.safetensors", model))[0]
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


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


def test_gradient_rules_are_kept_in_the_file(tmp_path):
    model = sparsify(Net(), "2:4")
    file = save_model(tmp_path / "m.safetensors", model)
    assert "rules" not in json.loads(read_tensors(file)[1]["sparsedm"])
    set_masking(model, decay=2e-4, dropped=0.5)
    file = save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(file, Net).model
    assert [layer.rule for _, layer in masked_layers(loaded)] == [(2e-4, 1.0, 0.5)] * 3
    x = torch.randn(3, 8)
    for network in (model, loaded):
        network.zero_grad()
        network(x).sum().backward()
    assert torch.equal(model.head.weight.grad, loaded.head.weight.grad)
    tensors, header = read_tensors(file)
    wrong = "[1, 2]", "[1, 2, 3, 4]", "[-1, 1, 1]", "[true, 1, 1]", '"a"', "3"
    for rules in ("[1]", "3", '{"zz": [1, 1, 1]}', *(f'{{"head": {rule}}}' for rule in wrong)):
        header["sparsedm"] = header["sparsedm"].split('"rules": ')[0] + f'"rules": {rules}}}'
        write_tensors(file, tensors, header)
        with pytest.raises(InputError, match=r"damaged .*gradient rule"):
            load_model(file, Net)


def test_a_model_of_masked_and_compressed_layers_is_refused_before_it_is_written(tmp_path):
    model = sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "2:4")
    model[0] = compress(nn.Sequential(model[0]))[0]
    with pytest.raises(InputError, match="1 is masked and 0 compressed: a file holds one kind"):
        save_model(tmp_path / "m.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_torch_negates_when_it_reads_it_is_written_and_masked_with_its_sign(tmp_path):
    model = sparsify(nn.Sequential(nn.Linear(64, 64)), "2:4").eval()
    weight = torch.randn(64, 64)
    model[0].weight = nn.Parameter(torch._neg_view(weight))
    kept = model[0].effective_weight() != 0
    assert torch.equal(model[0].effective_weight()[kept], -weight[kept])
    tensors, _ = read_tensors(save_model(tmp_path / "m.safetensors", model))
    assert torch.equal(tensors["0.weight"], -weight)
