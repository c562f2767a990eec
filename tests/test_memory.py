import pytest

from sparsedm.compression import compress
from sparsedm.memory import kept_per_image, live_per_image, most_kept_per_image
from sparsedm.models import build_model
from sparsedm.sparsity import sparsify


def test_a_forward_needs_the_input_and_output_of_its_widest_layer():
    network = build_model("uvit-tiny", image_size=8, patch_size=2, dim=16, depth=2, heads=2)
    tokens, dim = 1 + 4 * 4, 16
    for model in (network, compress(sparsify(network, "2:4"))):
        assert live_per_image(model) == 4 * tokens * (dim + 4 * dim), "fp32 before and in the feed-forward"


@pytest.mark.parametrize("name", ["uvit-tiny", "dit-tiny", "ddpm-tiny", "slimmable-tiny"])
def test_no_network_keeps_more_than_its_bound(name):
    network = build_model(name, device="meta")
    assert 0 < kept_per_image(network) < most_kept_per_image(network) < 50 * kept_per_image(network)
