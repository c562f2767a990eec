"""A diffusers DDPM pipeline, made 2:4 sparse, tuned for a moment towards its dense self, and run compressed.

python examples/ddpm_pipeline.py                                   random weights, a few seconds on a CPU
python examples/ddpm_pipeline.py --model google/ddpm-cifar10-32    published weights; raise --tuning-steps to thousands
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.utils import make_image_grid

import sparsedm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a hub name or a folder (default: a tiny network with random weights)")
parser.add_argument("--tuning-steps", type=int, default=20)
parser.add_argument("--out", default="ddpm_pipeline.png")
options = parser.parse_args()
if options.tuning_steps < 1:
    parser.error(f"--tuning-steps {options.tuning_steps}: at least 1 is needed")
out = Path(options.out).absolute()
if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
    parser.error(f"--out {options.out}: must be a .png, .jpg or .webp in a folder that exists")
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

if options.model:
    pipeline = DDPMPipeline.from_pretrained(options.model)
else:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, **blocks)
    pipeline = DDPMPipeline(unet, DDIMScheduler())
student = pipeline.unet.to(device)
teacher = copy.deepcopy(student).eval()

sparsedm.sparsify(student, "2:4")
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
for _ in range(options.tuning_steps):  # stands for a trainer of your own, on images
    x = torch.randn(8, student.config.in_channels, *[student.config.sample_size] * 2, device=device)
    t = torch.randint(0, 1000, (8,), device=device)
    with torch.no_grad():
        target = teacher(x, t).sample
    loss = (student(x, t).sample - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"distance to the dense network after {options.tuning_steps} steps: {loss:.5f}")
small = sparsedm.compress(student)
with torch.no_grad():
    difference = (small(x, t).sample - student.eval()(x, t).sample).abs().max()
print(f"largest difference of the compressed network from the masked one: {difference:.1e}")

grids = []
for network in (teacher, small):
    pipeline = DDPMPipeline(network, DDIMScheduler.from_config(pipeline.scheduler.config))
    pipeline.set_progress_bar_config(desc=type(network.mid_block.resnets[0].conv1).__name__)
    grids += pipeline(batch_size=4, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
make_image_grid(grids, rows=2, cols=4).save(out)
print(f"dense above, 2:4 compressed below: {options.out}")
