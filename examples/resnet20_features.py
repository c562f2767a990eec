"""A classifier's features as a file for `sparsedm evaluate --features FILE`: the public ResNet-20 of CIFAR-10.

python examples/resnet20_features.py cifar10-resnet20.th --data cifar10
sparsedm evaluate runs/mine --data cifar10 --features resnet20.pt2

This is the network of He et al. (arXiv 1512.03385, section 4.2; shortcuts of option A) under the names of
github.com/akamaster/pytorch_resnet_cifar10, whose weights (resnet20-12fca82f.th) fit; its 64 features are what its last
layer sees. A file for --features takes uint8 images (n, 3, h, w), scales them itself and gives (n, d).
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

from sparsedm.errors import InputError
from sparsedm.features import load_features
from sparsedm.files import atomic_file, check_writable
from sparsedm.tensor_files import fill, read_tensors
from sparsedm.train.data import SPLITS, check_source, load


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        stride, added = self.conv1.stride[0], (self.conv1.out_channels - self.conv1.in_channels) // 2
        return F.relu(out + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added, added)))


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for number, inside, outside, stride in ((1, 16, 16, 1), (2, 16, 32, 2), (3, 32, 64, 2)):
            blocks = [Block(inside, outside, stride), *(Block(outside, outside, 1) for _ in range(2))]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        """uint8 (n, 3, h, w) -> (n, 64) features."""
        x = F.relu(self.bn1(self.conv1((images.float() - self.mean) / self.deviation)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="the classifier's state dict, which is read without running anything in it")
    parser.add_argument("--data", help="CIFAR-10 in class folders, a zip or archive of it: print the accuracy there")
    parser.add_argument("--split", choices=SPLITS, default="test", help="part of --data (default: test)")
    parser.add_argument("--out", default="resnet20.pt2", help="(default: resnet20.pt2)")
    options = parser.parse_args(arguments)
    if not options.out.endswith(".pt2"):
        raise InputError(f"--out {options.out}: must end in .pt2")
    check_writable(options.out)
    if options.data:
        check_source(options.data, out=options.out)
    images = load(options.data, options.split) if options.data else None
    if images and images.labels is None:
        raise InputError(f"data {options.data} holds no labels, which an accuracy needs")

    network = ResNet20().eval()
    tensors, _ = read_tensors(options.weights)
    counters = {name: count for name, count in network.state_dict().items() if name.endswith("num_batches_tracked")}
    tensors = counters | {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    fill(network, tensors, options.weights)  # the public file is older than those counters, which only training needs
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with atomic_file(options.out) as partial:
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(sizes,)), partial)
    features = load_features(options.out)
    print(f"features {features.name}: 64 of each image, in {options.out}")
    if images:
        with torch.no_grad():
            classes = network.linear(features(images.images, progress=True).float()).argmax(1)
        accuracy = (classes == images.labels).double().mean()
        print(f"accuracy on {len(images):,} images ({options.data}, {options.split}): {accuracy:.2%}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
