import argparse
import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from sparsedm import cli
from sparsedm.errors import InputError
from sparsedm.model_files import load_model, save_model
from sparsedm.models import MODELS, build_model, convert, model_config, schedule_note
from sparsedm.models.convert import read_foreign, recognise
from sparsedm.models.diffusers import config_to_diffusers, to_diffusers
from sparsedm.tensor_files import write_shards
from tests.tolerance import assert_as_good_as_torch

UVIT = {"kind": "uvit", "image_size": 8, "dim": 64, "depth": 2, "heads": 1, "num_classes": 10}
DIT = {"kind": "dit", "image_size": 8, "channels": 3, "dim": 64, "depth": 2, "heads": 1, "num_classes": 10}
KNOWN = DIT | {"dim": 384, "depth": 12, "heads": 6}  # the size of a published one, of another shape
TINY = {"kind": "uvit", "image_size": 8, "dim": 128, "depth": 4, "heads": 4}
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
        UVIT
        | {"num_classes": 0, "channels": 4, "final_conv": False, "patch_size": 4, "mlp_ratio": 2}
        | {"schedule": "scaled-linear"},
        UVIT | {"null_label": False},
        UVIT | {"num_classes": 0, "context_tokens": 77, "context_dim": 12, "schedule": "scaled-linear"},
        UVIT | {"mlp_time_embed": True, "qkv_bias": True},
        DIT,
        DIT | {"learn_sigma": False, "num_classes": 0, "patch_size": 4},
    ],
)
def test_other_networks_are_read_from_their_shapes(config):
    model = build_model(config, device="meta")
    found, about, notes = recognise(model.state_dict(), "x.pt", {"heads": 1})
    assert found == model.config
    assert "none of the published" in about
    assert not any("heads" in note for note in notes)
    if config["kind"] == "uvit":
        assert f"schedule={model.config.schedule}" in notes[0]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("dit-imagenet256-small", {"null_label": False}),
        ("uvit-imagenet64-mid", {"null_label": True}),
        ("uvit-imagenet256-large", {"null_label": False}),
        ("uvit-coco-small", {"context_tokens": 0, "schedule": "vp-sde"}),
    ],
)
def test_a_network_that_lacks_labels_or_text_of_a_published_one_is_another(name, changed):
    model = build_model(name, device="meta", **changed)
    found, about, _ = recognise(model.state_dict(), "x.pt", {})
    assert found == model.config
    assert "none of the published" in about


def test_heads_are_asked_for_where_no_published_size_fits():
    with pytest.raises(InputError, match=r"x.pt does not show the number of heads.* width 64 and depth 2: say it with"):
        recognise(shapes(UVIT), "x.pt", {})
    for kind, depth in (("dit", 28), ("uvit", 28)):  # of a published width and depth, in another patch size
        odd = build_model(
            {"kind": kind, "image_size": 48, "patch_size": 3, "dim": 1152, "depth": depth, "heads": 16}, device="meta"
        )
        found, _, notes = recognise(odd.state_dict(), "x.pt", {})
        assert found == odd.config
        assert "heads=16" in notes[0]


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
    assert cli.main(["import", "official.pt", "--set", "heads=1"]) == 0
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


def write_unet(folder):
    model = build_model(DDPM)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(model.config)))
    save_file(to_diffusers(model.state_dict(), model.config), folder / "diffusion_pytorch_model.safetensors")


SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    "other",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.012},
        {"num_train_timesteps": 4000},
        {"trained_betas": [0.1, 0.2]},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"num_train_timesteps": None} | dict.fromkeys(SCHEDULER),
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_pipeline_that_was_trained_otherwise_is_refused(other, tmp_path):
    pipeline, (name, value) = tmp_path / "pipeline", next(iter(other.items()))
    unet = pipeline / "unet"
    write_unet(unet)
    # beside the network; in one folder with it; of a training, whose checkpoints are folders
    for folder in (pipeline / "scheduler", unet, tmp_path / "scheduler"):
        folder.mkdir(exist_ok=True)
        file = folder / "scheduler_config.json"
        for usual in (
            SCHEDULER,
            SCHEDULER | {"trained_betas": None, "prediction_type": "epsilon", "clip_sample": True},
        ):
            file.write_text(json.dumps(usual))
            assert read_foreign(pipeline).model.config.schedule == "ddpm"
        file.write_text(json.dumps(SCHEDULER | other))
        for source in (pipeline, unet):
            with pytest.raises(InputError, match=f"scheduler_config.json: .*{name}={re.escape(repr(value))}"):
                read_foreign(source)
        file.unlink()


def test_the_scheduler_that_lies_nearest_decides(tmp_path):
    pipeline = tmp_path / "pipeline"
    write_unet(pipeline / "unet")
    for folder, beta_end in ((pipeline, 0.02), (tmp_path, 0.012)):
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {"beta_end": beta_end}))
    assert read_foreign(pipeline).model.config.schedule == "ddpm"


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_what_a_scheduler_leaves_out_is_the_default_of_its_class(kind, tmp_path):
    file = tmp_path / "scheduler_config.json"
    for options in ({"_class_name": kind}, SCHEDULER):
        file.write_text(json.dumps(options))
        convert._check_scheduler(file)
    for options in ({"_class_name": kind, "beta_end": None}, {"_class_name": "AnotherScheduler"}):
        file.write_text(json.dumps(options))
        with pytest.raises(InputError, match=r"(beta_end|num_train_timesteps)=None, and our network needs"):
            convert._check_scheduler(file)


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
        (DIT | {"dim": 384, "depth": 12, "heads": 6}, {"heads": 4}),
        (UVIT | {"dim": 128, "depth": 4, "heads": 4}, {"schedule": "scaled-linear"}),
        (KNOWN | {"num_classes": 5}, {"null_label": True}),
        (KNOWN | {"num_classes": 5}, {"num_classes": 5}),
        (TINY | {"num_classes": 11, "null_label": False}, {"null_label": False}),
        (TINY | {"context_tokens": 86, "context_dim": 12, "schedule": "scaled-linear"}, {"context_tokens": 86}),
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
    model = build_model(TINY | {"num_classes": 10, "context_tokens": 77, "context_dim": 12}, device="meta")
    with pytest.raises(InputError, match=f"model option {name}='many': must be of type"):
        recognise(model.state_dict(), "x.pt", {name: "many"})


def test_a_named_model_is_not_guessed(tmp_path):
    torch.save(build_model("ddpm-tiny").state_dict(), tmp_path / "a.pth")
    assert read_foreign(tmp_path / "a.pth", "ddpm-tiny").model.config == MODELS["ddpm-tiny"]


def test_a_model_of_half_precision_is_of_single_precision_afterwards(tmp_path):
    model = build_model(DIT).bfloat16()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = read_foreign(tmp_path / "a.pt", overrides={"heads": 1})
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
    heads = {"heads": 1}
    for changed, message in [
        (lacking(state, "blocks.1.attn.proj.bias"), r"1 missing \(blocks.1.attn.proj.bias\)"),
        (state | {"blocks.1.attn.q_norm.weight": torch.ones(3)}, r"1 unexpected \(blocks.1.attn.q_norm.weight\)"),
        (lacking(state, "pos_embed"), "looks like DiT but lacks pos_embed"),
        (state | {"pos_embed": torch.zeros(1, 15, 64)}, "15 places for patches, which is no square"),
        (
            state | {"x_embedder.proj.weight": torch.zeros(64, 12)},
            r"shape \(64, 12\), which is that of no U-ViT or DiT",
        ),
        ({"layers.0.weight": torch.ones(3)}, "not recognised: neither U-ViT, DiT, DDPM nor UNet2DModel has keys"),
    ]:
        torch.save(changed, file)
        with pytest.raises(InputError, match=message):
            read_foreign(file, overrides=heads)


def test_files_and_folders_that_hold_nothing_of_use_are_refused(tmp_path):
    own, folder = tmp_path / "own.safetensors", tmp_path / "folder"
    save_model(own, build_model(DIT))
    folder.mkdir()
    for source, message in [
        (tmp_path / "nothing.pt", "nothing.pt does not exist"),
        (own, "is a file of this package already"),
        (folder, r"no diffusers folder: .*config.json is missing or unreadable: No such"),
    ]:
        with pytest.raises(InputError, match=message):
            read_foreign(source)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(InputError, match=r"config.json: .*UNet2DConditionModel, and only UNet2DModel and DiT"):
        read_foreign(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"no diffusers folder: .list. object"):
        read_foreign(folder)
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(build_model(DDPM).config)))
    with pytest.raises(InputError, match=r"folder holds none of diffusion_pytorch_model.safetensors"):
        read_foreign(folder)


@pytest.mark.parametrize(
    ("source", "name"),
    [("v1.5", "v1.5"), ("DiT.v2.pt", "DiT.v2"), ("m.safetensors.index.json", "m"), ("named.pt", "named")],
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
        torch.save(build_model(DIT).state_dict(), target := "3f9ac0" if source == "named.pt" else source)
        if target != source:
            (tmp_path / source).symlink_to(target)  # as in the cache of a model hub
    else:
        write_shards("m.safetensors", build_model(DIT).state_dict(), {}, 20_000)
    command = ["import", source] if source == "v1.5" else ["import", source, "--set", "heads=1"]
    assert cli.main(command) == 0
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
        read_foreign(tmp_path / "a.pt", overrides={"heads": 1})
    torch.save({3: torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="is not a state dict"):
        read_foreign(tmp_path / "a.pt")


def test_nothing_is_overwritten(tmp_path, capsys):
    torch.save(build_model(DIT).state_dict(), tmp_path / "a.pt")
    (tmp_path / "there.safetensors").write_text("mine")
    assert cli.main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "there.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there.safetensors").read_text() == "mine"


# ---- other officials -------------------------------------------------------------------------------------------------


def original_ddpm(model):
    """Our state dict as pesser/pytorch_diffusion and ermongroup/ddim name it; their attention is 1x1 convolutions."""
    theirs, levels = {}, len(model.config.multipliers)
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(levels - 1 - int(parts[1]))
        name = ".".join(parts)
        for ours, original in {
            "time_embed.fc1": "temb.dense.0", "time_embed.fc2": "temb.dense.1", "mid.blocks.0": "mid.block_1",
            "mid.blocks.1": "mid.block_2", "mid.attns.0": "mid.attn_1", ".blocks.": ".block.", ".attns.": ".attn.",
            "time_proj": "temb_proj", "shortcut": "nin_shortcut", ".proj.": ".proj_out.",
        }.items():  # fmt: skip
            name = name.replace(ours, original)
        if value.ndim == 2 and (".qkv." in name or "proj_out" in name):
            value = value[:, :, None, None]
        if ".qkv." in name:
            theirs |= {name.replace("qkv", letter): part for letter, part in zip("qkv", value.chunk(3))}
        else:
            theirs[name] = value
    return theirs


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ddpm-celeba64"])
def test_original_ddpm_checkpoints_are_recognised(name):
    model = build_model(name, device="meta")
    theirs = original_ddpm(model)
    assert theirs["up.0.block.0.nin_shortcut.weight"].shape[0] == 128  # `up` counts from the highest resolution there
    state = convert._from_original_ddpm(theirs)
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert recognise(state, "x.ckpt", {}) == (MODELS[name], f"the weights of {name}", [])


def test_an_original_ddpm_becomes_ours(tmp_path):
    model = build_model(DDPM | {"attention": (4,), "image_size": 8})
    torch.save(original_ddpm(model), tmp_path / "ema.ckpt")
    found = read_foreign(tmp_path / "ema.ckpt", overrides={"image_size": 8, "dropout": 0.1})
    assert found.model.config == model.config
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in found.model.state_dict().items())


def test_sparsedms_networks_have_biases_that_the_published_ones_have_not(tmp_path):
    state = build_model("uvit-cifar10-small", device="meta", qkv_bias=True).state_dict()
    config, about, _ = recognise(state, "x.pth", {})
    assert about == "the weights of uvit-cifar10-small"
    assert config == model_config("uvit-cifar10-small", qkv_bias=True)


def test_a_file_without_a_schedule_of_a_network_that_had_another_is_noticed(tmp_path):
    """Files of this package from before the schedule was stored are of VP-SDE."""
    old = {name: value for name, value in asdict(MODELS["uvit-coco-small"]).items() if name != "schedule"}
    with pytest.warns(UserWarning, match="uvit-coco-small was published with scaled-linear"):
        assert model_config(old).schedule == "vp-sde"
    found = schedule_note(model_config("uvit-imagenet256-huge", schedule="vp-sde"))
    assert found == "schedule vp-sde: uvit-imagenet256-huge was published with scaled-linear"
    assert schedule_note(model_config("uvit-imagenet256-huge", schedule="vp-sde", qkv_bias=True)) == found
    assert all(schedule_note(config) is None for config in MODELS.values())
