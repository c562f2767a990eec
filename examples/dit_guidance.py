"""A diffusers DiT pipeline with classifier-free guidance, made 2:4 sparse; both of its branches are supervised.

python examples/dit_guidance.py                                       random weights, a few seconds on a CPU
python examples/dit_guidance.py --model facebook/DiT-XL-2-256         published weights; raise --tuning-steps
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import make_image_grid

import sparsedm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a hub name or a folder (default: a tiny network with random weights)")
parser.add_argument("--tuning-steps", type=int, default=20)
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--out", default="dit_guidance.png")
options = parser.parse_args()
if options.tuning_steps < 1:
    parser.error(f"--tuning-steps {options.tuning_steps}: at least 1 is needed")
if not math.isfinite(options.guidance):
    parser.error(f"--guidance {options.guidance}: must be finite")
out = Path(options.out).absolute()
if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
    parser.error(f"--out {options.out}: must be a .png, .jpg or .webp in a folder that exists")
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

if options.model:
    pipeline = DiTPipeline.from_pretrained(options.model)
else:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, **blocks)
    pipeline = DiTPipeline(DiTTransformer2DModel(**sizes), vae, DDIMScheduler())
pipeline.to(device)
student = pipeline.transformer
teacher = copy.deepcopy(student).eval()
null, latent = student.config.num_embeds_ada_norm, (student.config.in_channels, *[student.config.sample_size] * 2)

sparsedm.sparsify(student, "2:4").eval()  # in train mode diffusers would drop labels of its own accord
optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4)
for _ in range(options.tuning_steps):  # stands for a trainer of your own, on latents
    x, t = torch.randn(8, *latent, device=device), torch.randint(0, 1000, (8,), device=device)
    labels = torch.randint(0, null, (8,), device=device)
    inputs = {"hidden_states": x.repeat(2, 1, 1, 1), "timestep": t.repeat(2)}
    inputs["class_labels"] = torch.cat([labels, torch.full_like(labels, null)])  # guidance needs both to stay true
    with torch.no_grad():
        target = teacher(**inputs).sample
    loss = (student(**inputs).sample - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"distance to the dense network after {options.tuning_steps} steps: {loss:.5f}")
small = sparsedm.compress(student)
with torch.no_grad():
    difference = (small(**inputs).sample - student(**inputs).sample).abs().max()
print(f"largest difference of the compressed network from the masked one: {difference:.1e}")

images = []
for network in (teacher, small):
    pipeline.register_modules(transformer=network)
    images += pipeline([1, 2, 3, 4], guidance_scale=options.guidance, num_inference_steps=10,
                       generator=torch.Generator(device).manual_seed(0)).images  # fmt: skip
make_image_grid(images, rows=2, cols=4).save(out)
print(f"dense above, 2:4 compressed below: {options.out}")
