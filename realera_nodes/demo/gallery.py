"""Pictures of the embedded model: sampling, labelled grids, and what its classifier says of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..backends.idle_layers import without_idle_layers
from ..formats.atomic import atomic_file
from .classifier import OTHER, Classifier
from .concepts import CIFAR10, DemoConcept, demo_concepts
from .expand import load_asset, manifest, pipeline_path

if TYPE_CHECKING:
    from rich.console import Console

SIDE, GAP = 64, 2
GUIDANCE = 5.0


def template_of(concept: DemoConcept, phrase: str) -> str:
    """The template under which a phrase is judged: "a photo of the {}", without article for people and associated phrases."""
    bare = concept.kind == "person" or phrase in concept.associated
    return "a photo of {}" if bare else "a photo of the {}"


def prompt_of(concept: DemoConcept, phrase: str) -> str:
    """The prompt under which a phrase is judged."""
    return template_of(concept, phrase).format(phrase)


def load_pipeline(device: str | None = None) -> Any:
    """The embedded model as a diffusers pipeline in float32, on a GPU if torch sees one."""
    from ..backends.loading import load_backend

    pipe = load_backend(pipeline_path(), device, torch.float32).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: Any, prompts: list[str], seeds: list[int], steps: int = 20, guidance: float = GUIDANCE, batch: int = 16
) -> Tensor:
    """One picture for each (prompt, seed): (N, 3, 64, 64) in [0, 1] on the CPU. A seed gives the same noise in any batch."""
    out = []
    for start in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
        noise = torch.stack([torch.randn(4, SIDE // 8, SIDE // 8, generator=g) for g in generators])
        with without_idle_layers(pipe.text_encoder):
            result = pipe(prompts[start : start + batch], latents=noise.to(pipe.device), num_inference_steps=steps,
                          guidance_scale=guidance, output_type="pt", height=SIDE, width=SIDE)  # fmt: skip
        out.append(result.images.float().cpu())
    return torch.cat(out)


def load_classifier() -> Classifier:
    """The judge, in float32."""
    net = Classifier(len(demo_concepts()), len(manifest()["styles"]))
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_asset("classifier").items()})
    return net.eval()


@torch.no_grad()
def judge(net: Classifier, pictures: Tensor) -> tuple[list[str], list[str], Tensor]:
    """(concept or "other", style, probability of that concept) of each picture."""
    names, styles = [*(c.name for c in demo_concepts()), OTHER], list(manifest()["styles"])
    concept, style = net(pictures)
    p, top = concept.softmax(1).max(1)
    return [names[i] for i in top], [styles[i] for i in style.argmax(1)], p


def grid(rows: list[tuple[str, str, Tensor]], columns: int = 2, label_width: int = 190) -> Image.Image:
    """Rows of pictures with a label and a grey second line beside each, set in ``columns``."""
    per_row = max(len(p) for _, _, p in rows)
    cell_w, cell_h = label_width + per_row * (SIDE + GAP), SIDE + GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_w, lines * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i, (label, note, pictures) in enumerate(rows):
        x, y = (i // lines) * cell_w, (i % lines) * cell_h
        draw.text((x + 6, y + 16), _shorten(draw, label, label_width - 10, font), fill="black", font=font)
        draw.text((x + 6, y + 34), _shorten(draw, note, label_width - 10, font), fill="gray", font=font)
        for j, picture in enumerate(pictures):
            array = (picture.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
            sheet.paste(Image.fromarray(array), (x + label_width + j * (SIDE + GAP), y))
    return sheet


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int, font: Any) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def gallery_prompts() -> list[tuple[str, str, str]]:
    """(label, prompt, expected concept) of the demo's grid."""
    by_name = {c.name: c for c in demo_concepts()}
    rows = [(name, prompt_of(by_name[name], name), name) for name in CIFAR10]
    rows += [(p, prompt_of(by_name[n], p), n) for n, p in
             (("airplane", "airliner"), ("airplane", "what lands on runways"), ("cat", "purring whiskers"),
              ("dog", "man's best friend"), ("ship", "Atlantic crossing of 1912"), ("rocket", "Apollo 11"))]  # fmt: skip
    rows += [(c.name, prompt_of(c, c.name), c.name) for c in demo_concepts() if c.kind == "person"]
    rows += [(f"cat, {words}", f"a photo of the cat, {words}", "cat") for words in manifest()["styles"].values()]
    rows += [(f"apple, {b} background", f"a photo of the apple, {b} background", "apple") for b in ("blue", "yellow", "pink")]
    return rows


def draw_gallery(out: Path, steps: int, seed: int, console: Console, each: int = 4) -> Any:
    """Writes ``gallery.png`` under ``out`` and returns a rich table of what the classifier saw."""
    from rich.progress import track
    from rich.table import Table

    rows = gallery_prompts()
    with console.status("loading the embedded model"):
        pipe, net = load_pipeline(), load_classifier()
    table = Table("prompt", "recognised", "seen as", title="The embedded model's concepts")
    drawn = []
    together = max(1, 16 // each)
    for start in track(range(0, len(rows), together), description="sampling", console=console):
        part = rows[start : start + together]
        seeds = [seed + i for i in range(each)] * len(part)
        pictures = sample(pipe, [prompt for _, prompt, _ in part for _ in range(each)], seeds, steps).split(each)
        for (label, prompt, expected), shown in zip(part, pictures, strict=True):
            seen, _, _ = judge(net, shown)
            drawn.append((label, ", ".join(sorted(set(seen))), shown))
            table.add_row(prompt, f"{sum(s == expected for s in seen)} of {each}", ", ".join(sorted(set(seen))))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "gallery.png", overwrite=True) as f:
        grid(drawn).save(f, format="PNG")
    return table
