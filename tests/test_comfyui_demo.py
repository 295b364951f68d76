"""The embedded checkpoint in a real ComfyUI server: plain loader, plain sampler, the pipeline's pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from realera_nodes.demo import expand
from realera_nodes.demo.gallery import judge
from tests.http_graphs import fetch, queue, wait

pytestmark = pytest.mark.comfyui

#: 999 / 27 is whole, so that both hosts step through the same integer timesteps
STEPS, SEED, GUIDANCE, BATCH = 28, 42, 5.0, 2
PROMPT = "a photo of the cat"
#: of 255, between pictures of the two hosts: sums in another order, sigmas rounded to other digits
MEAN_TOLERANCE, LARGEST_TOLERANCE = 0.5, 12


def graph(prompt: str, batch: int = BATCH, steps: int = STEPS) -> dict:
    """API-format text to image with core nodes only."""
    return {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": expand.CHECKPOINT}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["model", 1]}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["model", 1]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": batch}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0],
                "latent_image": ["latent", 0], "seed": SEED, "steps": steps, "cfg": GUIDANCE,
                "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "demo"}},
    }  # fmt: skip


def run(url: str, prompt: dict, seconds: float = 180) -> list[np.ndarray]:
    """Queues a graph, waits for it, returns its pictures as uint8 arrays."""
    done = wait(url, queue(url, prompt), seconds)
    assert done["status"]["status_str"] == "success", done["status"]
    images = [i for node in done["outputs"].values() for i in node.get("images", [])]
    return [np.array(Image.open(io.BytesIO(fetch(url, i)))) for i in images]


@pytest.fixture(scope="module")
def comfy_pictures(bare_comfy) -> np.ndarray:
    return np.stack(run(bare_comfy.url, graph(PROMPT)))


def test_the_plain_loader_takes_it_without_a_warning(bare_comfy, comfy_pictures) -> None:
    log = bare_comfy.log.read_text()
    loading = log[log.index("got prompt") :]
    assert "model weight dtype" in loading
    for bad in ("missing", "unexpected", "warning", "error", "left over keys", "unet missing", "clip missing"):
        assert bad not in loading.lower(), loading


def test_pictures_are_the_diffusers_pipelines(comfy_pictures, pipe) -> None:
    from diffusers import EulerDiscreteScheduler

    noise = torch.randn(BATCH, 4, 8, 8, generator=torch.manual_seed(SEED))  # as ComfyUI's sampler draws it
    kept = pipe.scheduler
    try:
        pipe.scheduler = EulerDiscreteScheduler.from_config(kept.config, timestep_spacing="linspace")
        pipe.scheduler.set_timesteps(STEPS)
        largest = float(pipe.scheduler.sigmas[0])
        # ComfyUI starts from noise of deviation sqrt(1 + sigma^2), diffusers' linspace from sigma
        latents = noise * (1 + largest**2) ** 0.5 / float(pipe.scheduler.init_noise_sigma)
        result = pipe([PROMPT] * BATCH, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                      output_type="np", height=64, width=64)  # fmt: skip
    finally:
        pipe.scheduler = kept
    ours = (result.images * 255).clip(0, 255)
    difference = np.abs(ours - comfy_pictures.astype(np.float32))
    assert difference.mean() < MEAN_TOLERANCE, difference.mean()
    assert difference.max() < LARGEST_TOLERANCE, difference.max()


def test_pictures_show_the_concept(comfy_pictures, classifier) -> None:
    pictures = torch.from_numpy(comfy_pictures).permute(0, 3, 1, 2).float() / 255
    assert judge(classifier, pictures)[0] == ["cat"] * BATCH


def test_an_api_graph_draws_another_concept(bare_comfy, classifier) -> None:
    pictures = (
        torch.from_numpy(np.stack(run(bare_comfy.url, graph("a photo of the apple", steps=20)))).permute(0, 3, 1, 2).float() / 255
    )
    assert judge(classifier, pictures)[0] == ["apple"] * BATCH
