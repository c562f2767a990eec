"""What one step computes: against the loop written out, and what the student and its teacher are given."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparsedm import diffusion
from sparsedm.diffusion import DDPMSchedule
from sparsedm.kernels import mask as choose
from sparsedm.kernels import masked_matmul
from sparsedm.models import build_model
from sparsedm.train import step
from sparsedm.train.data import batch, batch_indices
from tests.tiny import OPTIONS, same_state, tiny, tiny_images
from tests.train.test_loop import IMAGES, SCHEDULE, masked, run


@pytest.mark.parametrize(
    ("amp", "flip", "clip", "kind", "betas", "weighting", "w_noise"),
    [
        ("bf16", True, 0.3, torch.optim.AdamW, (0.99, 0.999), "noise", 1.0),
        (None, False, 0.0, torch.optim.Adam, (0.8, 0.9), "velocity", 0.5),
    ],
)
def test_is_the_plain_loop(tmp_path, amp, flip, clip, kind, betas, weighting, w_noise):
    """Against the loop written out: warm-up, clipping, dropped labels, transfer, weight decay, EMA and its warm-up."""
    options = replace(OPTIONS, clip=clip, amp=amp, flip=flip, betas=betas, weighting=weighting)
    options = replace(options, optimizer=kind.__name__.lower())
    model, teacher = masked(), tiny(5).eval()
    average, expected = copy.deepcopy(model), copy.deepcopy(model).train()
    optimizer = kind(expected.parameters(), betas=betas, weight_decay=0.03, fused=True)
    weights = {"teacher": teacher, "w_kd": 0.1, "w_noise": w_noise}
    for number in range(12):
        generator = torch.Generator().manual_seed(step._seed(3, number, "data, times, noise"))
        torch.manual_seed(step._seed(3, number, "dropout"))
        x, y = batch(IMAGES, batch_indices(40, 8, number, 3), flip_generator=generator if flip else None)
        y = torch.where(torch.rand(8, generator=generator) < 0.1, 3, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            terms = diffusion.loss(expected, x, SCHEDULE, y=y, generator=generator, weighting=weighting, **weights)
        optimizer.zero_grad()
        terms.total.backward()
        if clip:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (number + 1) / 4)
        optimizer.step()
        decay = min(0.9, (1 + number) / (10 + number))
        get_ema_multi_avg_fn(decay)(list(average.parameters()), list(expected.parameters()), None)
        for name in ("running_mean", "running_var"):
            getattr(average.norm, name).lerp_(getattr(expected.norm, name), 1 - decay)
    average.norm.num_batches_tracked.copy_(expected.norm.num_batches_tracked)

    result = run(tmp_path, options, model, **weights)
    assert result.model is model
    assert same_state(model.state_dict(), expected.state_dict())
    assert same_state(result.ema.state_dict(), average.state_dict())


def alone(model, images, schedule=SCHEDULE, **options):
    """A Step outside of any run."""
    student = step.Student(model).to("cpu")
    return step.Step(student, images, step.Loss(schedule), replace(OPTIONS, **options), torch.device("cpu"))


def slimmable_step(same, accumulate=1, passes=3):
    torch.manual_seed(0)
    shape = {"multipliers": (1, 1), "attention": (), "passes": passes, "same_images": same}
    model = build_model("slimmable-tiny", image_size=4, channels=2, **shape)
    return alone(model, tiny_images(12, labels=False), batch_size=6, clip=0.0, flip=False, accumulate=accumulate)


@pytest.mark.parametrize("same", [True, False])
def test_a_slimmable_network_sees_the_same_images_at_every_width_if_asked(same):
    """DDSM's sandwich rule as released: three passes of one batch, times and noise of their own, losses summed."""
    made, seen = slimmable_step(same), []
    model, images = made.model, made.images
    model._run = functools.partial(
        lambda run, k, *inputs: seen.append((k, len(inputs[0]))) or run(k, *inputs), model._run
    )
    made(0, 0.0, 0.9)
    middle = seen[2][0]
    assert seen == [(8, 6 if same else 2), (2, 6 if same else 2), (middle, 6 if same else 2)]
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    generator = torch.Generator().manual_seed(step._seed(3, 0, "data, times, noise"))
    x, _ = batch(images, batch_indices(12, 6, 0, 3))
    count = 18 if same else 6
    t = SCHEDULE.training_time(torch.rand(count, generator=generator))
    noise = torch.randn(count, *x.shape[1:], generator=generator)
    x = torch.cat([x] * 3) if same else x
    noisy = diffusion.diffuse(x, t, noise, SCHEDULE), SCHEDULE.model_time(t)
    model.zero_grad()
    for k, part in zip((8, 2, middle), torch.arange(count).chunk(3)):
        with model.eval().at_width(k):
            errors = (model(noisy[0][part], noisy[1][part]) - noise[part]).square().mean()
        (errors if same else errors / 3).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_same_images_at_every_width_in_parts_are_the_whole_batch():
    """Each part is shown to all widths, with the times and the noise that its images have in the whole batch."""
    gradients = []
    for accumulate in (1, 3):
        made, seen = slimmable_step(True, accumulate, passes=2), []
        run = made.model._run
        made.model._run = lambda k, *inputs, run=run, seen=seen: seen.append((k, len(inputs[0]))) or run(k, *inputs)
        made(0, 0.0, 0.9)
        assert seen == [(8, 6 // accumulate), (2, 6 // accumulate)] * accumulate
        gradients.append([parameter.grad for parameter in made.parameters if parameter.grad is not None])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_both_branches_of_guidance_are_supervised(tmp_path):
    """The student is held to the teacher with the image's label and, now and then, with the null label, both."""
    seen = {"student": [], "teacher": []}
    student, teacher = masked(), tiny(5)
    for network, calls in ((student, seen["student"]), (teacher, seen["teacher"])):
        network.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append((module.training, inputs)))
    run(tmp_path, replace(OPTIONS, label_dropout=0.25, steps=40), student, teacher=teacher, w_kd=1.0)
    inputs = [inputs for training, inputs in seen["student"] if training]
    targets = [inputs for _, inputs in seen["teacher"]]
    assert len(inputs) == len(targets) == 40
    assert all(torch.equal(a, b) for mine, theirs in zip(inputs, targets) for a, b in zip(mine, theirs, strict=True))
    null = torch.cat([y for _, _, y in inputs]) == student.config.num_classes
    error = (0.25 * 0.75 / len(null)) ** 0.5  # of the mean of 320 draws
    assert abs(null.float().mean().item() - 0.25) < 4 * error


@pytest.mark.parametrize("labels", ["none", "no null label"])
def test_labels_are_seen_only_where_the_network_has_them(tmp_path, labels):
    config = {"num_classes": 0} if labels == "none" else {"null_label": False}
    model, seen = masked(**config), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2] if len(args) > 2 else None))
    run(tmp_path, replace(OPTIONS, label_dropout=1), model, teacher=None, w_kd=0, validation=None)
    assert len(seen) == 12
    assert all(y is None if labels == "none" else y.max() < 3 for y in seen)


def test_every_part_of_a_batch_has_dropout_of_its_own():
    model, seeds = tiny(), []
    model.dropout.register_forward_hook(lambda *_: seeds.append(torch.initial_seed()))
    alone(model, IMAGES, accumulate=4)(0, 0.0, 0.9)
    assert len(seeds) == len(set(seeds)) == 4


def test_a_dit_trains_its_variance():
    shape = {"image_size": 4, "channels": 2, "dim": 24, "depth": 1, "heads": 3, "num_classes": 3}
    model = build_model("dit-tiny", learn_sigma=True, **shape)
    alone(model, IMAGES, DDPMSchedule())(0, 1e-2, 0.9)
    head = model.final_layer.linear.weight.unflatten(0, (-1, 4))  # pixels of a patch, channels; it begins at zero
    assert head[:, :2].any()
    assert head[:, 2:].any()


def test_discrete_schedule_trains(tmp_path):
    result = run(tmp_path, schedule=DDPMSchedule())
    assert math.isfinite(result.loss)


@pytest.mark.gpu
def test_step_waits_for_nothing_on_a_gpu(tmp_path):
    """Every synchronising call raises while the steps between two records run, masked layers by our operators."""
    original = step.Step.__call__

    def strict(self, *args):
        torch.cuda.set_sync_debug_mode("error" if args[0] > 1 else "default")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.Step, "__call__", strict)
        patch.setenv("SPARSEDM_AUTOTUNE", "off")
        patch.setattr(masked_matmul, "_is_best_in_torch", lambda *arguments: False)
        result = run(tmp_path, replace(OPTIONS, amp="bf16"), device="cuda")
    assert math.isfinite(result.loss)


class Reads(TorchDispatchMode):
    """Counts the operations that ask a device for a value, for which the host would wait."""

    waiting = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in self.waiting
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", [tiny, masked], ids=["dense", "2:4"])
def test_a_step_reads_no_value(tmp_path, monkeypatch, model):
    """Apart from what runs on CPUs only: masks chosen in torch, which looks for NaN, and the check of labels."""
    original, choose_in_torch, reads = step.Step.__call__, choose._select_in_torch, []
    monkeypatch.setattr(diffusion, "check_labels", lambda *a: None)

    def unseen(*args):
        with _disable_current_modes():
            return choose_in_torch(*args)

    monkeypatch.setattr(choose, "_select_in_torch", unseen)

    def watched(self, *args):
        with Reads() as seen:
            result = original(self, *args)
        reads.append(seen.count)
        return result

    monkeypatch.setattr(step.Step, "__call__", watched)
    run(tmp_path, replace(OPTIONS, amp="bf16", accumulate=2), model())
    assert reads == [0] * OPTIONS.steps


def test_no_two_seeds_share_a_stream():
    streams = {step._seed(seed, number, what) for seed in range(9) for number in range(99) for what in "ab"}
    assert len(streams) == 9 * 99 * 2


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_the_teacher_computes_no_gradients_and_in_bf16_under_autocast(tmp_path, amp):
    teacher, seen = tiny(5), set()
    teacher.second.register_forward_hook(lambda module, inputs, out: seen.add((out.dtype, torch.is_grad_enabled())))
    run(tmp_path, replace(OPTIONS, steps=2, amp=amp), teacher=teacher, w_kd=0.1)
    assert seen == {(torch.bfloat16 if amp else torch.float32, False)}


def test_the_student_and_its_teacher_are_both_compiled(tmp_path, monkeypatch):
    """And what is compiled is what runs."""
    ran = []

    def compile(network):
        return lambda *inputs: ran.append(network) or network(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    model, teacher = masked(), tiny(5)
    run(tmp_path, replace(OPTIONS, steps=2, compile=True), model, teacher=teacher, w_kd=0.1)
    assert ran == [model, teacher] * 2
    run(tmp_path / "eager", replace(OPTIONS, steps=2), masked(), teacher=teacher, w_kd=0.1)
    assert len(ran) == 4


def test_a_compiled_step_chooses_no_mask_inside_of_its_graphs(tmp_path, monkeypatch):
    """They are chosen before it, once, for all parts of the batch."""
    torch._dynamo.reset()
    chosen, outputs = [], choose._outputs
    monkeypatch.setattr(choose, "_outputs", lambda weight, *a: (chosen.append(weight), outputs(weight, *a))[1])
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = replace(OPTIONS, steps=3, batch_size=8, accumulate=2, compile=True, amp="bf16")
    run(tmp_path, options, masked(), teacher=masked(), w_kd=0.1)
    assert not chosen
