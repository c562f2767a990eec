"""Stable Diffusion 1.5 or 3 in diffusers with its denoiser 2:4 sparse and compressed, without any tuning.

python examples/stable_diffusion.py                      SD 1.5's architecture, tiny, random weights, seconds on a CPU
python examples/stable_diffusion.py --version 3          SD 3's
python examples/stable_diffusion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox"
python examples/stable_diffusion.py --version 3 --model stabilityai/stable-diffusion-3-medium-diffusers

Pruned in one shot, a published model loses much of its quality: tune it as ddpm_pipeline.py and dit_guidance.py do.
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import make_image_grid

import sparsedm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--version", choices=("1.5", "3"), default="1.5")
parser.add_argument("--model", help="a hub name or a folder (default: a tiny pipeline with random weights)")
parser.add_argument("--prompt", default="a watercolour of a lighthouse")
parser.add_argument("--out", default="stable_diffusion.png")
options = parser.parse_args()
out = Path(options.out).absolute()
if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
    parser.error(f"--out {options.out}: must be a .png, .jpg or .webp in a folder that exists")
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
part = "unet" if options.version == "1.5" else "transformer"
torch.manual_seed(0)


def tiny_pipeline():
    """(pipeline without text encoders, random embeddings in place of a prompt's)."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, shift_factor=0.0, **blocks)
    texts = {name: torch.randn(2, 7, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if options.version == "1.5":
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        return StableDiffusionPipeline(vae, None, None, unet, DDIMScheduler(), None, None, None, False), texts
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
    )  # fmt: skip
    texts |= {name: torch.randn(2, 64) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    encoders = {f"{name}{i}": None for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, **encoders), texts


if options.model:
    kind = StableDiffusionPipeline if options.version == "1.5" else StableDiffusion3Pipeline
    pipeline, texts = kind.from_pretrained(options.model, torch_dtype=dtype), {"prompt": [options.prompt] * 2}
else:
    pipeline, texts = tiny_pipeline()
pipeline.to(device, dtype)
texts = {name: text.to(device, dtype) if torch.is_tensor(text) else text for name, text in texts.items()}
dense = getattr(pipeline, part)
small = sparsedm.compress(sparsedm.sparsify(copy.deepcopy(dense), "2:4"))

images = []
for network in (dense, small):
    pipeline.register_modules(**{part: network})
    generator = torch.Generator(device).manual_seed(0)
    images += pipeline(**texts, num_inference_steps=10, generator=generator).images
    held = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    print(f"{'dense' if network is dense else '2:4 compressed'}: {held / 2**20:.1f} MiB")
make_image_grid(images, rows=2, cols=2).save(out)
print(f"dense above, 2:4 compressed below: {options.out}")
