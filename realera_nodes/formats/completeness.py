"""Whether a UNet's names are all of a network: a part that is missing altogether leaves no trace but in its neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..core.errors import ErasureError

_BLOCK = re.compile(r"(?P<place>.+)\.transformer_blocks\.(?P<n>\d+)\.(?P<rest>.+)")
#: what surrounds transformers in their place
_SHELL = re.compile(r"(?P<place>((in|out)put_blocks\.\d+\.\d+|middle_block\.\d+|.+\.attentions\.\d+))\.(proj_in|proj_out|norm)\.")
_NUMBERED = re.compile(r"(?:^|\.)(?P<what>down_blocks|up_blocks|attentions|resnets|transformer_blocks)\.(?P<n>\d+)(?=\.)")
_LEVEL = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<what>attentions|resnets)\.(?P<n>\d+)\.")
_DEPTH = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.attentions\.(?P<n>\d+)\.transformer_blocks\.(?P<t>\d+)\.")
_PAIR = ("attn2.to_k.weight", "attn2.to_v.weight")


def require_whole(stored: Iterable[str], canonical: Iterable[str]) -> None:
    """Refuses a UNet in which a transformer, its cross-attention or a block is missing.

    Stable Diffusion's UNets, and those that were distilled from them (SSD-1B, Vega, BK-SDM), have attention in all blocks of
    a level or in none, on the way up where they have it on the way down; only the middle may lack it.

    Args:
        stored: names as the file has them, without the prefix
        canonical: diffusers' names of the same parameters, as far as they are known

    Raises:
        ErasureError: something is missing; the neighbours that tell so are named.
    """
    stored = list(stored)
    _require_numbers(stored)
    _require_cross_attention(stored)
    canonical = list(canonical)
    _require_even_levels(canonical)
    _require_depths(canonical)


def _require_cross_attention(names: list[str]) -> None:
    blocks: dict[tuple[str, str], set[str]] = {}
    shells: dict[str, str] = {}
    for name in names:
        if m := _BLOCK.fullmatch(name):
            blocks.setdefault((m["place"], m["n"]), set()).add(m["rest"])
        elif m := _SHELL.match(name):
            shells.setdefault(m["place"], name)
    for (place, n), rest in blocks.items():
        missing = [part for part in _PAIR if part not in rest]
        if missing:
            there = next((r for r in sorted(rest) if r in _PAIR), sorted(rest)[0])
            raise _incomplete(f"{place}.transformer_blocks.{n}.{there}", " and ".join(missing))
    filled = {place for place, _ in blocks}
    for place, name in shells.items():
        if place not in filled:
            raise _incomplete(name, f"{place}.transformer_blocks")


def _require_numbers(names: list[str]) -> None:
    found: dict[str, set[int]] = {}
    for name in names:
        for m in _NUMBERED.finditer(name):
            found.setdefault(name[: m.end("what")], set()).add(int(m["n"]))
    for what, numbers in found.items():
        for n in range(max(numbers)):
            if n not in numbers:
                raise _incomplete(f"{what}.{max(numbers)}", f"{what}.{n}")


def _require_even_levels(names: Iterable[str]) -> None:
    counts: dict[tuple[str, int], dict[str, set[int]]] = {}
    for name in names:
        if m := _LEVEL.match(name):
            own = counts.setdefault((m["side"], int(m["level"])), {"attentions": set(), "resnets": set()})
            own[m["what"]].add(int(m["n"]))
    for (side, level), there in counts.items():
        if there["attentions"] and there["resnets"] - there["attentions"]:
            n = min(there["resnets"] - there["attentions"])
            raise _incomplete(
                f"{side}_blocks.{level}.attentions.{min(there['attentions'])}", f"{side}_blocks.{level}.attentions.{n}"
            )
    levels = {side: sorted(n for s, n in counts if s == side and counts[s, n]["resnets"]) for side in ("down", "up")}
    if levels["down"] != levels["up"]:
        return  # not a whole network's names
    for n in levels["down"]:
        down, up = (bool(counts[side, m]["attentions"]) for side, m in (("down", n), ("up", levels["up"][-1 - n])))
        if down != up:
            has, lacks = (f"down_blocks.{n}", f"up_blocks.{levels['up'][-1 - n]}")[:: 1 if down else -1]
            raise _incomplete(f"{has}.attentions", f"{lacks}.attentions")


def _require_depths(names: Iterable[str]) -> None:
    """A transformer's last block can go without a trace. Going down, a level's are equally deep; going up, distilled models'
    differ (SSD-1B has 2, 1, 1 and 4, 4, 10), but not by one that is shallower than all others and the way down."""
    depths: dict[tuple[str, int], dict[int, int]] = {}
    for name in names:
        if m := _DEPTH.match(name):
            own = depths.setdefault((m["side"], int(m["level"])), {})
            own[int(m["n"])] = max(own.get(int(m["n"]), 0), int(m["t"]) + 1)
    levels = 1 + max((n for _, n in depths), default=0)
    for (side, level), there in depths.items():
        most = max(there.values())
        shallow = [n for n, depth in there.items() if depth < most]
        mirrored = set(depths.get(("down", levels - 1 - level), {}).values())
        if shallow and (side == "down" or (len(shallow) == 1 and mirrored == {most})):
            place = f"{side}_blocks.{level}.attentions.{shallow[0]}.transformer_blocks"
            raise _incomplete(f"{place}.{there[shallow[0]] - 1}", f"{place}.{most - 1}")


def _incomplete(has: str, lacks: str) -> ErasureError:
    return ErasureError(f"the UNet has {has} but not {lacks}: the file is incomplete, download it again.")
