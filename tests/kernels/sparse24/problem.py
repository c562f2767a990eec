"""One sparse product, its inputs and what is right: shared by the tests of the sparse tensor-core kernels."""

import torch

from sparsedm.kernels.pattern import Pattern, select_mask_ref
from sparsedm.kernels.sparse24.dispatch import LINEAR, row_of
from sparsedm.kernels.sparse24.format import pack, unpack
from sparsedm.kernels.sparse24.layouts import kernel_tensors, prepack
from sparsedm.kernels.sparse24.linear import sparse24_linear_ref
from tests.tolerance import assert_as_good_as_torch

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


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


def launch_on_the_gpu(module, backend, problem, **config):
    """problem.y by the kernel itself: the dispatcher might find dense quicker. Strides stay as they are."""

    def moved(tensor):
        if tensor is not None:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)

    p, y = problem, moved(problem.y)
    module.launch(
        moved(p.x), *map(moved, prepacked(p, backend)), y, bias=moved(p.bias), activation=p.activation,
        residual=moved(p.residual), skip=moved(p.skip), scale=moved(p.scale), **config,
    )  # fmt: skip
    p.y = y.cpu()


def prepacked(problem, backend):
    """Its weight as the kernels of `backend` take it."""
    values, metadata, layout = problem.values, problem.metadata, row_of(LINEAR, backend).layout
    return kernel_tensors(values, prepack(values, metadata, layout, 2 * values.shape[1]))


def kinds(arguments):
    """Run-time arguments -> Triton's signature."""
    return {k: POINTER[v.dtype] if isinstance(v, torch.Tensor) else "i32" for k, v in arguments.items()}


def divisible(arguments):
    """The arguments that Triton's launcher would find divisible by 16."""
    return tuple(k for k, v in arguments.items() if isinstance(v, torch.Tensor) or v % 16 == 0)
