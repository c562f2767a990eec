import contextlib
import copy
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsedm import diffusion
from sparsedm.diffusion import VPSDE
from sparsedm.errors import InputError
from sparsedm.kernels.cpu import rules
from sparsedm.kernels.pattern import Pattern, select_mask_ref
from sparsedm.model_files import read_state, write_state
from sparsedm.sparsity import masked_layers, masks, set_masking, sparsify
from sparsedm.train import loop, run_folder, step
from sparsedm.train.data import batch, batch_indices
from sparsedm.train.loop import Interrupted, OutOfTime, TrainOptions, amp_of, train
from sparsedm.train.metrics import TrainingDiverged, read_metrics
from sparsedm.train.step import Loss, Student
from tests.tiny import OPTIONS, same_state, tiny, tiny_images

pytestmark = pytest.mark.usefixtures("python_signals")
IMAGES, HELD_OUT, SCHEDULE = tiny_images(), tiny_images(16, seed=1), VPSDE()
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def masked(seed=0, **config):
    model = sparsify(tiny(seed, **config), "2:4")
    set_masking(model, decay=2e-4)
    return model


def run(folder, options=OPTIONS, model=None, **settings):
    """`train` with a teacher; settings: also the fields of Student and Loss, by name."""
    if "teacher" not in settings:
        settings |= {"teacher": tiny(5), "w_kd": 0.1} | settings
    settings = {"schedule": SCHEDULE, "w_kd": 0.1, "validation": HELD_OUT, **settings}
    student = Student(model or masked(), settings.pop("ema", None))
    loss = Loss(settings.pop("schedule"), settings.pop("teacher"), settings.pop("w_kd"), settings.pop("w_noise", 1.0))
    images = settings.pop("images", IMAGES)
    return train(student, images, loss, options, folder, **{"progress": False, **settings})


def final_bits(folder, step=12):
    return [(Path(folder) / "checkpoints" / f"step-{step:08d}" / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def at_position(monkeypatch, position, action):
    """Let `action` happen in the middle of the step that draws the batch of this position."""

    def spied(count, size, number, seed):
        if number == position:
            action()
        return batch_indices(count, size, number, seed)

    monkeypatch.setattr(step, "batch_indices", spied)


# ---- what a step does ------------------------------------------------------------------------------------------------


def test_masks_follow_the_weights(unbroken):
    folder, result = unbroken
    for network in (result.model, result.ema):
        for name, mask in masks(network).items():
            assert torch.equal(mask, select_mask_ref(network.get_submodule(name).weight, Pattern(2, 4)))
    assert all(record["flip_rate"] > 0 and record["density"] == 0.5 for record in read_metrics(folder))


def test_records(unbroken):
    folder, result = unbroken
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10, 12]  # logged, saved and validated steps
    assert [record["lr"] for record in records] == [0.0075, 0.01, 0.01, 0.01, 0.01, 0.01]
    assert [record["step"] for record in records if "validation_loss" in record] == [6, 12]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert all(record["transfer_loss"] > 0 and record["gradient_norm"] > 0 for record in records)
    last = records[-1]
    assert (result.step, result.loss, result.validation_loss) == (12, last["loss"], last["validation_loss"])
    assert result.images_per_second == 12 * 8 / last["seconds"]


def test_validation_is_of_the_average(unbroken):
    _, result = unbroken
    x, y = batch(HELD_OUT, torch.arange(16))
    assert result.validation_loss == diffusion.validation_loss(result.ema, x, SCHEDULE, y=y).item()


def test_leaves_the_teacher_the_start_and_the_global_generator_alone(tmp_path):
    model, teacher, start = masked(), tiny(5), masked(6)
    before, start_before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(start.state_dict())
    random_state = torch.random.get_rng_state()
    result = run(tmp_path, model=model, ema=start, teacher=teacher, w_kd=1)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert same_state(teacher.state_dict(), before)
    assert same_state(start.state_dict(), start_before)
    assert not teacher.training
    assert not result.ema.training
    assert all(parameter.grad is None for parameter in [*teacher.parameters(), *result.ema.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_refused(tmp_path, dtype):
    """They trained, and their average stood still: a thousandth of a step is less than half of their last bit."""
    with pytest.raises(InputError, match=r"float16 weights lose the small steps .* train model\.float\(\)"):
        run(tmp_path, model=masked().to(dtype))
    assert not list(tmp_path.glob("*/*"))


def test_seeds_and_first_step_choose_the_stream(tmp_path):
    positions = [run(tmp_path / str(i), first_step=i * 12).loss for i in range(2)]
    seeds = [run(tmp_path / f"s{seed}", replace(OPTIONS, seed=seed)).loss for seed in (3, 4)]
    assert positions[0] == seeds[0]
    assert len({*positions, *seeds}) == 3


def test_average_starts_from_the_one_given(tmp_path):
    start = sparsify(tiny(6), "2:4")
    result = run(tmp_path, replace(OPTIONS, steps=1, ema_warmup=1), ema=start)  # no warm-up: 0.9 of it is left
    parameters = zip(result.ema.parameters(), start.parameters(), result.model.parameters())
    assert all(torch.equal(average, torch.lerp(old, new, 1 - 0.9)) for average, old, new in parameters)


def test_zero_steps_keep_the_networks_as_they_came(tmp_path):
    model, average = masked(), masked(1)
    expected = copy.deepcopy(model.state_dict())
    result = run(tmp_path, replace(OPTIONS, steps=0), model, ema=average)
    assert result.checkpoint.name == "step-00000000"
    assert same_state(result.model.state_dict(), expected)
    assert same_state(result.ema.state_dict(), average.state_dict())
    assert (result.step, result.loss, result.seconds, result.images_per_second) == (0, None, 0, None)
    assert result.validation_loss == run(tmp_path, replace(OPTIONS, steps=0), masked(2)).validation_loss


@pytest.mark.slow
def test_compiled_training_resumes_too(tmp_path):
    options = replace(OPTIONS, compile=True)
    run(tmp_path / "unbroken", options)
    assert final_bits(tmp_path / "unbroken") != final_bits_of_a_stop(tmp_path / "eager", OPTIONS)
    assert final_bits(tmp_path / "unbroken") == final_bits_of_a_stop(tmp_path / "stopped", options)


def final_bits_of_a_stop(folder, options):
    with pytest.MonkeyPatch.context() as patch:
        at_position(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match="at step 7"):
            run(folder, options)
    run(folder, options)
    return final_bits(folder)


def test_the_optimizer_that_selects_masks_resumes_too(tmp_path):
    options = replace(OPTIONS, optimizer="masked-adamw", amp="bf16")
    model = run(tmp_path / "unbroken", options).model
    assert final_bits(tmp_path / "unbroken") == final_bits_of_a_stop(tmp_path / "stopped", options)
    with pytest.raises(InputError, match=r"options\.optimizer is masked-adamw there and adamw here"):
        run(tmp_path / "stopped", replace(options, optimizer="adamw"))
    assert not any(layer._is_decayed() for _, layer in masked_layers(model)), "the run is over"


# ---- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("position", [0, 6, 9, 11], ids=["first", "between saves", "at a save", "last"])
def test_stopped_and_resumed_is_unbroken(tmp_path, unbroken, monkeypatch, position, signum):
    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_position(patch, position, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted, match=f"stopped at step {position + 1} and saved"):
            run(tmp_path)
    assert signal.getsignal(signum) is handler
    assert run_folder.latest(tmp_path).name == f"step-{position + 1:08d}"

    result = run(tmp_path, model=masked(9))  # whatever network it is given: the weights come from the folder
    assert final_bits(tmp_path) == final_bits(unbroken[0])
    assert same_state(result.ema.state_dict(), unbroken[1].ema.state_dict())
    assert result.validation_loss == unbroken[1].validation_loss
    steps = [record["step"] for record in read_metrics(tmp_path)]
    assert steps == sorted({3, 5, 6, 9, 10, 12, position + 1})


@pytest.mark.parametrize("position", [0, 2, 6, 11], ids=["first", "before a record", "between records", "last"])
def test_out_of_time_and_resumed_is_unbroken(tmp_path, unbroken, monkeypatch, position):
    """The deadline passes in the step of this position, which is the last one, however far the next record is."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with monkeypatch.context() as patch:
        at_position(patch, position, lambda: now.append(now.pop(0) + 10))
        step = position + 1
        with contextlib.nullcontext() if step == 12 else pytest.raises(OutOfTime, match=f"after step {step}, "):
            run(tmp_path, deadline=10)
    assert run_folder.latest(tmp_path).name == f"step-{step:08d}"
    if step < 12:
        with pytest.raises(OutOfTime, match=f"before step {step + 1} in") as caught:
            run(tmp_path, deadline=10)
        assert caught.value.exit_code == 3
    result = run(tmp_path, model=masked(9), deadline=11 if step < 12 else 10)  # what is finished costs no time
    assert final_bits(tmp_path) == final_bits(unbroken[0])
    assert result.validation_loss == unbroken[1].validation_loss
    mine, whole = ({r["step"]: r for r in read_metrics(folder)} for folder in (tmp_path, unbroken[0]))
    assert list(mine) == sorted({*whole, step})
    means = ("loss", "noise_loss", "transfer_loss", "gradient_norm", "flip_rate", "flip_rates")
    cut = min(other for other in whole if other >= step)  # the record whose means are of the steps since the stop
    for number, record in whole.items():
        left_out = ("seconds", "images_per_second", *(means if number == cut != step else ()))
        pairs = [(mine[number][name], value) for name, value in record.items() if name not in left_out]
        assert all(ours == theirs for ours, theirs in pairs)


def test_interruption_says_how_to_exit(tmp_path, monkeypatch):
    at_position(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="run the same command again") as caught:
        run(tmp_path)
    assert (caught.value.exit_code, caught.value.step, caught.value.folder) == (143, 3, tmp_path)


def test_a_validation_loss_that_is_not_finite_is_a_divergence(tmp_path):
    """The update after the last finite loss broke the weights, and this step is validated."""
    options = replace(OPTIONS, warmup=0, lr=1e25, validate_every=1)
    with pytest.raises(TrainingDiverged, match=r"at step 1 \(validation loss (nan|inf)\)"):
        run(tmp_path, options, model=tiny())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], "diverged" in record) for record in records] == [(1, True)]
    assert run_folder.latest(tmp_path) is None


def test_second_interrupt_acts_at_once(tmp_path, monkeypatch, unbroken):
    at_position(monkeypatch, 7, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert run_folder.latest(tmp_path).name == "step-00000005"
    monkeypatch.undo()
    run(tmp_path)
    assert final_bits(tmp_path) == final_bits(unbroken[0])


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a process that a shell started in the background
    at_position(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(tmp_path).step == 12
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_trains_outside_the_main_thread(tmp_path, unbroken):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert final_bits(tmp_path) == final_bits(unbroken[0])


def test_finished_run_is_loaded_and_not_repeated(tmp_path, monkeypatch):
    first = run(tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr(step, "batch_indices", None)
    again = run(tmp_path, model=masked(9))
    assert same_state(again.model.state_dict(), first.model.state_dict())
    assert (again.loss, again.seconds, again.checkpoint) == (first.loss, first.seconds, first.checkpoint)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == files


# In a process with one thread, forked for each kill, so that one import of torch serves them all. The n-th time Python
# touches a file, the run is killed; then the folder must be readable, and the same command must end as if unbroken.
KILLS = """
import os, signal, sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from tests.train.test_loop import OPTIONS, final_bits, masked, run
from sparsedm.train import checkpoint, run_folder

base, first, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
options = replace(OPTIONS, steps=6, save_every=2)
run(base / "unbroken", options)
TOUCHES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir"}

def trial(n):
    count, folder = 0, str(base / str(n))
    def hook(event, args):
        nonlocal count
        if event in TOUCHES and args and folder in str(args[0]):
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    run(folder, options)

n, killed = first, True
while killed:
    child = os.fork()
    if not child:
        trial(n)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    for path in (base / str(n)).glob("checkpoints/step-*"):
        checkpoint.load(path, masked(), masked())
    run(base / str(n), options)
    assert final_bits(base / str(n), 6) == final_bits(base / "unbroken", 6), n
    assert not list((base / str(n)).glob("checkpoints/.*")), n
    n += stride
print(n // stride)
"""


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_leaves_readable_checkpoints(tmp_path, stride):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "5", str(stride)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40 / stride  # otherwise the hook saw no files


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looks_each_step", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, poison, looks_each_step):
    class NaNGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.nan

    def spoil(*args, **settings):
        calls.append(args)
        terms = whole_loss(*args, **settings)
        if len(calls) < 7:
            return terms
        return terms._replace(total=terms.total * math.nan if poison == "loss" else NaNGradient.apply(terms.total))

    def log(*args):
        made = whole_log(*args)
        made.looks_each_step = looks_each_step
        return made

    calls, whole_loss, whole_log = [], diffusion.loss, loop.MetricsLog
    monkeypatch.setattr(diffusion, "loss", spoil)
    monkeypatch.setattr(loop, "MetricsLog", log)
    with pytest.raises(TrainingDiverged, match=r"diverged (at step 7|in the \d steps up to 7).*step-00000005"):
        run(tmp_path)
    assert run_folder.latest(tmp_path).name == "step-00000005"
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 7
    assert "nan" in last["diverged"]

    monkeypatch.undo()
    assert run(tmp_path).step == 12
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 5, 6, 9, 10, 12]


def test_full_disk_keeps_the_last_checkpoint(tmp_path, unbroken, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_position(monkeypatch, 7, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, limits[1])))
    try:
        with pytest.raises(InputError, match=r"cannot write .*step-00000010: .*File too large"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    run(tmp_path)
    assert final_bits(tmp_path) == final_bits(unbroken[0])


def test_other_options_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match=r"other options.*options.lr is 0.01 there and 0.5 here"):
        run(tmp_path, replace(OPTIONS, lr=0.5))
    with pytest.raises(
        InputError, match=r"model.patterns.second is 2:4 there and 3:4 here; w_kd is 0.1 there and 1 here"
    ):
        run(tmp_path, model=sparsify(tiny(), "3:4"), w_kd=1)
    with pytest.raises(InputError, match="data is not set there and cats here"):
        run(tmp_path, record={"data": "cats"})
    run(tmp_path, replace(OPTIONS, log_every=1, save_every=1, validate_every=1))  # these change no weight


def test_a_finished_run_goes_on_where_its_length_changes_nothing(tmp_path, unbroken):
    """And ends as if it had been that long from the start."""
    run(tmp_path, replace(OPTIONS, steps=7))
    run(tmp_path)
    assert final_bits(tmp_path) == final_bits(unbroken[0])
    with pytest.raises(InputError, match=r"options.steps is 12 there and 9 here"):
        run(tmp_path, replace(OPTIONS, steps=9))
    for options, reason in (
        (replace(OPTIONS, cosine=True), "fallen to zero"),
        (replace(OPTIONS, warmup=None), "warm-up"),
    ):
        folder = tmp_path / reason
        run(folder, replace(options, steps=3))
        with pytest.raises(InputError, match=f"options.steps is 3 there and 5 here: .*{reason}"):
            run(folder, replace(options, steps=5))


def test_a_run_that_goes_on_with_other_cpu_kernels_says_so(tmp_path, unbroken, caplog):
    shutil.copytree(unbroken[0], tmp_path / "run")
    run(tmp_path / "run")
    assert "kernels" not in caplog.text
    saved = run_folder.latest(tmp_path / "run")
    state = read_state(saved)
    assert state["versions"]["cpu_kernels"] == rules.version()
    write_state(saved, state | {"versions": {"cpu_kernels": "rules 0, avx1024"}})
    run(tmp_path / "run")
    (record,) = [record for record in caplog.records if "kernels" in record.message]
    assert f"rules 0, avx1024 there, {rules.version()} here" in record.message


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_other_instructions_for_bf16_matter_in_bf16_alone(tmp_path, monkeypatch, caplog, amp):
    """They round otherwise: a run in bf16 that goes on without AMX is not bit for bit the same."""
    options = replace(OPTIONS, steps=1, amp=amp)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True}, raising=False)
    run(tmp_path, options)
    run(tmp_path, options)
    assert "kernels" not in caplog.text
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    run(tmp_path, options)
    assert (f"amx_bf16, avx512_bf16 there, {rules.version()}, avx512_bf16 here" in caplog.text) == (amp == "bf16")
    assert ("kernels" in caplog.text) == (amp == "bf16")


def test_a_state_without_its_numbers_is_refused(tmp_path):
    result = run(tmp_path, replace(OPTIONS, steps=1))
    whole = read_state(result.checkpoint)
    wrong = {"step": ["1", 1.0, True, None, 2, -1], "updates": [0, "1", 1.5, None], "seconds": [-1, "1", None]}
    states = [{**whole, name: value} for name, values in wrong.items() for value in values]
    for state in [*states, {**whole, "loss": "1"}, {**whole, "validation_loss": [1]}]:
        write_state(result.checkpoint, state)
        with pytest.raises(InputError, match=r"state\.json is damaged: it must hold step, updates, seconds"):
            run(tmp_path, replace(OPTIONS, steps=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1),
        ("batch_size", 0),
        ("lr", 0),
        ("lr", math.nan),
        ("betas", (0.9, 1)),
        ("weight_decay", -1),
        ("warmup", -1),
        ("ema", 1),
        ("ema_warmup", 0),
        ("clip", -1),
        ("label_dropout", 1.5),
        ("amp", "fp16"),
        ("log_every", 0),
        ("save_every", 0),
        ("validate_every", 0),
    ],
)
def test_refuses_options_out_of_range(name, value):
    with pytest.raises(InputError, match=f"training option {name}={value!r}".replace("(", r"\(").replace(")", r"\)")):
        TrainOptions(**{name: value})


@pytest.mark.parametrize(
    ("has", "warned"), [({"avx512_bf16": True}, False), ({"avx512_bf16": False}, True), ({}, False)]
)
def test_a_cpu_without_instructions_for_bf16_is_said_to_be_slower_by_it(has, warned, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [amp_of(cpu), amp_of(gpu), amp_of(gpu, "off"), amp_of(gpu, "bf16")] == [None, "bf16", None, "bf16"]
    assert not caplog.messages
    assert amp_of(cpu, "bf16") == "bf16"
    assert bool(caplog.messages) == warned


def test_learning_rate_and_average():
    options = TrainOptions(steps=1000, lr=1.0)
    assert [options.lr_at(u, u) for u in (0, 49, 99, 100, 999)] == [0.01, 0.5, 1, 1, 1]  # a tenth of the run
    assert TrainOptions(lr=1.0).lr_at(1249, 1249) == 0.5  # at most 2500 steps
    assert replace(options, warmup=0).lr_at(0, 0) == 1
    cosine = replace(options, cosine=True)
    assert [cosine.lr_at(u, u) for u in (49, 99, 100, 550)] == [0.5, 1, 1, (1 + math.cos(math.pi / 2)) / 2]
    assert 0 < cosine.lr_at(999, 999) < 1e-5
    assert [cosine.lr_at(step, 1000 + step) for step in (0, 500)] == [1, (1 + math.cos(math.pi / 2)) / 2]  # taken over
    assert [options.ema_at(u) for u in (0, 8, 10**6)] == [0.1, 0.5, 0.9999]
    assert replace(options, ema_warmup=1).ema_at(0) == 0.9999


def test_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"labels 0\.\.2, but the images have no labels"):
        run(tmp_path, images=tiny_images(labels=False))
    with pytest.raises(InputError, match=r"labels 0\.\.1, but the images have labels up to 2"):
        run(tmp_path, model=masked(num_classes=2))
    with pytest.raises(InputError, match=r"images are \(2, 4, 4\), but the network takes \(2, 8, 8\)"):
        run(tmp_path, model=masked(image_size=8))
    assert not list(tmp_path.iterdir())


def test_one_folder_has_one_run(tmp_path):
    with run_folder.lock(tmp_path), pytest.raises(InputError, match="another process is at work in"):
        run(tmp_path)


def test_without_a_terminal_every_checkpoint_is_a_line_of_the_log(tmp_path, caplog):
    caplog.set_level("INFO", "sparsedm.train.loop")
    run(tmp_path / "seen", replace(OPTIONS, steps=4, save_every=2), progress=True)
    first, last = caplog.messages
    loss = read_metrics(tmp_path / "seen")[-1]["loss"]
    assert first.startswith("seen: step 2 of 4, loss ")
    assert last.startswith(f"seen: step 4 of 4, loss {loss:.4f}, images/s ")
    caplog.clear()
    run(tmp_path / "hidden", replace(OPTIONS, steps=4, save_every=2))
    assert not caplog.messages


def test_only_how_often_and_in_how_many_parts_may_change_at_a_resume(tmp_path):
    stored, accepted = {"options": asdict(OPTIONS)}, set()
    run_folder.claim(tmp_path, stored)
    for name in stored["options"]:
        with contextlib.suppress(InputError):
            run_folder.claim(tmp_path, {"options": stored["options"] | {name: 77}}, loop.MAY_CHANGE)
            accepted.add(name)
    assert accepted == {"accumulate", "log_every", "save_every", "validate_every"}
