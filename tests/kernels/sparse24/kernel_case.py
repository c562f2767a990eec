"""One sparse product or convolution, and one kernel on it: shared by the tests of the sparse tensor-core kernels.

A test file lists its `CASES` and, in `FAULTS`, what breaks them; its class inherits the tests from `KernelTests`.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from emulator.errors import EmulatorError
from emulator.launch import run
from emulator.memory import SHARED_BYTES
from emulator.sass import Build, compile_offline
from sparsedm.kernels.pattern import Pattern, group_view, select_mask_ref, ungroup
from sparsedm.kernels.sparse24.conv import _pair, _pixels
from sparsedm.kernels.sparse24.dispatch import BACKENDS
from sparsedm.kernels.sparse24.format import pack, unpack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack
from sparsedm.kernels.sparse24.linear import ACTIVATIONS, sparse24_linear_ref
from tests.tolerance import assert_as_good_as_torch

BF16 = torch.bfloat16
TYPES = {BF16: ("bf16", 16), torch.float16: ("fp16", 16), torch.float32: ("fp32", 32), torch.int32: ("i32", 32)}


def pruned(rows, columns, dtype=torch.bfloat16, drop=0.1):
    """A 2:4 weight, of which a part `drop` of the entries is zero besides: groups with fewer than two non-zeros."""
    weight = torch.randn(rows, columns) / columns**0.5
    keep = select_mask_ref(weight, Pattern(2, 4)) & (torch.rand(rows, columns) >= drop)
    return torch.where(keep, weight, 0).to(dtype)


class Problem:
    """M x N x K with the epilogue asked for. y is NaN until a kernel writes it.

    skip: columns of the second source; groups: rows of the scale; out: dtype of y; strided: the sources and the
    residual are columns of wider tensors.
    """

    def __init__(
        self, M, N, K, *, skip=0, groups=0, bias=False, activation=None, residual=False, dtype=torch.bfloat16, out=None,
        strided=False,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.values, self.metadata = pack(pruned(N, K + skip, dtype))
        rows = lambda columns: torch.randn(M, columns + 8 * strided).to(dtype)[:, :columns]  # noqa: E731
        self.x = rows(K)
        self.skip = rows(skip) if skip else None
        self.scale = torch.randn(groups, N).to(dtype) if groups else None
        self.bias = 4 * torch.randn(N).to(dtype) if bias else None  # reaches the tails of the activations
        self.residual = rows(N) if residual else None
        self.activation = activation
        self.y = torch.full((M, N), float("nan"), dtype=out or dtype)

    def tensors(self, layout):
        """x, the weight as the kernels take it, y: what `plan` and `launch` take by position."""
        prepacked = prepack(self.values, self.metadata, layout, 2 * self.values.shape[1])
        return self.x, *kernel_tensors(self.values, prepacked), self.y

    def options(self):
        names = ("bias", "activation", "residual", "skip", "scale")
        return {name: getattr(self, name) for name in names}

    def check(self):
        """The kernel has written every element of y, as well as torch's dense product would have: that in x's dtype,
        or for fp32 results that in fp32."""

        def reference(convert):
            x, values, bias, residual, skip, scale = (
                None if tensor is None else convert(tensor)
                for tensor in (self.x, self.values, self.bias, self.residual, self.skip, self.scale)
            )
            return sparse24_linear_ref(
                x, values, self.metadata, bias, self.activation, residual, skip=skip, scale=scale
            )

        low = torch.Tensor.float if self.y.dtype == torch.float32 else lambda tensor: tensor
        assert_as_good_as_torch(self.y, reference(torch.Tensor.double), reference(low))
        self.y.fill_(float("nan"))


def hand_made(matrix, N, K):
    """A problem in which every result is one weight: row m of y is column k of W, where x[m, k] is 1 and the rest 0.

    matrix: "identity", where k = m, or "one-hot", 300 rows, where k jumps about. See `check_places`.
    """
    order = torch.arange(K) if matrix == "identity" else torch.arange(300) * 37 % K
    problem = Problem(M=len(order), N=N, K=K)
    problem.x = torch.nn.functional.one_hot(order, K).to(problem.x.dtype)
    return problem


def check_places(problem):
    """Exactly; what a fault of the layout did is said by where the weights came out."""
    weight = unpack(problem.values, problem.metadata, problem.x.shape[1])
    expected = weight.t()[problem.x.argmax(1)]
    for row, feature in (problem.y != expected).nonzero().tolist():
        places = (expected == problem.y[row, feature]).nonzero()[:3].tolist()
        wrong = int((problem.y != expected).sum())
        raise AssertionError(
            f"{wrong} of {expected.numel()} are wrong: (row {row}, feature {feature}) holds {problem.y[row, feature]}, "
            f"which belongs at {places}, and not {expected[row, feature]}"
        )


class Convolution:
    """B images of C x H x W, a 2:4 weight, and what torch makes of them. kernel, padding: a number or a pair."""

    def __init__(
        self, B, C, H, W, N, *, kernel=3, stride=1, padding=1, bias=False, activation=None, residual=False, dtype=BF16,
    ):  # fmt: skip
        torch.manual_seed(0)
        self.kernel_size, self.activation = _pair(kernel), activation
        weight = torch.randn(N, C, *self.kernel_size)
        weight /= weight[0].numel() ** 0.5
        rows = group_view(weight)
        self.weight = ungroup(torch.where(select_mask_ref(rows, Pattern(2, 4)), rows, 0), weight.shape).to(dtype)
        self.values, self.metadata = pack(group_view(self.weight).reshape(N, -1))
        self.x = torch.randn(B, C, H, W).to(dtype)
        self.bias = torch.randn(N).to(dtype) if bias else None
        self.geometry = {"stride": stride, "padding": _pair(padding)}
        size = self.reference(torch.Tensor.float, residual=False).shape
        self.residual = torch.randn(size).to(dtype) if residual else None
        self.y = torch.full(size, float("nan"), dtype=dtype).to(memory_format=torch.channels_last)

    def reference(self, convert, residual=True):
        bias = None if self.bias is None else convert(self.bias)
        y = F.conv2d(convert(self.x), convert(self.weight), bias, **self.geometry)
        y = ACTIVATIONS[self.activation](y)
        return y if not residual or self.residual is None else y + convert(self.residual)

    def tensors(self, layout):
        """As `Problem.tensors`, in NHWC."""
        prepacked = prepack(self.values, self.metadata, layout, 2 * self.values.shape[1])
        return _pixels(self.x), *kernel_tensors(self.values, prepacked), self.y.permute(0, 2, 3, 1)

    def options(self):
        residual = None if self.residual is None else _pixels(self.residual)
        shape = {"kernel_size": self.kernel_size, **self.geometry}
        return shape | {"bias": self.bias, "activation": self.activation, "residual": residual}

    def check(self):
        assert_as_good_as_torch(self.y, self.reference(torch.Tensor.double), self.reference(lambda tensor: tensor))
        self.y.fill_(float("nan"))


def one_pixel_each(**sizes):
    """Images with a single 1, in the channel 37 b of the image b: every result is one weight or zero, exactly."""
    c = Convolution(**sizes)
    images, channels, height, width = c.x.shape
    c.x = torch.zeros_like(c.x)
    for b in range(images):
        c.x[b, 37 * b % channels, b % height, (b + 1) % width] = 1
    return c


# ---- a kernel on a problem


def layout_of(module):
    return next(row.layout for row in BACKENDS if row.module == module.__name__)


def launch_on_the_gpu(module, problem, **config):
    """problem.y by the kernel itself: the dispatcher might find dense quicker. Strides stay as they are."""

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)

    *tensors, y = problem.tensors(layout_of(module))
    result = moved(y)
    options = {name: moved(value) for name, value in problem.options().items()}
    module.launch(*map(moved, tensors), result, **options, **config)
    y.copy_(result)


@dataclass(frozen=True)
class KernelCase:
    """A kernel with one configuration on one problem, compiled for `capability`."""

    module: object
    config: object
    sizes: dict = field(hash=False)
    capability: int = 90
    kind: type = Problem
    plan: dict = field(default_factory=dict, hash=False)  # further arguments of the module's `plan`
    slow: bool = False

    def problem(self):
        return self.kind(**self.sizes)

    def launches(self, problem, **options):
        tensors = problem.tensors(layout_of(self.module))
        return self.module.plan(*tensors, **problem.options(), config=self.config, **self.plan | options)

    def builds(self):
        return [self._build(step) for step in self.launches(self.problem())]

    def _build(self, step):
        """What Triton's launcher would compile: pointers and integers of mma.sp kernels are specialised by 16."""
        signature, divisible = {}, []
        for name, (tensor, box, swizzle) in step.maps.items():
            dtype, bits = TYPES[tensor.dtype]
            layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={len(box)})"
            signature[name] = f"tensordesc<{dtype}{list(box)},{layout}>"
        for name, value in step.arguments.items():
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*{TYPES[value.dtype][0]}" if is_tensor else "i32"
            if not step.maps and (is_tensor or value % 16 == 0):
                divisible.append(name)
        kernel = step.kernel.fn
        return Build(
            f"{kernel.__module__}:{kernel.__name__}",
            {name: signature[name] for name in step.kernel.arg_names if name in signature},
            step.constants,
            {"num_warps": step.num_warps},
            tuple(divisible),
            self.capability,
        )

    def emulate(self, compiled, problem, *, ptx=None, early=True, seed=0, **plan):
        """Runs what was compiled, the first kernel as `ptx` if given, on the problem, whose y it writes."""
        steps = self.launches(problem, **plan)
        if "part_ptr" in steps[0].arguments:
            steps[0].arguments["part_ptr"].fill_(float("nan"))  # a partial sum that is not written must show
        texts = [ptx or compiled[0][1].ptx, *(built.ptx for _, built in compiled[1:])]
        for step, (build, _), text in zip(steps, compiled, texts):
            arguments = {name: tensor for name, (tensor, _, _) in step.maps.items()} | step.arguments
            grid = (step.grid[0] * step.cluster, *step.grid[1:])
            run(build, text, arguments, grid, early=early, cluster=step.cluster, seed=seed)


class Cases(dict):
    """{name: KernelCase}. The quick ones are compiled in one go: starting the compiler costs more than most kernels."""

    def __init__(self, cases):
        super().__init__(cases)
        self.known = {}  # what was compiled and emulated already

    def compiled(self, name):
        """[(Build, Compiled)] of each kernel that the case starts."""
        names = (name,) if self[name].slow else tuple(other for other in self if not self[other].slow)
        return self._compiled(names)[name]

    def _compiled(self, names):
        if names in self.known:
            return self.known[names]
        builds = {name: self[name].builds() for name in names}
        built = iter(compile_offline([build for some in builds.values() for build in some]))
        self.known[names] = {name: [(build, next(built)) for build in some] for name, some in builds.items()}
        return self.known[names]

    def emulated(self, name, **schedule):
        """The y of a case, once it is known to be right."""
        known = (name, *schedule.items())
        if known in self.known:
            return self.known[known]
        problem = self[name].problem()
        self[name].emulate(self.compiled(name), problem, **schedule)
        self.known[known] = problem.y.clone()
        problem.check()
        return self.known[known]


class KernelTests:
    """The tests that every kernel passes. `conftest.py` gives them the CASES and FAULTS of their file.

    FAULTS: {name: (name of a case, PTX -> PTX)}.
    """

    @pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
    def test_compiled_kernel_is_right_in_the_emulator(self, cases, name, early):
        cases.emulated(name, early=early)

    def test_sass(self, cases, name):
        for _, built in cases.compiled(name):
            assert built.shared <= SHARED_BYTES
            assert built.spills <= self.spills(cases[name])
        self.check_sass(cases[name], cases.compiled(name))

    def spills(self, case):
        """Bytes that are allowed."""
        return 0

    def test_planted_faults_are_noticed(self, cases, fault):
        name, plant = fault
        case, compiled = cases[name], cases.compiled(name)
        broken = plant(compiled[0][1].ptx)
        assert broken != compiled[0][1].ptx, "the fault was not planted"
        problem, noticed = case.problem(), []
        for early, seed in ((False, 0), (True, 0), (False, 1), (False, 2), (False, 3)):
            try:
                case.emulate(compiled, problem, ptx=broken, early=early, seed=seed)
                problem.check()
            except (EmulatorError, AssertionError) as error:
                noticed.append(str(error))
                break
        assert noticed

    @pytest.mark.gpu
    def test_on_the_gpu_as_well_as_torch(self, cases, random):
        case, problem = cases[random], cases[random].problem()
        launch_on_the_gpu(case.module, problem, config=case.config)
        problem.check()


def loop_with(built, product):
    """Histogram of the only loop that multiplies."""
    loops = [built.histogram(*loop) for loop in built.loops()]
    (main,) = [loop for loop in loops if any(op.startswith(product) for op in loop)]
    return main
