"""How much the start token must weigh to stay: the table of docs/method.md, on the tuning concepts of the embedded model.

    python -m tools.start_token [--weights 0,0.3,1,3] [--pictures 0,1,3] [--no-words]

Mines each concept once (minutes), then solves the closed form at each weight of ``closed_form.head`` and measures how far the
start token's values and the model's predictions move, and, at the weights of ``--pictures``, what the classifier sees.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from realera_nodes import erasure as e
from realera_nodes.backends.loading import load_backend
from realera_nodes.bench.erasure.splits import load_split
from realera_nodes.core.concepts import Concept
from realera_nodes.core.metrics import drift, residue
from realera_nodes.demo.concepts import demo_concepts
from realera_nodes.demo.expand import pipeline_path
from realera_nodes.demo.gallery import judge, load_classifier, prompt_of
from realera_nodes.mining import Mined, silent

STEPS, GUIDANCE = 10, 5.0


def predictions(backend: Any, z: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return torch.stack([backend.predict_noise(z, t, backend.encode([p] * len(z))) for p in prompts])


def moved(after: Tensor, before: Tensor) -> float:
    return float((after - before).square().mean() / before.square().mean())


class Subject:
    """A mined concept: its edit at any weight, and what is measured on it."""

    def __init__(self, backend: Any, concept: Concept, words: bool):
        self.backend, self.concept, self.config = backend, concept, e.ErasureConfig(alignment_on=False)
        if not words:
            self.config = replace(self.config, neighbors=replace(self.config.neighbors, words=0))
        self.groups = e.make_pairs(backend, (concept,))
        runs = e.trajectories(backend, self.groups, (concept,), self.config.alignment, silent)
        found = e.mine(backend, self.groups, (concept,), runs, self.config.neighbors, silent) if words else [Mined()]
        self.mined = found[0]
        run = runs[self.groups[0][0].anchor_prompt]
        picks = [round(share * (len(run.timesteps) - 1)) for share in (0.15, 0.4, 0.65)]
        self.z, self.t = run.latents[0, picks], run.timesteps[picks]
        named = [c for c in demo_concepts() if c.name != concept.phrase]
        self.kept = [prompt_of(c, c.name) for c in named[::8]]
        self.others = [(prompt_of(c, c.name), c.name) for c in named]

    def deltas(self, weight: float) -> dict[str, Tensor]:
        config = replace(self.config, closed_form=replace(self.config.closed_form, head=weight))
        transform = e.edit(self.backend, self.groups, (self.concept,), self.mined, config, silent)
        return {n: transform.delta(w) for n, w in self.backend.projections().items()}

    def numbers(self, deltas: dict[str, Tensor]) -> dict[str, float]:
        backend, (x, target) = self.backend, self.groups[0][0].rows
        start = backend.encode([""]).states[0, :1]
        values = [(w.float().T, deltas[n].T) for n, w in backend.projections().items() if n.endswith("to_v")]
        left = [residue((x @ (w + d)).flatten(), (x @ w).flatten(), (target @ w).flatten()) for w, d in values]
        before = [predictions(backend, self.z, self.t, p) for p in ([""], self.kept)]
        with backend.edited(deltas):
            after = [predictions(backend, self.z, self.t, p) for p in ([""], self.kept)]
        return {
            "start token": float(torch.stack([drift(start @ (w + d), start @ w).mean() for w, d in values]).mean()),
            "eps of the empty prompt": moved(after[0], before[0]), "eps of others": moved(after[1], before[1]),
            "left of the way": float(torch.stack(left).mean()),
        }  # fmt: skip

    def seen(self, net: Any, deltas: dict[str, Tensor]) -> dict[str, float]:
        """Accuracies by the classifier: four pictures of the name, two of other phrases, one of each other concept."""
        demo = next(c for c in demo_concepts() if c.name == self.concept.phrase)
        asks = [("Acc_e", prompt_of(demo, demo.name), demo.name, s) for s in range(4)]
        for group, phrases in (("Acc_g", demo.synonyms), ("residue", demo.associated)):
            asks += [(group, prompt_of(demo, p), demo.name, s) for p in phrases for s in range(2)]
        asks += [("Acc_s", prompt, name, 5) for prompt, name in self.others]
        with self.backend.edited(deltas):
            pictures = self.backend.pictures([a[1] for a in asks], [a[3] for a in asks], STEPS, GUIDANCE)
        hits: dict[str, list[float]] = {}
        for (group, _, name, _), shown in zip(asks, judge(net, pictures)[0], strict=True):
            hits.setdefault(group, []).append(float(shown == name))
        return {group: sum(h) / len(h) for group, h in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="0,0.1,0.3,1,3,10")
    parser.add_argument("--pictures", default="0,1,3", help="weights at which pictures are drawn and judged as well")
    parser.add_argument("--concepts", default="airplane,apple,owl,castle,guitar,Mira Voss")
    parser.add_argument("--no-words", action="store_true", help="the paper's random neighbors alone")
    args = parser.parse_args()
    backend, net = load_backend(pipeline_path(), "cpu", torch.float32), load_classifier()
    drawn = {float(w) for w in args.pictures.split(",") if w}
    rows: dict[float, list[dict[str, float]]] = {float(w): [] for w in args.weights.split(",")}
    for concept in load_split("tuning").concepts:
        if concept.phrase in args.concepts.split(","):
            subject = Subject(backend, concept, not args.no_words)
            for weight, found in rows.items():
                deltas = subject.deltas(weight)
                found.append(subject.numbers(deltas) | (subject.seen(net, deltas) if weight in drawn else {}))
                print(concept.phrase, weight, {k: round(v, 5) for k, v in found[-1].items()}, flush=True)
    print("means")
    for weight, found in rows.items():
        print(weight, {k: round(sum(f[k] for f in found) / len(found), 5) for k in found[0]})


if __name__ == "__main__":
    main()
