import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from sparsedm import diffusion
from sparsedm.cli import main
from sparsedm.diffusion import DDPMSchedule, evaluating
from sparsedm.errors import InputError
from sparsedm.model_files import load_model
from sparsedm.models import build_model
from sparsedm.models.slimmable import WidestTeacher
from sparsedm.train.chain import Start, run_chain
from sparsedm.train.data import ImageSet
from sparsedm.train.loop import Interrupted, TrainOptions
from sparsedm.train.stages import Stage
from tests.tiny import same_state
from tests.tolerance import assert_as_good_as_torch

NET = {"image_size": 8, "width": 32, "multipliers": (1, 1), "attention": (), "groups": 4, "dropout": 0.1}
OPTIONS = TrainOptions(steps=5, batch_size=8, lr=1e-3, warmup=0, ema=0.9, save_every=2, log_every=1, seed=3)


def supernet(**overrides):
    torch.manual_seed(0)
    model = build_model("slimmable-tiny", **NET | overrides)
    for parameter in model.parameters():  # away from the start, where the branches are nearly zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def images():
    generator = torch.Generator().manual_seed(0)
    return ImageSet(torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8), None, (), "random")


def train(model, folder, steps=OPTIONS.steps, distill=0.0):
    """A chain of one stage, taught by the widest; returns its TrainResult."""
    (done,) = run_chain(
        Start(model),
        [Stage("dense", steps, teacher="widest", w_kd=distill)],
        images(),
        DDPMSchedule(),
        OPTIONS,
        folder,
        progress=False,
    )
    return done.result


def test_a_step_accumulates_the_gradients_of_the_widths():
    """The gradient of the batch is the mean of those of its parts, each at its width (fp64 as the reference)."""

    def gradients(dtype, divided):
        model = supernet(dropout=0.0).to(dtype)
        torch.manual_seed(7)
        widths = model._sandwich()
        x0, schedule = torch.linspace(-1, 1, 8 * 3 * 64, dtype=dtype).view(8, 3, 8, 8), DDPMSchedule()
        t, noise = torch.arange(8, dtype=dtype) * 120, x0.flip(0)
        x = diffusion.diffuse(x0, t, noise, schedule)
        if divided:
            torch.manual_seed(7)
            (model.train()(x, t) - noise).square().mean().backward()
        else:
            for k, part in zip(widths, torch.arange(8).chunk(4), strict=True):
                with model.at_width(k):
                    ((model.eval()(x[part], t[part]) - noise[part]).square().mean() / 4).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    reference = gradients(torch.float64, divided=False)
    assert_as_good_as_torch(gradients(torch.float32, divided=True), reference, gradients(torch.float32, divided=False))


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, python_signals):
    whole = train(supernet(), tmp_path / "whole", distill=0.5)

    model, calls = supernet(), []

    def stop(*_):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        train(model, tmp_path / "stopped", distill=0.5)
    resumed = train(supernet(), tmp_path / "stopped", distill=0.5)
    assert same_state(resumed.model.state_dict(), whole.model.state_dict())
    assert same_state(resumed.ema.state_dict(), whole.ema.state_dict())
    loaded = load_model(tmp_path / "stopped", build_model).model
    assert loaded.config == model.config
    assert same_state(loaded.state_dict(), whole.ema.state_dict())


def test_every_width_learns(tmp_path):
    def losses(model):
        x = images().images.float() / 127.5 - 1
        return [diffusion.validation_loss(model.export(k), x, DDPMSchedule()).item() for k in model.config.eighths]

    model = build_model("slimmable-tiny", **NET)
    before = losses(model)
    trained = train(model, tmp_path, steps=30).model
    assert all(after < 0.9 * loss for after, loss in zip(losses(trained), before))


def test_the_widest_teaches_without_learning_from_it():
    model = supernet(dropout=0.5)
    teacher = WidestTeacher(model).eval().requires_grad_(False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    x, t, _ = model.example_inputs(4)
    model.train()
    taught = teacher(x, t)
    assert model.training
    assert not taught.requires_grad
    with evaluating(model):
        assert torch.equal(taught, model(x, t))
        assert not torch.equal(taught[1:2], model.export(2)(x[1:2], t[1:2]))


def test_distillation_changes_what_narrow_widths_learn(tmp_path):
    alone = train(supernet(), tmp_path / "alone", steps=1)
    taught = train(supernet(), tmp_path / "taught", steps=1, distill=0.5)
    assert not same_state(alone.model.state_dict(), taught.model.state_dict())
    with pytest.raises(InputError, match=r"stages.0.w_kd is 0.5 there and 0.0 here"):
        train(supernet(), tmp_path / "taught", steps=1)


def test_a_stage_of_a_chain_is_taught_by_the_widest(tmp_path):
    """The same bits as alone, then a sparse student is taught by the dense one at full width."""
    alone = train(supernet(), tmp_path / "alone", steps=2, distill=0.5)
    stages = [Stage("dense", 2, teacher="widest", w_kd=0.5), Stage("2of4", 1, "2:4", teacher="dense", w_kd=0.5)]
    options = replace(OPTIONS, accumulate=1)
    start, folder = Start(supernet()), tmp_path / "chain"
    dense, sparse = run_chain(start, stages, images(), DDPMSchedule(), options, folder, progress=False)
    assert same_state(dense.ema.state_dict(), alone.ema.state_dict())
    assert dense.metrics[-1]["transfer_loss"] > 0
    assert sparse.metrics[-1]["transfer_loss"] > 0


def test_distillation_from_the_command_line(tmp_path, capsys):
    command = ["train", "--data", "synthetic", "--limit", "16", "--steps", "2", "--batch-size", "8", "--chain", "dense"]
    model = ["--model", "slimmable-tiny", "--set", "image_size=8", "--set", "width=16"]
    assert main([*command, *model, "--distill", "0.5", "--run", str(tmp_path / "a")]) == 0
    (stage,) = json.loads((tmp_path / "a" / "options.json").read_text())["stages"]
    assert (stage["teacher"], stage["w_kd"]) == ("widest", 0.5)
    capsys.readouterr()
    assert main([*command, "--model", "ddpm-tiny", "--distill", "0.5", "--run", str(tmp_path / "b")]) == 2
    assert "a supernet is a slimmable network" in capsys.readouterr().err
    assert main([*command[:-1], "2:4", *model, "--distill", "0.5", "--run", str(tmp_path / "b")]) == 2
    assert "--distill is for dense stages, but there is none" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="this one trains one width"):
        train(build_model("ddpm-tiny", image_size=8), tmp_path, distill=0.5)
    with pytest.raises(InputError, match="this one trains one width"):
        train(supernet(passes=0), tmp_path, distill=0.5)
    with pytest.raises(InputError, match="batch_size=8 cannot be divided among 9 widths"):
        train(supernet(passes=9), tmp_path)
    assert not list(tmp_path.iterdir())
