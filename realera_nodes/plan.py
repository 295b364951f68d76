"""--dry-run: what a job would do, and what it would cost, from one measured forward of the model."""

from __future__ import annotations

import time
from typing import Any

import torch

from .checks import check_loaded
from .job import DEMO, Job, load, planned_files, prepare, probes_of
from .methods import method_of


def forwards(job: Job, probes: int) -> dict[str, float]:
    """UNet forwards by stage, in units of one forward of one latent; a backward counts for two."""
    pictures = 2.0 * 2 * probes * job.pictures * job.sampling_steps
    return method_of(job.config).forwards(job.config, len(job.concepts)) | {"pictures": pictures}


def plan(job: Job) -> str:
    """The plan as text. ErasureError: the job would be refused."""
    source = prepare(job)
    backend: Any = load(job, source)
    check_loaded(job, backend, probes_of(job))
    text = backend.encode(["a photo"])
    z, t = backend.noise([0]), torch.tensor([500])
    with torch.no_grad():
        backend.predict_noise(z, t, text)
        start = time.perf_counter()
        for _ in range(3):
            backend.predict_noise(z, t, text)
    second = (time.perf_counter() - start) / 3
    probes = len(probes_of(job)) + (4 if job.checkpoint != DEMO else 0)
    parameters = sum(
        p.numel() * p.element_size() for m in (backend.unet, backend.pipe.text_encoder, backend.pipe.vae) for p in m.parameters()
    )
    aims = method_of(job.config).aims(job.config)
    lines = [
        f"{source.name}: {backend.kind}, context width {backend.context_width}, {len(backend.names)} projections, "
        f"{parameters / 2**30:.2f} GB loaded on {backend.device}",
        "erase: " + ", ".join(f"{c.phrase} -> {c.anchor}" if aims else c.phrase for c in job.concepts),
    ]
    prediction = source.checkpoint.prediction(job.prediction)
    lines += [f"predicts {prediction.type}, says {prediction.by}", *prediction.doubts]
    total = 0.0
    for stage, count in forwards(job, probes).items():
        total += count * second
        lines.append(f"  {stage:<20} {count:>7.0f} UNet forwards, about {count * second:.0f} s")
    size, purpose = method_of(job.config).memory(job.config, backend)
    lines.append(f"  about {total / 60:.1f} minutes in all (one forward: {second * 1e3:.0f} ms), {size / 2**20:.0f} MB {purpose}")
    lines += [f"would write {path}" for path in planned_files(job, source).values()]
    return "\n".join(lines)
