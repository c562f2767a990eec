import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from sparsedm import cli
from sparsedm.errors import InputError
from sparsedm.model_files import load_model, save_model, write_shards
from sparsedm.models import MODELS, build_model, model_config
from sparsedm.models.convert import read_foreign, recognise
from sparsedm.models.diffusers import config_to_diffusers, to_diffusers
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 64, "depth": 2, "heads": 1, "num_classes": 10}
DIT = {"kind": "dit", "image_size": 8, "channels": 3, "dim": 64, "depth": 2, "heads": 1, "num_classes": 10}
DDPM = {"kind": "ddpm", "image_size": 8, "width": 32, "multipliers": (1, 2), "attention": (4,), "blocks": 1}


def shapes(model):
    return build_model(model, device="meta").state_dict()


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.kind in ("uvit", "dit")])
def test_every_published_network_is_recognised(name):
    config, about, notes = recognise(shapes(name), "x.pt", {})
    assert (config, about, notes) == (MODELS[name], f"the weights of {name}", [])


@pytest.mark.parametrize(
    "config",
    [
        UVIT,
        UVIT | {"num_classes": 0, "channels": 4, "final_conv": False, "patch_size": 4, "mlp_ratio": 2},
        UVIT | {"null_label": False},
        UVIT | {"num_classes": 0, "context_tokens": 77, "context_dim": 12},
        DIT,
        DIT | {"learn_sigma": False, "num_classes": 0, "patch_size": 4},
    ],
)
def test_other_networks_are_read_from_their_shapes(config):
    model = build_model(config, device="meta")
    found, about, notes = recognise(model.state_dict(), "x.pt", {})
    assert found == model.config
    assert "none of the published" in about
    assert "heads=1" in notes[0]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {}, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XL/2")},
    ],
    ids=["plain", "state_dict", "training checkpoint"],
)
@pytest.mark.parametrize("config", [UVIT, DIT], ids=["uvit", "dit"])
def test_an_official_file_becomes_a_model_file(config, wrapped, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model(config)
    torch.save(wrapped(model.state_dict()), "official.pt")
    assert cli.main(["import", "official.pt"]) == 0
    said = capsys.readouterr().out
    assert "num_classes=10" in said
    assert "heads=1" in said
    assert "written to official.safetensors" in said
    loaded = load_model("official.safetensors", build_model)
    assert loaded.model.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("inner", ["", "unet"], ids=["model folder", "pipeline folder"])
def test_a_diffusers_folder_becomes_a_model_file(inner, tmp_path, capsys):
    model, folder = build_model(DDPM), tmp_path / "ddpm" / inner
    folder.mkdir(parents=True)
    config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0"} | config_to_diffusers(model.config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(to_diffusers(model.state_dict(), model.config), folder / "diffusion_pytorch_model.safetensors")
    out = tmp_path / "out.safetensors"
    assert cli.main(["import", str(tmp_path / "ddpm"), "--out", str(out)]) == 0
    assert "a UNet2DModel of diffusers 0.30.0" in capsys.readouterr().out
    loaded = load_model(out, build_model).model
    x, t, _ = model.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(loaded(x, t), model.eval()(x, t))


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_diffusers_dit_becomes_the_official_one(kind, tmp_path):
    model, folder = build_model(DIT), tmp_path / "dit" / "transformer"
    folder.mkdir(parents=True)
    config = {"_class_name": kind, "norm_type": "ada_norm_zero"} | config_to_diffusers(model.config)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(to_diffusers(model.state_dict(), model.config), folder / "diffusion_pytorch_model.bin")
    found = read_foreign(tmp_path / "dit")
    assert found.model.config == model.config
    assert "computed as by the official code" in found.notes[0]
    assert all(torch.equal(a, b) for a, b in zip(found.model.state_dict().values(), model.state_dict().values()))


@pytest.mark.interop
def test_a_folder_that_diffusers_saved_in_shards_computes_the_same(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**config_to_diffusers(build_model(DDPM).config)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    model = read_foreign(tmp_path).model
    x, t, _ = model.example_inputs(2)
    with torch.no_grad():
        usual = theirs(x, t).sample
        assert_as_good_as_torch(model(x, t), theirs.double()(x.double(), t).sample, usual)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (UVIT, {"heads": 4}),
        (DIT | {"dim": 200}, {"heads": 5}),  # three heads of 64 numbers do not fit
        (DIT | {"num_classes": 5}, {"null_label": True}),
        (DIT | {"num_classes": 5}, {"num_classes": 5}),
        (UVIT | {"num_classes": 11, "null_label": False}, {"null_label": False}),
        (UVIT | {"num_classes": 0, "context_tokens": 86, "context_dim": 12}, {"context_tokens": 86}),
    ],
)
def test_what_is_not_shown_can_be_said(config, said):
    model = build_model(config | said, device="meta")
    assert recognise(model.state_dict(), "x.pt", {})[0] != model.config
    found, _, notes = recognise(model.state_dict(), "x.pt", said)
    assert found == model.config
    assert not any(f"{name}=" in note for name in said for note in notes)


@pytest.mark.parametrize("name", ["heads", "num_classes", "null_label", "context_tokens"])
def test_corrections_have_the_right_type(name):
    model = build_model(UVIT | {"context_tokens": 77, "context_dim": 12}, device="meta")
    with pytest.raises(InputError, match=f"model option {name}='many': must be of type"):
        recognise(model.state_dict(), "x.pt", {name: "many"})


def test_a_named_model_is_not_guessed(tmp_path):
    torch.save(build_model("ddpm-tiny").state_dict(), tmp_path / "a.pth")
    assert read_foreign(tmp_path / "a.pth", "ddpm-tiny").model.config == MODELS["ddpm-tiny"]


def test_a_model_of_half_precision_is_of_single_precision_afterwards(tmp_path):
    model = build_model(DIT).bfloat16()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = read_foreign(tmp_path / "a.pt")
    assert found.dtype == "bfloat16"
    assert not found.model.training
    for mine, theirs in zip(found.model.parameters(), model.parameters()):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs.float())
        assert mine.requires_grad == theirs.requires_grad


def lacking(state, key):
    return {name: value for name, value in state.items() if name != key}


def test_what_does_not_fit_is_listed(tmp_path):
    state = build_model(DIT).state_dict()
    file = tmp_path / "a.pt"
    for changed, message in [
        (lacking(state, "blocks.1.attn.proj.bias"), r"1 missing \(blocks.1.attn.proj.bias\)"),
        (state | {"blocks.1.attn.q_norm.weight": torch.ones(3)}, r"1 unexpected \(blocks.1.attn.q_norm.weight\)"),
        (lacking(state, "pos_embed"), "looks like DiT but lacks pos_embed"),
        (state | {"pos_embed": torch.zeros(1, 15, 64)}, "15 places for patches, which is no square"),
        (
            state | {"x_embedder.proj.weight": torch.zeros(64, 12)},
            r"shape \(64, 12\), which is that of no U-ViT or DiT",
        ),
        ({"layers.0.weight": torch.ones(3)}, "not recognised: neither U-ViT, DiT nor UNet2DModel has keys such as lay"),
    ]:
        torch.save(changed, file)
        with pytest.raises(InputError, match=message):
            read_foreign(file)


def test_files_and_folders_that_hold_nothing_of_use_are_refused(tmp_path):
    own, folder = tmp_path / "own.safetensors", tmp_path / "folder"
    save_model(own, build_model(DIT))
    folder.mkdir()
    for source, message in [
        (tmp_path / "nothing.pt", "nothing.pt does not exist"),
        (own, "is a file of this package already"),
        (folder, r"config.json is missing or damaged \(No such file or directory\): no diffusers folder"),
    ]:
        with pytest.raises(InputError, match=message):
            read_foreign(source)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(InputError, match="UNet2DConditionModel, and only UNet2DModel and DiTTransformer2DModel have a"):
        read_foreign(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json is missing or damaged \('list' object"):
        read_foreign(folder)
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(build_model(DDPM).config)))
    with pytest.raises(InputError, match=r"folder holds none of diffusion_pytorch_model.safetensors"):
        read_foreign(folder)


@pytest.mark.parametrize(
    ("source", "name"),
    [("v1.5", "v1.5"), ("DiT.v2.pt", "DiT.v2"), ("m.safetensors.index.json", "m")],
)
def test_the_file_is_named_after_its_source(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "v1.5":
        (tmp_path / source).mkdir()
        (tmp_path / source / "config.json").write_text(json.dumps(config_to_diffusers(build_model(DDPM).config)))
        torch.save(
            to_diffusers(build_model(DDPM).state_dict(), model_config(DDPM)),
            tmp_path / source / "diffusion_pytorch_model.bin",
        )
    elif source.endswith(".pt"):
        torch.save(build_model(DIT).state_dict(), source)
    else:
        write_shards("m.safetensors", build_model(DIT).state_dict(), {}, 20_000)
    assert cli.main(["import", source]) == 0
    assert (tmp_path / f"{name}.safetensors").exists()


def test_what_would_not_be_read_again_is_not_written(tmp_path, capsys):
    torch.save(build_model(DIT).state_dict(), tmp_path / "a.pt")
    assert cli.main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "b.pt")]) == 2
    assert "b.pt: must end in .safetensors" in capsys.readouterr().err
    assert not (tmp_path / "b.pt").exists()


def test_a_unet_without_its_configuration_is_named_as_that(tmp_path):
    save_file(to_diffusers(build_model(DDPM).state_dict(), model_config(DDPM)), tmp_path / "u.safetensors")
    with pytest.raises(InputError, match="holds a UNet2DModel without its configuration: take its folder"):
        read_foreign(tmp_path / "u.safetensors")


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_no_weights_are_refused(kind, tmp_path):
    state = build_model(DIT).state_dict()
    torch.save(state | {"final_layer.linear.bias": torch.ones(24).to(kind)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"1 of another kind \(final_layer.linear.bias"):
        read_foreign(tmp_path / "a.pt")
    torch.save({3: torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="is not a state dict"):
        read_foreign(tmp_path / "a.pt")


def test_nothing_is_overwritten(tmp_path, capsys):
    torch.save(build_model(DIT).state_dict(), tmp_path / "a.pt")
    (tmp_path / "there.safetensors").write_text("mine")
    assert cli.main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "there.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine"
