"""The back end "cpu" of `sparse24_linear`: fp32 and any N:M, by the C kernels."""

from sparsedm.kernels.cpu import products
from sparsedm.kernels.pattern import Pattern

CONFIGS = ("linear", "few")  # the orders of `products.prepack`


def launch(x, values, offsets, y, *, pattern, config, bias, activation, residual, skip, scale):
    """x (M, K), y (M, N); the others as in `products.linear`."""
    pattern = Pattern.parse(pattern)
    epilogue = {"bias": bias, "activation": activation, "residual": residual, "skip": skip, "scale": scale}
    products.linear(x, (values, offsets), pattern, y.shape[1], few=config == "few", out=y, **epilogue)
