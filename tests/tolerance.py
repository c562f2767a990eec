"""The suite's one tolerance: as good as torch. Everything else is compared exactly."""

import torch


def assert_as_good_as_torch(out, ref_high, torch_low, eps=None):
    """max|out - ref_high| <= 2 max|torch_low - ref_high| + eps.

    out: what is tested. ref_high: the same quantity in higher precision (normally fp64). torch_low: torch's own result
    in the precision of `out`. eps defaults to one unit in the last place of out's dtype at the magnitude of the
    reference: it matters only where torch happens to be exact.
    """
    assert out.shape == ref_high.shape == torch_low.shape, (out.shape, ref_high.shape, torch_low.shape)
    out, ref, low = out.detach().double(), ref_high.detach().double(), torch_low.detach().double()
    assert torch.isfinite(out).all(), "the result holds NaN or infinity"
    if ref.numel() == 0:
        return
    if eps is None:
        eps = torch.finfo(torch_low.dtype).eps * ref.abs().max().item()
    error, allowed = (out - ref).abs().max().item(), 2 * (low - ref).abs().max().item() + eps
    assert error <= allowed, f"max error {error:.3e}, allowed {allowed:.3e} (twice torch's own, plus {eps:.1e})"
