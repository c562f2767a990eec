"""One launch over all layers, in Triton's interpreter and in the emulator: against torch's AdamW and the definition.

Moments and weights are compared as in the rest of the suite; the masks of the weights that come out, the masked copies,
bits and checksums exactly.
"""

import itertools
import re

import pytest
import torch

from emulator.errors import EmulatorError
from emulator.launch import run
from emulator.sass import Build, compile_offline
from sparsedm.errors import InputError
from sparsedm.kernels import masked_adamw
from sparsedm.kernels.launch import broken
from sparsedm.kernels.mask import Selection
from sparsedm.kernels.masked_adamw import Rates, Work, launch, masked_adamw_ref, new_selection
from sparsedm.kernels.pattern import Pattern, group_view, pack_bits, select_mask_ref, ungroup
from tests.tolerance import assert_as_good_as_torch

LINEAR, CONV = [(20, 64), (3, 32), (14, 96)], [(3, 8, 3, 3), (5, 16, 1, 1), (4, 48), (2, 32, 2, 2)]
RATES = [
    Rates(1e-2, (0.9, 0.999), 1e-8, 0.03, 0.1, 1),
    Rates(1e-3, (0.3, 0.99), 1e-6, 0.0, 0.2, 7),
    Rates(3e-4, (0.99, 0.99), 1e-8, 0.1, 0.5, 1000),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """`serves` asks: in the interpreter the kernel takes weights on the CPU."""
    monkeypatch.setattr(masked_adamw, "uses_triton", lambda *tensors: True)
    yield
    assert not broken, "torch did what the kernel should do"


def weights(shapes, dtype=torch.float32):
    """With ties and negative zeros among them; the last one, if it is a convolution, in channels_last."""
    found = [torch.randn(shape).to(dtype) for shape in shapes]
    for weight in found:
        weight.view(-1)[::7] = -0.0
        weight.view(-1)[1::7] = 0.5
    found[-1] = found[-1].to(memory_format=torch.channels_last) if found[-1].dim() == 4 else found[-1]
    return found


def moments(weight, dtype=torch.float32):
    like = lambda t: torch.empty_like(weight, dtype=dtype).copy_(t)  # noqa: E731
    return like(torch.randn(weight.shape)), like(torch.randn(weight.shape)), like(torch.rand(weight.shape))


def steps(shapes, pattern="2:4", target=torch.float16, mask=False, decay=True):
    """target: the interpreter cuts instead of rounding to bf16."""
    works = []
    for weight, rates in zip(weights(shapes), itertools.cycle(RATES)):
        rates = rates if decay else rates._replace(decay=0.0)
        selection = new_selection(weight, target, mask)
        works.append(Work(weight, Pattern.parse(pattern), selection, moments(weight), rates))
    return works


def poison(works):
    """A copy whose outputs hold what no kernel writes by chance."""
    for work in works:
        for tensor in work.selection or ():
            if tensor is not None:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
    return works


def copied(work, dtype):
    """The work in another precision, for the reference."""
    g, first, second = (t.clone().to(dtype) for t in work.moments)
    return work._replace(weight=work.weight.clone().to(dtype), moments=(g, first, second))


def check_selection(work):
    """Exactly, of the weight as it is now."""
    weight, selection = work.weight, work.selection
    rows = select_mask_ref(group_view(weight), work.pattern)
    mask = ungroup(rows, weight.shape)
    assert torch.equal(selection.masked, torch.where(mask, weight, 0).to(selection.masked.dtype))
    assert torch.equal(selection.bits, pack_bits(rows))
    assert selection.mask is None or torch.equal(selection.mask, mask)


def check_step(work, before):
    """before: the work as it was."""
    high, low = copied(before, torch.float64), copied(before, torch.float32)
    for reference in (high, low):
        masked_adamw_ref(reference, torch.bfloat16)
    found = (work.weight, *work.moments[1:])
    for out, exact, torchs in zip(found, (high[0], *high[3][1:]), (low[0], *low[3][1:])):
        assert_as_good_as_torch(out, exact, torchs)
    if work.selection:
        check_selection(work)


def before_and_after(works):
    before = [copied(work, torch.float32) for work in works]
    return before, launch(poison(works))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("shapes", "pattern"), [(LINEAR, "2:4"), (CONV, "2:4"), (LINEAR, "5:8"), (CONV, "1:2")])
def test_one_launch_steps_and_selects_for_all_layers(shapes, pattern, mask):
    works = steps(shapes, pattern, mask=mask)
    before, totals = before_and_after(works)
    for work, old in zip(works, before):
        check_step(work, old)
    assert len(masked_adamw.kinds(works)) == (1 if shapes is LINEAR else 2)
    again = launch([Work(work.weight, work.pattern) for work in works])
    assert torch.equal(again[0], totals[1]), "the checksum of what was written"
    assert torch.equal(launch([Work(work.weight, work.pattern) for work in before])[0], totals[0])
    assert not torch.equal(totals[0], totals[1])
    assert not totals[2].count_nonzero()


def test_a_step_without_decay_or_selection_is_torchs():
    works = [work._replace(selection=None) for work in steps(LINEAR, decay=False)]
    before, _ = before_and_after(works)
    for work, old in zip(works, before):
        check_step(work, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_launch_selects_for_all_layers_what_each_alone_selects(dtype):
    found = weights([*LINEAR, *CONV], dtype)
    works = [Work(w, Pattern(2, 4), new_selection(w, torch.float16, True)) for w in found]
    launch(poison(works))
    for work in works:
        check_selection(work)


def test_layers_of_different_kinds_take_a_launch_each():
    works = steps(LINEAR) + steps(LINEAR, "1:4") + steps(LINEAR, decay=False) + steps(CONV, target=torch.float32)
    assert [len(members) for members in masked_adamw.kinds(works).values()] == [3, 3, 3, 3, 1]
    before, _ = before_and_after(works)
    for work, old in zip(works, before):
        check_step(work, old)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.neg_(),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w.copy_(w.flip(1)),
        lambda w: w[0, :2].copy_(w[0, :2].flip(0)),
        lambda w: w[1, 3].mul_(1 + 1e-6),
        lambda w: w[0, :2].neg_(),
    ],
    ids=["signs", "rows", "columns", "two exchanged", "the last bit of one", "two signs"],
)
@pytest.mark.parametrize("shape", [(8, 64), (8, 48), (8, 8, 3, 3)], ids=str)
def test_a_changed_weight_has_another_checksum(change, shape):
    weight = torch.randn(shape)
    other, third = weight.clone(), weight.clone()
    change(other)
    sums = launch([Work(w, Pattern(2, 4)) for w in (weight, other, third)])[0]
    assert sums[0] == sums[2] != sums[1]


def test_nan_is_counted_where_it_is():
    found = weights([(4, 64), (4, 48), (4, 64)])
    found[1][2, 5] = float("nan")
    totals = launch([Work(w, Pattern(2, 4), new_selection(w, torch.bfloat16, False)) for w in found])
    assert totals[2].tolist() == [0, 1, 0]


def test_a_tensor_that_is_not_aligned_is_served_too():
    wide = torch.randn(1 + 8 * 64)
    weight = wide[1:].view(8, 64)
    work = Work(weight, Pattern(2, 4), new_selection(weight, torch.float16, True))
    aligned = work._replace(weight=weight.clone())
    sums = launch(poison([work, aligned]))
    check_selection(work)
    assert sums[0, 0] == sums[0, 1], "the checksum does not depend on the way"


@pytest.mark.parametrize(
    "wrong",
    [lambda t: t.bfloat16(), lambda t: t.to("meta"), lambda t: t[:-1], lambda t: t.t().contiguous().t()],
    ids=["dtype", "device", "shape", "order"],
)
@pytest.mark.parametrize("which", range(3))
def test_moments_that_the_kernel_would_misread_are_refused(which, wrong):
    (work,) = steps(LINEAR[:1])
    before, given = work.weight.clone(), list(work.moments)
    given[which] = wrong(given[which])
    with pytest.raises(InputError, match="gradient and moments must be float32, in place and order as the weight, not"):
        launch([work._replace(moments=tuple(given))])
    assert torch.equal(work.weight, before)


def test_where_the_kernel_does_not_compile_torch_does_the_same_to_the_bit_of_a_checksum(monkeypatch, caplog):
    works = steps(LINEAR, mask=True) + steps(CONV, "1:2") + [w._replace(selection=None) for w in steps(CONV)]
    chosen = [Work(w, Pattern(2, 4), new_selection(w, torch.float16, True)) for w in weights(CONV, torch.float16)]
    chosen[1].weight[2, 5] = float("nan")
    checks = [Work(work.weight, work.pattern) for work in works + chosen]
    sums = launch(checks)[0]
    nan = launch(chosen)[2]

    def fails(step):
        raise RuntimeError("no such instruction")

    with monkeypatch.context() as patch:
        patch.setattr(masked_adamw.Launch, "start", fails)
        before, totals = before_and_after(works)
        assert torch.equal(launch(poison(chosen))[2], nan)
        assert not masked_adamw.serves(works[0].weight)
        assert torch.equal(launch(checks)[0, len(works) :], sums[len(works) :])
    assert "no such instruction" in broken.pop((*masked_adamw.NAME, torch.device("cpu")))
    assert caplog.text.count("no such instruction") == 1
    for work, old in zip(works, before):
        check_step(work, old)
    check_selection(chosen[0])
    assert torch.equal(totals[0], sums[: len(works)])
    assert torch.equal(totals[1], launch(checks)[0, : len(works)])


# ---- compiled --------------------------------------------------------------------------------------------------------

NAMES = {"fp32": "tl.float32", "bf16": "tl.bfloat16", "fp16": "tl.float16"}
TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def build(step, capability=90):
    """What Triton's launcher would compile."""
    signature, divisible = {}, []
    for name, value in step.arguments.items():
        pointer = isinstance(value, torch.Tensor | list)
        signature[name] = "*i64" if isinstance(value, list) else TYPES[value.dtype] if pointer else "i32"
        if pointer:
            divisible.append(name)
    constants = {k: NAMES.get(getattr(v, "name", None), v) for k, v in step.constants.items()}
    name = f"{masked_adamw.__name__}:{step.kernel.fn.__name__}"
    return Build(name, signature, constants, {"num_warps": step.num_warps}, tuple(divisible), capability)


CASES = {
    "step": lambda: steps(LINEAR, target=torch.bfloat16),
    "step-strided": lambda: steps([(3, 8, 3, 3), (70, 48)], mask=True, target=torch.bfloat16),
    "step-without-selection": lambda: [w._replace(selection=None) for w in steps(LINEAR, decay=False)],
    "select": lambda: [w._replace(moments=None, rates=None) for w in steps(LINEAR, mask=True)],
    "checksum": lambda: [Work(w, Pattern(2, 4)) for w in weights(LINEAR)],
}


def only_plan(works):
    (kind,) = masked_adamw.kinds(works)
    return masked_adamw.plan(kind, works)


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_adamw, "uses_triton", lambda *tensors: True)
        builds = {(name, at): build(only_plan(make()), at) for name, make in CASES.items() for at in (90, 80)}
    return dict(zip(builds, zip(builds.values(), compile_offline(list(builds.values())))))


def emulate(build, ptx, name):
    """The works of a case and the sums that its programs leave, once everything is known to be right."""
    works = poison(CASES[name]())
    before = [copied(work, torch.float32) if work.moments else work for work in works]
    step = only_plan(works)
    partials = step.arguments["partials_ptr"].fill_(-(2**40))
    run(build, ptx, step.arguments, step.grid)
    for work, old in zip(works, before):
        if work.moments:
            check_step(work, old)
        elif work.selection:
            check_selection(work)
    sums = [launch([Work(w.weight, w.pattern) for w in some])[0].sum() for some in (before, works)]
    assert partials[0].sum() == sums[0]
    assert not works[0].moments or partials[1].sum() == sums[1]
    assert not works[0].selection or not partials[2].any()


@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel_is_right_in_the_emulator(compiled, name):
    build, built = compiled[name, 90]
    emulate(build, built.ptx, name)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_sass(compiled, name, capability):
    _, built = compiled[name, capability]
    assert built.spills == built.count("LDL") == built.count("STL") == 0
    if "strided" not in name:  # 128 bits at once, and no more bytes than the docstring says
        loads, stores = {"select": (1, 0), "checksum": (1, 0)}.get(name, (4, 3))
        per_thread = masked_adamw.BLOCK // (32 * masked_adamw.WARPS) // 4
        assert built.count("LDG.E.128") == loads * per_thread
        assert built.count("STG.E.128") == stores * per_thread
        assert built.count("LDS.128") == built.count("STS.128") == 0, "no exchange of layouts"


FAULTS = {  # what is planted into the PTX: (pattern, in its place, the case that notices it)
    "another layer": (r"setp\.le\.s32", "setp.lt.s32", "step"),
    "no square root": (r"sqrt\.approx(\.ftz)?\.f32", "mov.b32", "step"),
    "bits of other lanes": (r"shl\.b32", "shr.b32", "select"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_noticed(compiled, fault):
    pattern, instead, name = FAULTS[fault]
    build, built = compiled[name, 90]
    faulty = re.sub(pattern, instead, built.ptx)
    assert faulty != built.ptx, "the fault was not planted"
    with pytest.raises((EmulatorError, AssertionError)):
        emulate(build, faulty, name)


@pytest.mark.gpu
@pytest.mark.parametrize("shapes", [LINEAR, CONV, [(1152, 4608), (4608, 1152)]], ids=str)
def test_on_a_gpu_as_on_the_cpu(shapes):
    works = poison(steps(shapes, target=torch.bfloat16, mask=True))
    before = [copied(work, torch.float32) for work in works]
    there = []
    for weight, pattern, selection, moments, rates in works:
        selection = Selection(*(t if t is None else t.cuda() for t in selection))
        there.append(Work(weight.cuda(), pattern, selection, tuple(t.cuda() for t in moments), rates))
    totals = launch(there)
    for here, found, old in zip(works, there, before):
        for mine, theirs in zip((here[0], *here[2][:3], *here[3]), (found[0], *found[2][:3], *found[3])):
            mine.copy_(theirs)
        check_step(here, old)
    assert torch.equal(launch([Work(w.weight, w.pattern) for w in there])[0], totals[1])
