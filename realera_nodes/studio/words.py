"""Pieces of the page as HTML. Everything that comes from outside is escaped here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .runs import CANCELLED, DONE, FAILED, INTERRUPTED, QUEUED, RUNNING, Run

GOES = ("concept", "synonym", "associated")
GROUP_NAMES = {
    "concept": "the concept", "synonym": "its other names", "associated": "evokes it", "preserved": "you keep it",
    "unrelated": "unrelated",
}  # fmt: skip
KIND_NAMES = {"look": "looking around", "preview": "preview", "erase": "erasing"}
STATE_NAMES = {
    QUEUED: "waiting",
    RUNNING: "at work",
    DONE: "done",
    FAILED: "failed",
    CANCELLED: "cancelled",
    INTERRUPTED: "interrupted",
}
NUMBERS = {
    "Acc_e": ("concept still seen", "lower is better"), "Acc_g": ("its other names still seen", "lower is better"),
    "residue": ("what evokes it still seen", "lower is better"), "Acc_s": ("everything else still seen", "higher is better"),
    "H_o": ("overall (H_o)", "1 is best"),
}  # fmt: skip


def seconds(value: float) -> str:
    """Such as 50 s, 4 min, 2.5 h."""
    if value < 90:
        return f"{max(1, round(value))} s"
    return f"{round(value / 60)} min" if value < 5400 else f"{value / 3600:.1f} h"


def size(count: int) -> str:
    """Such as 12 kB, 3.4 MB, 2.13 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def _capital(sentence: str) -> str:
    """With a capital letter, unless it begins with a name such as alignment.lr."""
    return sentence[:1].upper() + sentence[1:] if sentence.partition(" ")[0].isalpha() else sentence


def problem(sentence: str, log: str = "") -> str:
    """An error: one sentence, the log behind a fold."""
    fold = f"<details><summary>Log</summary><pre>{escape(log)}</pre></details>" if log else ""
    return f'<div class="problem" role="alert"><p>{escape(_capital(sentence))}</p>{fold}</div>'


def progress(run: Run, ahead: int) -> str:
    """Where a run is: its place in the queue, bar and time left, or how it ended."""
    state = run.state
    name = state["state"]
    if name == QUEUED:
        wait = f"{ahead} {'run' if ahead == 1 else 'runs'} before it" if ahead else "it is next"
        return f'<div class="status" role="status"><p>Waiting: {wait}. You may close this tab.</p></div>'
    if name == RUNNING:
        share = float(state.get("fraction") or 0)
        counts = f" {state['done']}/{state['total']}" if 1 < state["total"] < 1e6 else ""
        left = f", about {seconds(state['eta'])} left" if state.get("eta") is not None else ""
        stage = escape(state["stage"] or "starting")
        return (f'<div class="status" role="status"><p><b>{stage}</b>{counts}{left}</p>'
                f'<div class="bar" role="progressbar" aria-valuenow="{share * 100:.0f}" aria-valuemin="0" aria-valuemax="100" '
                f'aria-label="{stage}"><div style="width:{share * 100:.1f}%"></div></div></div>')  # fmt: skip
    took = f" in {seconds(state['finished'] - state['started'])}" if state.get("finished") and state.get("started") else ""
    if name == FAILED:
        return problem(state.get("error", "the work failed."), run.log)
    if name == INTERRUPTED:
        return problem("the studio was closed in the middle of this: continue it, what was found and trained is kept.", run.log)
    if name == CANCELLED:
        more = " What was found and trained is kept: continue it, or start anew." if run.kind == "erase" else ""
        return f'<div class="status" role="status"><p>Cancelled{took}. No file is half-written.{more}</p></div>'
    return f'<div class="status done" role="status"><p>Done{took}.</p></div>'


def queue(runs: Sequence[Run], mine: Sequence[str]) -> str:
    """Everybody's runs in their order."""
    if not runs:
        return '<div class="queue" role="status">Nothing is at work: what you start begins at once.</div>'
    items = []
    for i, run in enumerate(runs):
        state = run.state
        own = " (yours)" if run.id in mine else ""
        what = f"{KIND_NAMES[run.kind]}: {escape(run.request.title)}{own}"
        if i == 0 and state["state"] == RUNNING:
            left = f", about {seconds(state['eta'])} left" if state.get("eta") is not None else ""
            share = f"{float(state.get('fraction') or 0):.0%}"
            items.append(f"<li><b>at work</b> {what}, {share} done, now {escape(state['stage'] or 'starting')}{left}</li>")
        else:
            items.append(f"<li><b>waiting</b> {what}</li>")
    return f'<div class="queue" role="status"><ol>{"".join(items)}</ol></div>'


def around(place: Mapping[str, Any], judged: bool) -> str:
    if not judged:
        return hint("The map shows samples around the concept. The model is being asked which words draw the same picture.")
    return hint(
        f"{place['near']} words of the model's vocabulary draw what “{place['concept']}” draws and are erased with it; "
        f"{place['kept']} are near in text only and stay. The strongest are listed here; tick what you want otherwise."
    )


def cards(preview: Mapping[str, Any]) -> str:
    """Before and after, prompt by prompt."""
    parts = []
    for c in preview["cards"]:
        goes = c["group"] in GOES
        tag = f'<span class="tag {"goes" if goes else "stays"}">{"should go" if goes else "should stay"}</span>'
        seen = ""
        if c["seen"]:
            old, new = (escape(s) for s in c["seen"])
            seen = f'<span class="seen">seen as {old} → {new}</span>'
        images = "".join(
            f'<figure><img src="{escape(c[k])}" alt="{escape(c["label"])}, {k}"><figcaption>{k}</figcaption></figure>'
            for k in ("before", "after")
        )
        parts.append(f'<div class="card"><div class="pair">{images}</div><b>{escape(c["label"])}</b>'
                     f'<span class="about">{GROUP_NAMES[c["group"]]}</span>{tag}{seen}</div>')  # fmt: skip
    note = hint(f"Same seeds, strength {preview['strength']:g}. Nothing was trained or written.")
    if preview["mass"]:
        note = hint("Same seeds. MACE's refinement alone, which has no strength; its LoRAs come with the training.")
    return f'{note}<div class="cards">{"".join(parts)}</div>'


def live(table: Mapping[str, Any]) -> str:
    """What the student draws while it is trained, oldest first."""
    frames = []
    for frame in table["frames"][-6:]:
        images = "".join(
            f'<img src="{escape(uri)}" alt="{escape(label)} at step {frame["step"]}" title="{escape(label)}">'
            for label, uri in zip(table["labels"], frame["pictures"], strict=True)
        )
        frames.append(f'<figure><div class="stack">{images}</div><figcaption>step {frame["step"]}</figcaption></figure>')
    names = " above, ".join(f"“{escape(n)}”" for n in table["labels"]) + (" below" if len(table["labels"]) > 1 else "")
    return f'<p class="hint">While it trains: {names}</p><div class="frames">{"".join(frames)}</div>'


def slider(row: Mapping[str, Any], before: str, after: str) -> str:
    """Two pictures with a line between them, moved by mouse, finger or arrow keys. Gradio's own knows only the mouse."""
    seen = ""
    if row["seen"]:
        old, new = (escape(", ".join(s)) for s in row["seen"])
        seen = f" A classifier sees {old} before and {new} after."
    label = escape(row["label"])
    wish = "It should go." if row["group"] in GOES else "It should stay."
    return (
        f'<div class="compare"><div class="sheets"><img src="{escape(before)}" alt="{label}, before">'
        f'<img class="after" src="{escape(after)}" alt="{label}, after"><i></i></div>'
        '<div class="ends"><span>before</span><span>after</span></div>'
        '<input type="range" min="0" max="100" value="50" aria-label="Line between before and after" '
        "oninput=\"this.parentNode.style.setProperty('--at', this.value + '%')\">"
        f'<p class="hint">“{escape(row["prompt"])}”, same seeds. {wish}{seen}</p></div>'
    )


def damage(report: Mapping[str, Any]) -> str:
    """The report's numbers: accuracies where a scorer judged, and what moved."""
    parts = []
    if report["after"]:
        rows = []
        for key, after in report["after"].items():
            name, better = NUMBERS.get(key, (key, ""))
            before = report["before"].get(key)
            shown = [("-" if v is None else f"{v:.2f}" if key == "H_o" else f"{v:.0%}") for v in (before, after)]
            rows.append((f"{name} <small>{key}, {better}</small>", *shown))
        parts.append(_table("What a classifier sees", ("", "before", "after"), rows))
    rows = []
    for group, change in report["picture_change"].items():
        drift, left = (report.get(k, {}).get(group) for k in ("value_drift", "embedding_residue"))
        rows.append(
            (escape(GROUP_NAMES.get(group, group)), f"{change:.3f}", *("-" if v is None else f"{v:.0%}" for v in (drift, left)))
        )
    parts.append(_table("Damage report", ("prompts", "pixels changed", "values moved", "residue"), rows))
    told = "Pixels: root mean square, 0 to 1. Values: how far W_V's output moves. Residue: what is left of the way to the anchor."
    parts.append(hint(told))
    for concept, words in report.get("named_neighbors", {}).items():
        if words:
            told = f"{len(words)} words went along with {escape(concept)}"
            parts.append(f"<details><summary>{told}</summary><p>{escape(', '.join(words))}</p></details>")
    return "".join(parts)


def files(rows: Sequence[Mapping[str, Any]], link) -> str:
    """Names, sizes and places of what was written. ``link``: path -> address."""
    shown = []
    for f in rows:
        name = escape(f["name"])
        if link(f["place"]):
            name = f'<a href="{escape(link(f["place"]))}" download="{name}">{name}</a>'
        shown.append((f"{name}<br><small>{escape(f['meaning'])}</small>", size(f["bytes"])))
    folder = escape(rows[0]["place"].rsplit(rows[0]["name"], 1)[0]) if rows else ""
    return _table("Files", ("", "size"), shown) + f'<p class="hint">They are in <code>{folder}</code></p>'


def history(runs: Sequence[Run], link) -> str:
    """Erasures, newest first. ``link``: id -> address."""
    if not runs:
        return hint(
            "No erasure was started yet. They are listed here, and can be opened again, for as long as their folders are kept."
        )
    rows = []
    for run in runs:
        asked, request, state = run.asked, run.request, run.state["state"]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(asked["created"]))
        title = f'<a href="{escape(link(run.id))}">{escape(request.title)}</a>'
        rows.append(
            (
                title,
                when,
                escape(request.model),
                escape(request.method),
                f'<span class="state {state}">{STATE_NAMES[state]}</span>',
            )
        )
    return _table("Erasures", ("concept → anchor", "when", "model", "method", ""), rows)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
