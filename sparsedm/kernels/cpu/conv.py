"""The back end "cpu" of `sparse24_conv2d`: fp32 and any N:M, by the C kernels."""

from sparsedm.kernels.cpu import products
from sparsedm.kernels.pattern import Pattern

CONFIGS = ("conv", "halo")  # the orders of `products.prepack`


def launch(x, values, offsets, y, *, pattern, config, kernel_size, stride, padding, bias, activation, residual):
    """x (B, H, W, C), y and residual (B, H', W', N), contiguous."""
    x, y = x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)
    residual = residual if residual is None else residual.permute(0, 3, 1, 2)
    geometry, pattern = (tuple(kernel_size), (stride, stride), tuple(padding)), Pattern.parse(pattern)
    epilogue = {"bias": bias, "activation": activation, "residual": residual}
    products.conv2d(x, (values, offsets), pattern, y.shape[1], geometry, halo=config == "halo", out=y, **epilogue)
