"""Checkpoints: safetensors and JSON, written so that a crash, kill or full disk leaves no half file.

A checkpoint, in its run folder:   checkpoints/step-00001000/model.safetensors  ema.safetensors  optimizer.safetensors
                                                             state.json
The networks in it are model files (`model_files.py`). `loop._Run` resumes from the newest checkpoint.
"""

import contextlib
import shutil
from pathlib import Path

import torch

from sparsedm.errors import InputError, TooLittleMemory
from sparsedm.files import atomic_folder
from sparsedm.kernels.cpu import rules
from sparsedm.model_files import check_digest, checkpoints, describe, read_state, write_model, write_state
from sparsedm.tensor_files import fill, read_tensors, write_tensors
from sparsedm.train.run_folder import identity

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of every optimizer that `step.py` offers


def save(folder, step, *, model, ema, optimizer, state, keep=2):
    """Write checkpoints/step-<step>/, then remove all but the last `keep`. Returns its path.

    state: dict of JSON values for state.json, which also holds the step, the model's description and versions.
    If a checkpoint of this step exists, it is not written again.
    Raises: InputError if it cannot be written. Older checkpoints are then unchanged.
    """
    path = Path(folder) / "checkpoints" / f"step-{step:08d}"
    if path.exists():
        return path
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value for parameter, slot in optimizer.state.items() for key, value in slot.items()
    }
    with atomic_folder(path) as partial:
        write_model(partial / "model.safetensors", model)
        write_model(partial / "ema.safetensors", ema)
        write_tensors(partial / "optimizer.safetensors", moments, {"tensors": str(len(moments))})
        versions = {"torch": torch.__version__}
        if all(parameter.device.type == "cpu" for parameter in names):  # else nothing of it runs, or is compiled
            versions |= cpu_kernels(bf16=True)
        about = {"model": describe(model), "versions": versions, "run": identity(folder)}
        write_state(partial, {"step": step, **state, **about})
    for old in checkpoints(folder)[:-keep]:
        hidden = old.with_name(f".{old.name}.partial")  # hidden at once, even if the removal is interrupted
        old.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return path


def cpu_kernels(bf16):
    """{name: what computes here on the CPU}, for state.json. bf16: with what matters in bf16 alone."""
    return {"cpu_kernels": rules.version()} | ({"cpu_bf16": ", ".join(rules.bf16_instructions() or ())} if bf16 else {})


def differing_kernels(state, bf16):
    """What the state.json of a checkpoint says of the CPU kernels, and what this process runs, in words; None if equal.

    Then a training on a CPU that goes on from it is right, and not bit for bit what it would have been.
    """
    versions, here = state.get("versions"), cpu_kernels(bf16)
    there = {
        name: versions.get(name, "not recorded") if isinstance(versions, dict) else "not recorded" for name in here
    }
    return None if there == here else f"{', '.join(there.values())} there, {', '.join(here.values())} here"


def load(path, model, ema):
    """Load the two networks of a checkpoint in place. Raises: InputError naming a file that is damaged or unfit."""
    with _or_the_one_before(path):
        state = read_state(path)
    _check_own(Path(path), state, describe(model))
    for name, network in (("model", model), ("ema", ema)):
        file = Path(path) / f"{name}.safetensors"
        with _or_the_one_before(path):
            tensors = read_tensors(file)[0]
            check_digest(file, state)
        fill(network, tensors, file)


def _check_own(path, state, here):
    """Raise InputError if a checkpoint is of another run or stage than its folder and the network, `describe`d."""
    own, there = identity(path.parents[1]), state.get("model")
    facts = {"number": (state.get("run"), own)}
    for fact in ("kind", "patterns") if isinstance(there, dict) else ():  # older ones may not say
        facts[fact] = there.get(fact, here[fact]), here[fact]
    for fact, (found, expected) in facts.items():
        if found != expected:
            advice = "move it back to its own folder, or choose another folder for this run"
            raise InputError(f"{path} is of another run or stage: its {fact} is {found}, not {expected}; {advice}")


def load_optimizer(path, model, optimizer):
    """Load the optimizer of a checkpoint in place. Returns the checkpoint's state (a dict with `step`).

    optimizer: over `model.parameters()`, in that order. Raises: InputError naming a file that is damaged or unfit.
    """
    file = Path(path) / "optimizer.safetensors"
    places = {name: (place, value) for place, (name, value) in enumerate(model.named_parameters())}
    slots = {}
    with _or_the_one_before(path):
        state, (moments, header) = read_state(path), read_tensors(file)
        if header.get("tensors", str(len(moments))) != str(len(moments)) or (not moments and state.get("updates")):
            raise InputError(f"{file} is damaged: it lacks tensors")
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            if name not in places:
                raise InputError(f"{file} does not fit the model, which has no parameter {name}")
            place, parameter = places[name]
            form = _form(parameter) if moment != "step" else "() float32"
            if _form(value) != form:
                raise InputError(f"{file} does not fit the model: {key} is {_form(value)}, not {form}")
            if moment != "step":  # in the order of the weight's memory, along which a fused optimizer walks
                value = torch.empty_like(parameter).copy_(value)
            slots.setdefault(place, {})[moment] = value
        if any(slot.keys() != set(MOMENTS) for slot in slots.values()):
            raise InputError(f"{file} is damaged: not every parameter has the same moments, {', '.join(MOMENTS)}")
        check_digest(file, state)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return state


def _form(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def _or_the_one_before(path):
    """Add to the error of a damaged checkpoint how to continue from an older one. The user decides: it repeats work."""
    try:
        yield
    except TooLittleMemory:
        raise
    except InputError as error:
        older = [other for other in checkpoints(Path(path).parents[1]) if other.name < Path(path).name]
        if not older:
            raise
        raise InputError(f"{error}; to continue from {older[-1].name} instead, delete {path}") from error
