"""What training scripts save: averages, wrappers, and what lies beside the networks."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sparsedm.errors import InputError
from sparsedm.models import build_model
from sparsedm.models.convert import read_foreign
from sparsedm.models.diffusers import config_to_diffusers, to_diffusers
from sparsedm.tensor_files import read_tensors

TINY = {"kind": "uvit", "image_size": 8, "dim": 128, "depth": 4, "heads": 4}
DDPM = {"kind": "ddpm", "image_size": 8, "width": 32, "multipliers": (1, 2), "attention": (4,), "blocks": 1}


def two():
    """A network and another one, as its average."""
    return [build_model(TINY).state_dict() for _ in range(2)]


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (lambda net, ema: {"model": net, "model_ema": ema}, "'model_ema' was read, 'model' ignored"),
        (lambda net, ema: {"net_model": net, "ema_model": ema, "step": 5}, "'ema_model' was read"),
        (lambda net, ema: {"state_dict": net, "state_dict_ema": ema}, "'state_dict_ema' was read"),
        (lambda net, ema: [prefixed(net, "module."), {"state": {}}, 3, 1000, ema], "'ema' was read"),
        (lambda net, ema: {"model": net, "modelEMA": ema}, "'modelEMA' was read, 'model' ignored"),
        (lambda net, ema: {"net": net, "emaNet": ema}, "'emaNet' was read, 'net' ignored"),
        (lambda net, ema: {"model_state_dict": net, "polyak": ema}, "'polyak' was read, 'model_state_dict' ignored"),
        (lambda net, ema: prefixed(net, "model.") | prefixed(ema, "model_ema."), "'model_ema' was read"),
        (
            lambda net, ema: (
                prefixed(net, "model.") | {"n_averaged": torch.ones(1)} | prefixed(ema, "ema_model.module.")
            ),
            "",
        ),
        (lambda net, ema: {"model": net, "ema": {"decay": 0.99, "shadow": ema}}, "'ema' was read"),
        (
            lambda net, ema: {"model": net, "swa_model": {"n_averaged": torch.ones(1)} | prefixed(ema, "module.")},
            "'swa_model' was read",
        ),
        (
            lambda net, ema: {
                "state_dict": prefixed(net, "model.")
                | {"model_ema.decay": torch.ones(1), "model_ema.num_updates": torch.ones(1)}
                | {f"model_ema.{name.replace('.', '')}": value for name, value in ema.items()}
            },
            "'model_ema' was read",
        ),
        (
            lambda net, ema: {
                "step": 3,
                "model": net,
                "ema": {"initted": torch.ones(1)} | prefixed(net, "online_model.") | prefixed(ema, "ema_model."),
            },
            "'ema_model' was read, 'online_model' ignored",
        ),
    ],
    ids=[
        "model_ema",
        "DDSM",
        "timm",
        "ermongroup",
        "camel",
        "before",
        "polyak",
        "beginnings",
        "nested",
        "shadow",
        "swa",
        "LitEma",
        "lucidrains",
    ],
)
def test_the_average_is_taken_and_it_is_said(pack, said, tmp_path):
    net, ema = two()
    torch.save(pack(net, ema), tmp_path / "a.ckpt")
    found = read_foreign(tmp_path / "a.ckpt")
    assert any(said in note for note in found.notes)
    assert all(torch.equal(value, ema[name]) for name, value in found.model.state_dict().items())
    raw = read_foreign(tmp_path / "a.ckpt", weights="raw")
    assert all(torch.equal(value, net[name]) for name, value in raw.model.state_dict().items())


def test_an_average_in_an_unknown_form_is_not_passed_over(tmp_path):
    net, ema = two()
    torch.save({"model": net, "ema": {"shadow_params": list(ema.values())}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds 'ema', perhaps the average of the weights, .*--weights raw"):
        read_foreign(tmp_path / "a.pt")
    assert torch.equal(read_foreign(tmp_path / "a.pt", weights="raw").model.pos_embed, net["pos_embed"])


def test_an_average_that_lies_deep_in_a_file_or_beside_unknown_networks_is_not_passed_over(tmp_path):
    net = {f"layers.{i}.weight": torch.ones(2) for i in range(4)}
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "ema": {}, "exp_avg": list(net.values())}
    in_optimizer = {"optimizer_states": [moments | {"ema": tuple(net.values())}]}
    for packed in ({"callbacks": {"EMA": {"weights": net}}}, {"emas": [net]}, {"train": {"ema": net}}, in_optimizer):
        torch.save({"state_dict": net, **packed}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="perhaps the average of the weights, in an unknown form"):
            read_tensors(tmp_path / "a.pt")
        assert read_tensors(tmp_path / "a.pt", "raw")[0].keys() == net.keys()
    torch.save(
        {"model": net, "optimizer": moments, "other": {"state": {0: {"exp_avg": torch.ones(3)}}}}, tmp_path / "a.pt"
    )
    assert read_tensors(tmp_path / "a.pt")[0].keys() == net.keys()
    torch.save({"g": net, "d": net, "g_ema": net}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt")[1] == {"taken": "'g_ema' was read, 'g', 'd' ignored"}
    with pytest.raises(InputError, match="which of 'g', 'd' is the trained network is unknown"):
        read_tensors(tmp_path / "a.pt", "raw")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.module.", "ema.", "eps_net.model."]
)
def test_what_all_names_begin_with_is_taken_off(prefix, tmp_path):
    state, _ = two()
    save_file(prefixed(state, prefix), tmp_path / "a.safetensors")
    found = read_foreign(tmp_path / "a.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_names_of_wrapped_blocks_and_a_schedule_beside_the_network_are_taken_off(wrapper, tmp_path):
    """As Lightning and latent diffusion keep a network whose blocks are compiled or recomputed."""
    state, _ = two()
    wrapped = {name.replace("blocks.0.", f"blocks.0.{wrapper}."): value for name, value in state.items()}
    assert wrapped.keys() != state.keys()
    schedule = {"betas": torch.zeros(9), "logvar": torch.zeros(())}
    save_file(prefixed(wrapped, "model.") | schedule, tmp_path / "a.safetensors")
    found = read_foreign(tmp_path / "a.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


def test_a_diffusers_folder_of_half_precision_alone_is_read(tmp_path):
    model = build_model(DDPM)
    (tmp_path / "config.json").write_text(json.dumps(config_to_diffusers(model.config)))
    state = {name: value.half() for name, value in to_diffusers(model.state_dict(), model.config).items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    found = read_foreign(tmp_path)
    assert found.dtype == "float16"
    assert all(torch.equal(v, model.state_dict()[n].half().float()) for n, v in found.model.state_dict().items())


def test_the_average_in_a_training_checkpoint_of_diffusers_is_taken_and_it_is_said(tmp_path):
    """As their scripts for unconditional training leave it: checkpoint-500/unet and checkpoint-500/unet_ema."""
    models = {name: build_model(DDPM) for name in ("unet", "unet_ema")}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config_to_diffusers(model.config)))
        state = to_diffusers(model.state_dict(), model.config)
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
    for source, weights, expected, note in (
        (tmp_path, "average", "unet_ema", "'unet_ema' was read, 'unet' ignored"),
        (tmp_path, "raw", "unet", None),
        (tmp_path / "unet", "average", "unet", "beside it lies unet_ema, perhaps the average of these weights"),
        (tmp_path / "unet_ema", "average", "unet_ema", None),
    ):
        found = read_foreign(source, weights=weights)
        assert note in found.notes if note else not found.notes
        state = models[expected].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())


def test_a_checkpoint_folder_of_uvit_is_read(tmp_path):
    """As its train.py and SparseDM's leave it."""
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    states = dict(zip(("nnet", "nnet_ema"), two()))
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pth")
    torch.save({"state": {}}, folder / "optimizer.pth")
    found = read_foreign(folder)
    assert "'nnet_ema.pth' was read, 'nnet.pth' ignored" in found.notes
    for read, name in ((found, "nnet_ema"), (read_foreign(folder, weights="raw"), "nnet")):
        assert all(torch.equal(value, states[name][key]) for key, value in read.model.state_dict().items())
    (folder / "nnet_ema.pth").rename(folder / "average")
    assert torch.equal(read_foreign(folder).model.pos_embed, states["nnet"]["pos_embed"])
    (folder / "nnet.pth").unlink()
    (folder / "average").rename(folder / "nnet_ema.pth")
    found = read_foreign(folder)
    assert torch.equal(found.model.pos_embed, states["nnet_ema"]["pos_embed"])
    assert "ignored" not in " ".join(found.notes)
    with pytest.raises(InputError, match=r"500000.ckpt holds no nnet.pth, the raw weights: leave out --weights raw"):
        read_foreign(folder, weights="raw")
