"""--dry-run: what a job would do, and what it would cost, from one measured forward of the model."""

from __future__ import annotations

import time
from typing import Any

import torch

from .job import DEMO, Job, load, planned_files, prepare, probes_of


def forwards(job: Job, concepts: int, probes: int) -> dict[str, float]:
    """UNet forwards by stage, in units of one forward of one latent; a backward counts for two."""
    mining, alignment = job.config.neighbors, job.config.alignment
    plan = {"anchor trajectories": concepts * 2.0 * alignment.trajectories * alignment.trajectory_steps}
    if job.config.neighbors_on and mining.words:
        plan["named neighbors"] = concepts * 2.0 * mining.candidates
    if job.config.alignment_on:
        even = 2 if job.config.beyond_on and alignment.beyond else 1
        per_step = 4 * ((1 + even) / 2 if job.config.neighbors_on and alignment.neighbors else 1)
        plan["noise alignment"] = per_step * alignment.steps * alignment.batch * alignment.accumulate
    plan["pictures"] = 2.0 * 2 * probes * job.pictures * job.sampling_steps
    return plan


def plan(job: Job) -> str:
    """The plan as text. ErasureError: the job would be refused."""
    source = prepare(job)
    backend: Any = load(job, source)
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
    lines = [
        f"{source.name}: {backend.kind}, context width {backend.context_width}, {len(backend.names)} projections, "
        f"{parameters / 2**30:.2f} GB loaded on {backend.device}",
        "erase: " + ", ".join(f"{c.phrase} -> {c.anchor}" for c in job.concepts),
    ]
    total = 0.0
    for stage, count in forwards(job, len(job.concepts), probes).items():
        total += count * second
        lines.append(f"  {stage:<20} {count:>7.0f} UNet forwards, about {count * second:.0f} s")
    d = backend.context_width
    gram = 6 * d * d * 8 / 2**20
    lines.append(
        f"  about {total / 60:.1f} minutes in all (one forward: {second * 1e3:.0f} ms), {gram:.0f} MB for the closed form"
    )
    lines += [f"would write {path}" for path in planned_files(job, source).values()]
    return "\n".join(lines)
