"""Checkpoints come back bit for bit; what is damaged, foreign or of another run is refused."""

import json
import re
import resource
from functools import partial

import pytest
import torch
from torch import nn

from sparsedm.errors import InputError
from sparsedm.model_files import load_model, save_model
from sparsedm.sparsity import sparsify
from sparsedm.tensor_files import read_tensors, write_tensors
from sparsedm.train import checkpoint, run_folder
from tests.tiny import same_state, tiny, tiny_from


def adam(model):
    """An optimizer that has made one step, with another gradient for every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index)
    optimizer.step()
    return optimizer


def saved(folder, step=4, model=None, ema=None, optimizer=None, **settings):
    model = model or sparsify(tiny(1), "2:4")
    ema = ema or sparsify(tiny(2), "2:4")
    optimizer = optimizer or adam(model)
    return checkpoint.save(folder, step, model=model, ema=ema, optimizer=optimizer, state={"seconds": 1.5}, **settings)


def moments(model, optimizer):
    return {f"{name}/{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def test_saves_and_loads_every_bit(tmp_path):
    model, ema = sparsify(tiny(1), "2:4"), sparsify(tiny(2), "2:4")
    optimizer = adam(model)
    path = saved(tmp_path, 4, model, ema, optimizer)
    assert path == tmp_path / "checkpoints" / "step-00000004" == run_folder.latest(tmp_path)
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
    }  # fmt: skip

    other, average = sparsify(tiny(8), "2:4"), sparsify(tiny(9), "2:4")
    checkpoint.load(path, other, average)
    fresh = torch.optim.AdamW(other.parameters(), lr=7, fused=True)
    state = checkpoint.load_optimizer(path, other, fresh)
    assert same_state(other.state_dict(), model.state_dict())
    assert same_state(average.state_dict(), ema.state_dict())
    assert same_state(moments(other, fresh), moments(model, optimizer))
    assert fresh.param_groups[0]["lr"] == 7  # settings come from the options, not from the file
    assert (state["step"], state["seconds"], state["model"]["kind"]) == (4, 1.5, "masked")
    assert state["versions"]["torch"] == torch.__version__


def test_moments_lie_as_their_weights_do(tmp_path):
    """A fused optimizer walks along the memory of both."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 75).view(1, 3, 5, 5)).square().sum().backward()
        optimizer.step()

    step()
    path = checkpoint.save(tmp_path, 1, model=model, ema=model, optimizer=optimizer, state={"updates": 1})
    step()
    expected = [p.detach().clone() for p in model.parameters()]
    checkpoint.load(path, model, model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_optimizer(path, model, optimizer)
    step()
    assert all(map(torch.equal, model.parameters(), expected))


def test_optimizer_without_a_step_is_saved_too(tmp_path):
    model = tiny()
    path = saved(tmp_path, 0, model, optimizer=torch.optim.AdamW(model.parameters()))
    fresh = adam(model)
    checkpoint.load_optimizer(path, model, fresh)
    assert not fresh.state


def test_keeps_the_last_two(tmp_path):
    for step in (1, 9, 10, 100):
        saved(tmp_path, step)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000100"]
    assert run_folder.latest(tmp_path / "nothing") is None


def test_an_old_checkpoint_goes_at_once(tmp_path, monkeypatch):
    """A reader never meets one that is half removed: it loses its name first."""
    removed = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **settings: removed.append(path.name))
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert removed == [".step-00000001.partial"]
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def test_a_saved_step_is_left_as_it_is(tmp_path):
    path = saved(tmp_path)
    before = (path / "model.safetensors").read_bytes()
    assert saved(tmp_path, model=tiny(3)) == path
    assert (path / "model.safetensors").read_bytes() == before


def test_files_have_the_permissions_of_others(tmp_path):
    path = saved(tmp_path)
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "state.json").stat().st_mode}


@pytest.mark.parametrize("limit", [1_000, 50_000], ids=["first file", "last file"])
def test_full_disk_leaves_what_was_there(tmp_path, limit):
    first = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*step-00000002: .*File too large"):
            saved(tmp_path, 2)
        with pytest.raises(InputError, match=r"cannot write .*model.safetensors: .*File too large"):
            save_model(tmp_path / "model.safetensors", tiny(width=1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "checkpoints").iterdir()) == [first]
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoints"]


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(tmp_path, name, length):
    path = saved(tmp_path)
    file = path / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    model = sparsify(tiny(), "2:4")
    if name == "optimizer":
        load = partial(checkpoint.load_optimizer, path, model, torch.optim.AdamW(model.parameters()))
    else:
        load = partial(checkpoint.load, path, model, sparsify(tiny(), "2:4"))
    with pytest.raises(InputError, match=rf"{name}\.safetensors is missing, truncated or of another format"):
        load()


def test_a_damaged_checkpoint_names_the_one_before(tmp_path):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    (path / "ema.safetensors").unlink()
    model = sparsify(tiny(), "2:4")
    hint = r"; to continue from step-00000001 instead, delete .*step-00000002"
    with pytest.raises(InputError, match=r"ema.safetensors is missing.*" + hint):
        checkpoint.load(path, model, sparsify(tiny(), "2:4"))
    (path / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state.json is (missing|damaged).*" + hint):
        checkpoint.load_optimizer(path, model, torch.optim.AdamW(model.parameters()))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = saved(tmp_path)
    other = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"optimizer.safetensors does not fit the model, which has no parameter"):
        checkpoint.load_optimizer(path, other, torch.optim.AdamW(other.parameters()))
    (path / "state.json").write_text("{")
    model = sparsify(tiny(), "2:4")
    with pytest.raises(InputError, match=r"state.json is (missing|damaged)"):
        checkpoint.load_optimizer(path, model, torch.optim.AdamW(model.parameters()))


def test_finds_the_checkpoint_in_a_folder(tmp_path):
    (tmp_path / "00-dense" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_model(tmp_path, tiny_from)
    first = saved(tmp_path / "00-dense", 7)
    last = saved(tmp_path / "01-2of4", 3)
    (tmp_path / "02-1of4").mkdir()
    for path, expected in ((tmp_path, last), (tmp_path / "00-dense", first), (first, first)):
        for which, seed in (("ema", 2), ("model", 1)):
            loaded = load_model(path, tiny_from, which=which)
            assert loaded.file == expected / f"{which}.safetensors"
            assert loaded.state["step"] == int(expected.name[5:])
            if which == "ema":
                assert same_state(loaded.model.state_dict(), tiny(seed).state_dict())
    assert load_model(last / "ema.safetensors", tiny_from).kind == "masked"
    with pytest.raises(InputError, match="which='best': 'ema' or 'model'"):
        load_model(last, tiny_from, which="best")
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere", tiny_from)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"first.weight/exp_avg": torch.ones(3)}, r"first.weight/exp_avg is \(3,\).*, not \(64, 32\)"),
        (
            lambda m: m | {"first.weight/exp_avg": m["first.weight/exp_avg"].half()},
            r"float16, not .* float32",
        ),
        (lambda m: m | {"first.weight/exp_avg": m["first.weight/exp_avg"].long()}, r"int64, not .* float32"),
        (lambda m: m | {"first.weight/step": torch.ones(3)}, r"first.weight/step is \(3,\) float32, not \(\) float32"),
        (lambda m: m | {"third.weight/step": torch.ones(())}, "has no parameter third.weight"),
        (
            lambda m: {k: v for k, v in m.items() if not k.endswith("exp_avg_sq")},
            "the same moments, step, exp",
        ),
        (lambda m: m | {k.replace("exp_avg_sq", "more"): v for k, v in m.items()}, "the same moments"),
        (lambda m: {k: v for k, v in m.items() if k != "second.bias/exp_avg_sq"}, "not every parameter has the same"),
        (lambda m: {}, "it lacks tensors"),
        (lambda m: m | {"first.weight/exp_avg": torch.ones(3, 64, 32)}, r"is \(3, 64, 32\) float32, not \(64, 32\)"),
    ],
    ids=["shape", "half", "integers", "steps", "parameter", "all missing", "more", "missing", "empty", "stacked"],
)
def test_moments_that_do_not_fit_are_refused(tmp_path, change, message):
    """They were used as they are: a foreign shape read foreign memory, a missing one began anew without a word."""
    model = tiny()
    path = checkpoint.save(tmp_path, 4, model=model, ema=tiny(), optimizer=adam(model), state={"updates": 4})
    file = path / "optimizer.safetensors"
    tensors, _ = read_tensors(file)
    write_tensors(file, change(tensors), {})  # as written before the header knew their number
    with pytest.raises(InputError, match=message):
        checkpoint.load_optimizer(path, model, adam(model))


def test_all_moments_of_a_parameter_are_missed(tmp_path):
    model = tiny()
    path = saved(tmp_path, 4, model)
    file = path / "optimizer.safetensors"
    tensors, header = read_tensors(file)
    write_tensors(file, {k: v for k, v in tensors.items() if not k.startswith("second.bias/")}, header)
    with pytest.raises(InputError, match="it lacks tensors"):
        checkpoint.load_optimizer(path, model, adam(model))


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_tensors_that_were_changed_since_are_refused(tmp_path, name):
    path = saved(tmp_path)
    file = path / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of a value: the file reads as well as before
    file.write_bytes(content)
    networks = [sparsify(tiny(), "2:4") for _ in range(2)]
    others = (networks[0], adam(networks[0])) if name == "optimizer" else networks
    load = checkpoint.load_optimizer if name == "optimizer" else checkpoint.load
    with pytest.raises(InputError, match=f"{name}.safetensors is damaged: it is not what was written there"):
        load(path, *others)
    if name != "optimizer":
        with pytest.raises(InputError, match="is not what was written there"):
            load_model(tmp_path, tiny_from, which=name)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key != "sha256"}))
    checkpoint.load(path, *networks)  # an older checkpoint has no digests


CHANGES = {  # of a state.json: an expression, what stands in its place
    '"updates": 4': '"updates": 5',
    '"loss": 0.5': '"loss": 0.7',
    '"run": null': '"run": "a.0"',
    '"kind": "masked"': '"kind": "dense"',
    '"torch": "[0-9]': '"torch": "0',
    '"model.safetensors": "..': '"model.safetensors": "xx',
    '"state.json": "..': '"state.json": "xx',
}


def test_a_state_that_was_changed_since_is_refused(tmp_path):
    model = sparsify(tiny(), "2:4")
    state = {"updates": 4, "loss": 0.5, "seconds": 1 / 3}
    path = checkpoint.save(tmp_path, 4, model=model, ema=model, optimizer=adam(model), state=state)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(json.dumps(json.loads(text), indent=7))  # the same values
    checkpoint.load(path, model, model)
    for old, new in CHANGES.items():
        (path / "state.json").write_text(changed := re.sub(old, new, text))
        assert changed != text
        for load, other in ((checkpoint.load, model), (checkpoint.load_optimizer, adam(model))):
            with pytest.raises(InputError, match=r"state\.json is damaged: it is not what was written there"):
                load(path, model, other)
        with pytest.raises(InputError, match=r"state\.json is damaged: it is not what was written there"):
            load_model(tmp_path, tiny_from)
    older = json.loads(text) | {"updates": 5}
    del older["sha256"]["state.json"]  # which did not know its own
    (path / "state.json").write_text(json.dumps(older))
    assert checkpoint.load_optimizer(path, model, adam(model))["updates"] == 5


def test_the_checkpoint_of_another_stage_is_refused(tmp_path):
    path = saved(tmp_path, model=tiny(1), ema=tiny(2))
    with pytest.raises(InputError, match="of another run or stage: its kind is dense, not masked; move it back"):
        checkpoint.load(path, sparsify(tiny(), "2:4"), sparsify(tiny(), "2:4"))
    path = saved(tmp_path, 5)
    with pytest.raises(InputError, match="of another run or stage: its patterns is ") as caught:
        checkpoint.load(path, sparsify(tiny(), "1:4"), sparsify(tiny(), "1:4"))
    assert "delete" not in str(caught.value)  # it is whole, and somebody's


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_a_state_that_is_no_state_is_refused(tmp_path, text):
    path = saved(tmp_path)
    (path / "state.json").write_text(text)
    for load in (checkpoint.load_optimizer, checkpoint.load):
        with pytest.raises(InputError, match=r"state.json is damaged"):
            load(path, sparsify(tiny(), "2:4"), sparsify(tiny(), "2:4"))
