import dataclasses
import json
import os
import pickle
import re
import resource
import struct
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsedm.compressed import CompressedLinear
from sparsedm.errors import InputError
from sparsedm.model_files import describe, load_model, read_tensors, save_model, write_tensors
from sparsedm.sparsity import compress, masks, set_masking, sparsify
from sparsedm.train import checkpoint
from tests.tiny import TinyConfig, same_state, tiny, tiny_from


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


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_saves_and_loads_every_bit(tmp_path):
    model, ema = sparsify(tiny(1), "2:4"), sparsify(tiny(2), "2:4")
    optimizer = adam(model)
    path = saved(tmp_path, 4, model, ema, optimizer)
    assert path == tmp_path / "checkpoints" / "step-00000004" == checkpoint.latest(tmp_path)
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
    assert checkpoint.latest(tmp_path / "nothing") is None


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


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_claim_accepts_the_same_and_lists_differences(tmp_path):
    record = {"steps": 5, "betas": (0.9, 0.99), "stages": [{"lr": 1e-3, "log_every": 3}], "empty": {}}
    checkpoint.claim(tmp_path / "new", record)
    assert json.loads((tmp_path / "new" / "options.json").read_text()) == {**record, "betas": [0.9, 0.99]}
    checkpoint.claim(tmp_path / "new", record)
    changed = {"steps": 6, "betas": (0.9,), "stages": [{"lr": 1e-3, "log_every": 4}], "more": "x"}
    with pytest.raises(InputError) as caught:
        checkpoint.claim(tmp_path / "new", changed, free=("log_every",))
    assert str(caught.value).endswith(
        "has other options, choose another folder: steps is 5 there and 6 here; betas.1 is 0.99 there and "
        "not set here; empty is {} there and not set here; more is not set there and x here"
    )
    with pytest.raises(InputError, match=r"stages.0.log_every is 3 there and 4 here"):
        checkpoint.claim(tmp_path / "new", changed)
    with pytest.raises(InputError, match=r"; and 5 more$"):
        checkpoint.claim(tmp_path / "new", {f"option {i}": i for i in range(7)})


def test_claim_says_why_a_number_may_not_grow(tmp_path):
    may_grow = {"steps": None, "width": "it is the networks'"}
    checkpoint.claim(tmp_path, {"steps": 5, "width": 8})
    checkpoint.claim(tmp_path, {"steps": 6, "width": 8}, may_grow=may_grow)
    with pytest.raises(
        InputError, match="steps is 6 there and 7 here; width is 8 there and 9 here: it is the networks'"
    ):
        checkpoint.claim(tmp_path, {"steps": 7, "width": 9}, may_grow=may_grow)
    (tmp_path / "options.json").write_text('{"steps": "6", "width": 8}')
    with pytest.raises(InputError, match=r"steps is 6 there and 7 here$"):
        checkpoint.claim(tmp_path, {"steps": 7, "width": 8}, may_grow=may_grow)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '"x"', "3", '{"options": []}', '{"options": null, "run": 1}'])
def test_options_that_hold_none_are_damaged_not_others(tmp_path, text):
    (tmp_path / "options.json").write_text(text)
    with pytest.raises(InputError, match=r"options.json is damaged: "):
        checkpoint.claim(tmp_path, {"options": {"lr": 0.5}})


def test_options_without_work_are_replaced(tmp_path):
    for lr in (0.5, 0.1):
        checkpoint.claim(tmp_path, {"lr": lr}, started=checkpoint.holds_work(tmp_path))
        (tmp_path / ".lock").touch()
    (tmp_path / "found.jsonl").touch()
    with pytest.raises(InputError, match=r"lr is 0\.1 there and 0\.2 here"):
        checkpoint.claim(tmp_path, {"lr": 0.2}, started=checkpoint.holds_work(tmp_path))


def test_lock_sweeps_and_excludes(tmp_path):
    partial = tmp_path / "checkpoints" / ".step-00000003.x.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_text("half")
    kept = saved(tmp_path)
    with checkpoint.run_lock(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == [kept]
        with pytest.raises(InputError, match="another process is training in"), checkpoint.run_lock(tmp_path):
            pass
    with checkpoint.run_lock(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write .*file: it is no folder"),
        checkpoint.run_lock(tmp_path / "file"),
    ):
        pass


def test_a_refused_run_leaves_nothing(tmp_path):
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "options.json")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "options.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    for name in ("piped", "damaged"):
        with pytest.raises(InputError, match=r"options.json is "), checkpoint.run_lock(tmp_path / name):
            checkpoint.claim(tmp_path / name, {"lr": 1})
    with pytest.raises(InputError, match="no"), checkpoint.run_lock(tmp_path / "a" / "b"):
        raise InputError("no")
    assert sorted(tmp_path.rglob("*")) == before
    kept = saved(tmp_path / "a")
    with pytest.raises(InputError, match="no"), checkpoint.run_lock(tmp_path / "a"):
        raise InputError("no")
    assert kept.exists()


def test_a_lock_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Opened before the holder, whose run was refused, removed it; locked after."""

    def replaced(handle, operation):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").touch()

    monkeypatch.setattr(checkpoint.fcntl, "flock", replaced)
    with pytest.raises(InputError, match="another process"), checkpoint.folder_lock(tmp_path):
        pass
    assert (tmp_path / ".lock").exists()


# ---- model files -----------------------------------------------------------------------------------------------------


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
            load_model(file, tiny_from, config={})
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 and no more", bytes(1000)])
def test_garbage_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"a\{suffix} is (missing, truncated|refused)"):
            load_model(file, tiny_from, config={})


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
    with pytest.raises(InputError, match="layers the model does not have: nobody"):
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


def test_other_things_beside_the_checkpoints_are_none(tmp_path):
    path = saved(tmp_path)
    for name in ("step-zz", "step-99999999.bak", "step-1"):
        (path.parent / name).mkdir()
    assert checkpoint.latest(tmp_path) == path


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_a_state_that_is_no_state_is_refused(tmp_path, text):
    path = saved(tmp_path)
    (path / "state.json").write_text(text)
    for load in (checkpoint.load_optimizer, checkpoint.load):
        with pytest.raises(InputError, match=r"state.json is damaged"):
            load(path, sparsify(tiny(), "2:4"), sparsify(tiny(), "2:4"))


def test_what_an_older_folder_does_not_know_had_its_default(tmp_path):
    @dataclasses.dataclass
    class Options:
        lr: float = 0.1
        schedule: str = "vp-sde"

    checkpoint.claim(tmp_path, {"options": {"lr": 0.5}})
    checkpoint.claim(tmp_path, {"options": {"lr": 0.5, "schedule": "vp-sde"}}, classes=[Options])
    with pytest.raises(InputError, match=r"options.schedule is vp-sde there and ddpm here"):
        checkpoint.claim(tmp_path, {"options": {"lr": 0.5, "schedule": "ddpm"}}, classes=[Options])


def test_a_run_folder_that_could_not_be_read_again_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not UTF-8"):
        checkpoint.claim(tmp_path / "caf\udce9", {"lr": 1})
    assert not list(tmp_path.iterdir())
