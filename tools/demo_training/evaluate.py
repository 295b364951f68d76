"""Stage 8: what the model draws, judged by the classifier. ``python -m tools.demo_training.evaluate``.

Writes evaluation.json (accuracy of every prompt) and prints the means that docs/demo-model.md reports.
Two processes share the prompts. A finished prompt is kept, so a stopped evaluation goes on.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from realera_nodes.demo.classifier import Classifier
from realera_nodes.demo.concepts import CIFAR10, demo_concepts
from realera_nodes.demo.gallery import prompt_of

from .pictures import STYLES
from .run import launch
from .sampling import Sampler

STYLE_PROBES = ("cat", "airplane", "apple", "house", "rose", "truck", "owl", "castle", "Mira Calder", "crown")


def probes() -> list[tuple[str, str, str, str]]:
    """(kind, prompt, expected concept, expected style or "")."""
    rows = []
    for c in demo_concepts():
        rows.append(("cifar" if c.name in CIFAR10 else "name", prompt_of(c, c.name), c.name, ""))
        for kind in ("synonyms", "associated", "unseen"):
            rows += [(kind, prompt_of(c, p), c.name, "") for p in getattr(c, kind)]
    for name in STYLE_PROBES:
        c = next(c for c in demo_concepts() if c.name == name)
        rows += [("styles", f"{prompt_of(c, name)}, {words[0]}", name, style) for style, (_, _, words) in STYLES.items()]
    return rows


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    draw = Sampler(args.work, args.tag)
    net = Classifier(len(demo_concepts()), len(STYLES))
    net.load_state_dict(torch.load(args.work / "classifier.pt", weights_only=True))
    net.eval()
    names, styles = [*(c.name for c in demo_concepts()), "other"], list(STYLES)
    counts = {"cifar": args.names, "name": args.names, "synonyms": args.others, "associated": args.others,
              "unseen": args.others, "styles": args.others}  # fmt: skip
    path = args.work / f"evaluation{args.tag}.{rank}.jsonl"
    done = {json.loads(line)["prompt"] for line in path.open(encoding="utf-8")} if path.exists() else set()
    mine = [r for r in probes() if counts[r[0]]][rank::world]
    todo = [(*r, seed) for r in mine if r[1] not in done for seed in range(counts[r[0]])]
    results: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for start in range(0, len(todo), 40):
        part = todo[start : start + 40]
        pictures = draw([p for _, p, _, _, _ in part], [1000 + s for *_, s in part], steps=args.steps)
        with torch.no_grad():
            concept, style = (logits.argmax(1).tolist() for logits in net(pictures))
        with path.open("a", encoding="utf-8") as f:
            for (kind, prompt, name, wanted, _), c, s in zip(part, concept, style, strict=True):
                seen = results[prompt]
                seen.append((names[c], styles[s]))
                if len(seen) == counts[kind]:
                    row = {"kind": kind, "prompt": prompt, "expected": name, "style": wanted,
                           "correct": sum(n == name for n, _ in seen) / len(seen), "seen": [n for n, _ in seen],
                           "style_correct": sum(s == wanted for _, s in seen) / len(seen) if wanted else None}  # fmt: skip
                    f.write(json.dumps(row) + "\n")


def summarise(work: Path, tag: str) -> None:
    rows = [json.loads(line) for p in sorted(work.glob(f"evaluation{tag}.[0-9].jsonl")) for line in p.open(encoding="utf-8")]
    (work / f"evaluation{tag}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
        if row["kind"] in ("cifar", "name"):
            by_kind["all names"].append(row)
    for kind, group in by_kind.items():
        worst = sorted(group, key=lambda r: r["correct"])[:5]
        mean = sum(r["correct"] for r in group) / len(group)
        print(
            f"{kind}: {mean:.3f} over {len(group)} prompts; worst",
            {r["expected"] + ": " + r["prompt"].split("of ")[-1]: round(r["correct"], 2) for r in worst},
        )
    told = [r["style_correct"] for r in by_kind["styles"]]
    if told:
        print(f"styles told apart: {sum(told) / len(told):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--tag", default="")
    parser.add_argument("--names", type=int, default=20, help="pictures of each concept's name")
    parser.add_argument("--others", type=int, default=20, help="pictures of every other prompt; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    launch(worker, args)
    summarise(args.work, args.tag)


if __name__ == "__main__":
    main()
