"""CLIP's byte-pair vocabulary, rebuilt from its list of merges (OpenAI CLIP, MIT)."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

MERGES = Path(__file__).parent / "assets" / "bpe_merges.txt.xz"


def byte_order() -> tuple[list[int], list[int]]:
    """(printable bytes, the rest), each in the vocabulary's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable, [b for b in range(256) if b not in printable]


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in the vocabulary's order."""
    printable, other = byte_order()
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(other))]


def merges() -> list[str]:
    return lzma.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")


def vocabulary() -> list[str]:
    """The 49,408 tokens by id."""
    symbols = byte_symbols()
    joined = ["".join(m.split()) for m in merges()]
    return [*symbols, *(s + "</w>" for s in symbols), *joined, "<|startoftext|>", "<|endoftext|>"]


def token_text(token: str) -> str:
    """The readable text of a token, empty where its bytes are no UTF-8 of their own."""
    printable, other = byte_order()
    to_byte = dict(zip(byte_symbols(), printable + other, strict=True))
    raw = bytes(to_byte[c] for c in token.removesuffix("</w>") if c in to_byte)
    return raw.decode("utf-8", "ignore")


def write_tokenizer(folder: Path) -> None:
    """The tokenizer folder of a diffusers pipeline: vocab.json, merges.txt and their two configs."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(vocabulary())}
    # as bytes, which are the same on every machine: text would get Windows' line ends there
    (folder / "vocab.json").write_bytes(json.dumps(vocab, ensure_ascii=False).encode())
    (folder / "merges.txt").write_bytes(("#version: 0.2\n" + "\n".join(merges()) + "\n").encode())
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_bytes(json.dumps(special, indent=1).encode())
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_bytes(json.dumps(config, indent=1).encode())
