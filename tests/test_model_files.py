"""Model files, whole, foreign and damaged; what could not be loaded is not written."""

import dataclasses
import functools
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsedm.compressed import CompressedLinear
from sparsedm.compression import bake, compress
from sparsedm.errors import InputError
from sparsedm.model_files import describe, load_model, save_model
from sparsedm.models import build_model
from sparsedm.sparsity import hold_masks, masked_layers, masks, set_masking, sparsify
from sparsedm.tensor_files import read_tensors, write_tensors
from tests.tiny import TinyConfig, same_state, tiny, tiny_from


def network(kind):
    model = tiny(1)
    if kind != "dense":
        sparsify(model, "2:4")
    if kind == "mixed":
        model.second.set_pattern("1:8")
    if kind == "sparse with plain layers":  # swapped for ours by sparsify
        model.last = nn.Linear(64, 32)
        sparsify(model, "7:8", "all")
    if kind == "frozen":
        set_masking(model, frozen=True)
        with torch.no_grad():
            model.first.weight.copy_(model.first.weight.flip(1))
    if kind == "compressed":
        return compress(model)
    return model.eval()


def plain_from(config):
    model = tiny_from(config)
    model.last = nn.Linear(64, 32)
    return model


@pytest.mark.parametrize("kind", ["dense", "masked", "mixed", "sparse with plain layers", "frozen", "compressed"])
def test_a_model_file_is_enough_to_build_the_model(tmp_path, kind):
    model = network(kind)
    save_model(tmp_path / "model.safetensors", model)
    build = plain_from if "plain" in kind else tiny_from
    loaded = load_model(tmp_path / "model.safetensors", build)
    assert loaded.kind == (kind if kind in ("dense", "compressed") else "masked")
    assert loaded.file == tmp_path / "model.safetensors"
    assert loaded.state == {}
    assert not loaded.model.training
    assert same_state(loaded.model.state_dict(), model.state_dict())
    assert same_state(masks(loaded.model), masks(model))
    assert describe(loaded.model) == describe(model)
    assert isinstance(loaded.model.first, CompressedLinear) == (kind == "compressed")
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    assert torch.equal(loaded.model(x, t, y), model(x, t, y))


def test_strides_do_not_matter(tmp_path):
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors", lambda config: nn.Conv2d(4, 4, 3), config="any")
    assert torch.equal(loaded.model.weight, model.weight)


def test_a_model_without_a_config_is_named_as_the_cause(tmp_path):
    save_model(tmp_path / "a.safetensors", nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"because the saved model had no \.config: name one .* config="):
        load_model(tmp_path / "a.safetensors", lambda config: nn.Linear(3, 3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_foreign_files(tmp_path, suffix):
    file, state = tmp_path / f"foreign{suffix}", tiny(4).state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    with pytest.raises(InputError, match="does not say what model it holds: name one"):
        load_model(file, tiny_from)
    config = {"num_classes": 3}
    loaded = load_model(file, tiny_from, config=config)
    assert loaded.kind == "dense"
    assert same_state(loaded.model.state_dict(), state)

    def convert(tensors):
        return {name: -value for name, value in tensors.items()}

    converted = load_model(file, tiny_from, config=config, convert=convert)
    assert torch.equal(converted.model.last.weight, -state["last.weight"])


def test_foreign_file_with_the_usual_wrapping(tmp_path):
    torch.save({"state_dict": tiny(4).state_dict(), "epoch": 3}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", tiny_from, config={})
    assert same_state(loaded.model.state_dict(), tiny(4).state_dict())
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"b.pth is not a state dict: it must map names to tensors"):
        load_model(tmp_path / "b.pth", tiny_from, config={})


def test_unfit_keys_and_shapes_are_listed(tmp_path):
    state, expected = tiny(width=32).state_dict(), tiny().state_dict()
    del state["label.weight"]
    others = sum(value.shape != expected[name].shape for name, value in state.items())
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "a.safetensors", tiny_from, config={})
    message = str(caught.value)
    assert (
        f"does not fit the model: 1 missing (label.weight); 1 unexpected (extra); {others} of another shape ("
        in message
    )
    assert "first.weight (32, 32) for (64, 32)" in message
    assert message.endswith(", ...)")


@pytest.mark.parametrize(
    "description", ["[]", "{", "{}", '{"patterns": {}}', '{"patterns": {"a": "2:4"}, "config": null}']
)
def test_a_damaged_description_is_refused(tmp_path, description):
    save_file(tiny().state_dict(), tmp_path / "a.safetensors", metadata={"sparsedm": description})
    with pytest.raises(InputError, match=r"a.safetensors (is damaged|does not say what model it holds)"):
        load_model(tmp_path / "a.safetensors", tiny_from)


def test_a_pattern_that_does_not_fit_is_refused(tmp_path):
    model = network("masked")
    save_model(tmp_path / "a.safetensors", model)
    text = (tmp_path / "a.safetensors").read_bytes()
    size = struct.unpack("<Q", text[:8])[0]
    header = text[8 : 8 + size].replace(b"2:4", b"5:4")
    (tmp_path / "b.safetensors").write_bytes(text[:8] + header + text[8 + size :])
    with pytest.raises(InputError, match="pattern 5:4"):
        load_model(tmp_path / "b.safetensors", tiny_from)
    renamed = header.replace(b"5:4", b"2:4").replace(b'second\\": \\"2', b'nobody\\": \\"2')
    (tmp_path / "c.safetensors").write_bytes(text[:8] + renamed + text[8 + size :])
    with pytest.raises(InputError, match=r"c.safetensors does not fit the model: its 2:4 layer nobody is missing"):
        load_model(tmp_path / "c.safetensors", tiny_from)


def test_header_of_a_model_file_is_plain_json(tmp_path):
    save_model(tmp_path / "a.safetensors", network("masked"))
    assert load_file(tmp_path / "a.safetensors").keys() == tiny().state_dict().keys()
    described = describe(network("masked"))
    assert described == {
        "kind": "masked",
        "config": {**TinyConfig().__dict__},
        "patterns": {"first": "2:4", "second": "2:4"},
    }


@pytest.mark.parametrize("form", ["masked", "compressed"])
def test_a_model_in_shards_is_built_again(form, tmp_path):
    model = sparsify(build_model("uvit-tiny"), "2:4")
    model = compress(model) if form == "compressed" else model
    index = save_model(tmp_path / "m.safetensors", model, shard_bytes=200_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = load_model(index, build_model)
    assert loaded.kind == form
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), model.state_dict().values()))


def test_one_name_holds_one_model_whole_or_in_shards(tmp_path):
    file, models = tmp_path / "m.safetensors", [build_model("uvit-tiny", dim=32, depth=2, heads=2) for _ in range(3)]
    for model, size in zip(models, (None, 20_000, None)):
        path = save_model(file, model, shard_bytes=size)
        assert path.exists()
        assert all(
            torch.equal(a, b) for a, b in zip(load_model(path, build_model).model.parameters(), model.parameters())
        )
        assert file.exists() == (size is None)
    assert list(tmp_path.iterdir()) == [file]


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
DEEP = functools.reduce(lambda inner, _: [inner], range(31), [])  # one level more in the file


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
        ("x.safetensors", with_config({"seed": 2**80}), r"Net.config cannot be saved: .*1208925819614629174706176"),
        ("x.safetensors", with_config({1: 0, "1": 0}), r"Net.config cannot be saved: .*: one name twice in an object"),
        ("x.safetensors", with_config(DEEP), r"Net.config cannot be saved: .*: it is nested more than 32 deep"),
        ("x.safetensors", with_config(Config(NESTED)), r"Net.config cannot be saved"),
        ("x.safetensors", with_config(Config), r"Net.config cannot be saved"),
        ("x.safetensors", lambda m: m.to("meta"), r"cannot be kept in a model file: it is on the meta device"),
        ("x.safetensors", lambda m: Talks(), r"_extra_state cannot be kept in a model file: it is a dict, no tensor"),
        ("x.safetensors", with_buffer(torch.eye(2).to_sparse()), r"extra cannot be kept in a model file: it is sparse"),
        (
            "x.safetensors",
            with_buffer(torch.ones(2, dtype=torch.complex128)),
            r"extra cannot be kept in a model file: it is of torch.complex128, and safetensors have no such dtype",
        ),
        ("x.safetensors", with_config({1: 0}), r"Net.config cannot be saved: .*: the name 1 is no text"),
        (
            "x.safetensors",
            with_config({"a": [{"b": ({True: 2},)}]}),
            r"Net.config cannot be saved: .*: the name True is",
        ),
    ],
)
def test_what_load_model_would_refuse_is_refused_before_it_is_written(tmp_path, name, change, message):
    for options in ({}, {"shard_bytes": 100}):
        with pytest.raises(InputError, match=message):
            save_model(tmp_path / name, change(Net()), **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_refused_leaves_the_older_one(tmp_path):
    index = save_model(tmp_path / "x.safetensors", Net(), shard_bytes=100)
    other = with_buffer(torch.ones(2, dtype=torch.complex128))(Net())
    with pytest.raises(InputError, match="safetensors have no such dtype"):
        save_model(tmp_path / "x.safetensors", other, shard_bytes=100)
    assert load_model(index, Net).kind == "dense"


def test_the_home_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert save_model("~/models/x.safetensors", Net()) == tmp_path / "models" / "x.safetensors"
    assert load_model("~/models/x.safetensors", Net).kind == "dense"
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


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


@pytest.mark.parametrize("value", [True, Net.forward, torch.ones(2)], ids=["bool", "method", "tensor"])
def test_an_attribute_of_somebody_elses_network_is_no_note_of_ours(tmp_path, value):
    model = Net()
    model.unsaved = value
    assert load_model(save_model(tmp_path / "m.safetensors", model), Net).kind == "dense"


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


MISFITS = {
    "another width": (lambda: tiny_like(30), r"first is 2:4 in the file, but the input axis 30 is not a multiple of 4"),
    "in a dictionary": (lambda: nn.ModuleDict({"q": tiny()}), "its 2:4 layer first is missing there"),
    "of another class": (lambda: nn.ModuleDict({"first": nn.GELU()}), "its 2:4 layer first is a GELU there"),
    "compiled": (lambda: torch.compile(tiny(), backend="eager"), "build gave a OptimizedModule: load into the network"),
    "replicated": (lambda: nn.DataParallel(tiny()), "build gave a DataParallel: load into the network itself"),
}


def tiny_like(width):
    model = tiny()
    model.first = nn.Linear(width, model.first.out_features)
    return model


@pytest.mark.parametrize("kind", ["masked", "compressed"])
@pytest.mark.parametrize("name", MISFITS)
def test_a_network_that_the_file_does_not_fit_is_refused_by_name(name, kind, tmp_path):
    build, message = MISFITS[name]
    save_model(tmp_path / "a.safetensors", network(kind))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "a.safetensors", lambda config: build())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_built_in_fewer_bits_has_the_masks_of_the_file(dtype, tmp_path):
    model = sparsify(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)), "2:4")
    save_model(tmp_path / "a.safetensors", model)
    load = functools.partial(load_model, tmp_path / "a.safetensors", config=1)
    loaded = load(lambda config: nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).to(dtype)).model
    assert same_state(masks(loaded), masks(model))
    with pytest.warns(UserWarning, match="a cast in eval mode froze the masks"):
        loaded.train()
    set_masking(loaded)
    assert loaded[0].mask is None, "as after a cast, the mask moves again"
    exact = load(lambda config: nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)).double()).model
    assert exact[0].mask is None, "nothing was rounded"


@pytest.mark.parametrize("kind", ["dense", "masked"])
@pytest.mark.parametrize("thing", [None, nn.Linear])
def test_what_is_built_must_be_a_model(thing, kind, tmp_path):
    save_model(tmp_path / "a.safetensors", network(kind))
    with pytest.raises(InputError, match=f"build gave a {type(thing).__name__}, which is no model"):
        load_model(tmp_path / "a.safetensors", lambda config: thing)
