"""Graphs as ComfyUI's page stores them: what they send to the server, and whether two graphs are the same but for their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

#: widgets of core nodes in the page's order; None is a control that the page keeps to itself
CORE: dict[str, tuple[str | None, ...]] = {
    "CheckpointLoaderSimple": ("ckpt_name",), "CLIPTextEncode": ("text",), "EmptyLatentImage": ("width", "height", "batch_size"),
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"), "VAEDecode": (),
    "SaveImage": ("filename_prefix",), "LoraLoaderModelOnly": ("lora_name", "strength_model"),
}  # fmt: skip
NOTES = {"MarkdownNote"}


def prompt_of(drawn: Mapping[str, Any], widgets: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """The API form of a graph of the page. Nodes without ``widgets`` raise KeyError, other counts of values ValueError."""
    links = {link[0]: [str(link[1]), link[2]] for link in drawn["links"]}
    graph = {}
    for node in drawn["nodes"]:
        if node["type"] in NOTES:
            continue
        values = dict(zip(widgets[node["type"]], node["widgets_values"], strict=True))
        values.pop(None, None)
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": values | linked}
    return graph


def structure(graph: Mapping[str, Any]) -> Counter:
    """Each node of an API graph by type, values and, in place of ids, all that it hangs on."""
    seen: dict[str, tuple] = {}

    def of(name: str) -> tuple:
        if name not in seen:
            part = graph[name]
            seen[name] = (part["class_type"], tuple(sorted((key, value(v)) for key, v in part["inputs"].items())))
        return seen[name]

    def value(given: Any) -> tuple:
        if isinstance(given, list):
            return ("link", repr(of(given[0])), given[1])
        # the page writes 1 for 1.0; true is no 1
        return (
            ("number", float(given)) if isinstance(given, int | float) and not isinstance(given, bool) else ("value", repr(given))
        )

    return Counter(of(name) for name in graph)
