"""Nodes, their defaults, docs, locales and example workflows agree. ComfyUI's classes are stood in for: no server here."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import realera_nodes
from realera_nodes.core.alignment import AlignmentConfig
from realera_nodes.core.closed_form import ClosedFormConfig
from realera_nodes.core.errors import ErasureError
from realera_nodes.core.esd import EsdConfig
from realera_nodes.core.neighbors import NeighborConfig
from realera_nodes.core.refinement import RefinementConfig
from realera_nodes.core.suppression import SuppressionConfig
from realera_nodes.core.uce import UceConfig
from realera_nodes.erasure import ErasureConfig
from realera_nodes.job import Job
from tests.node_names import DISPLAY

PACK = Path(realera_nodes.__file__).parents[1]
FOLDER = PACK / "realera_nodes" / "nodes"


STOOD_IN = ("comfy_api", "realera_nodes.nodes", "folder_paths", "realera_nodes.backends.comfy_mass")


class Socket:
    """Stands for an input or output class: keeps what it was given."""

    def __init__(self, id: str | None = None, **given: Any):
        self.id, self.given = id, given
        self.__dict__ |= {"tooltip": None, "default": None, "optional": False, "display_name": None} | given


class Kind:
    Input = Socket
    Output = Socket


class Namespace:
    """Stands for comfy_api's io: every type has sockets."""

    ComfyNode = object
    Hidden = types.SimpleNamespace(prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO", unique_id="UNIQUE_ID")
    NodeOutput = types.SimpleNamespace
    Schema = types.SimpleNamespace

    @staticmethod
    def Custom(name: str) -> type[Kind]:
        return Kind

    def __getattr__(self, name: str) -> type[Kind]:
        return Kind


@pytest.fixture(scope="module")
def nodes():
    """The node package, imported over stand-ins, by node id: (class, schema)."""
    api = types.ModuleType("comfy_api.v0_0_2")
    api.ComfyExtension, api.io, api.ui = object, Namespace(), Namespace()  # type: ignore[attr-defined]
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(STOOD_IN)}
    folders = types.ModuleType("folder_paths")
    folders.folder_names_and_paths = {"realera_priors": ([], set())}  # type: ignore[attr-defined]
    folders.get_filename_list = lambda name: [f"one of {name}.safetensors"]  # type: ignore[attr-defined]
    sys.modules |= {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.v0_0_2": api, "folder_paths": folders}
    try:
        package = importlib.import_module("realera_nodes.nodes")
        yield {schema.node_id: (cls, schema) for cls in package.NODES for schema in [cls.define_schema()]}
    finally:
        for name in [n for n in sys.modules if n.startswith(STOOD_IN)]:
            del sys.modules[name]
        sys.modules |= kept


def test_ids_names_and_category(nodes) -> None:
    assert {key: schema.display_name for key, (_, schema) in nodes.items()} == DISPLAY
    assert {schema.category for _, schema in nodes.values()} == {"model/erasure"}


def test_every_input_and_output_is_explained(nodes) -> None:
    for key, (_, schema) in nodes.items():
        assert schema.description
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip, (key, socket.id or socket.display_name)
            assert socket.tooltip.endswith("."), (key, socket.tooltip)
        names = [i.id for i in schema.inputs]
        assert len(names) == len(set(names))
        assert all(o.id is None and o.display_name for o in schema.outputs)


def test_no_seed_changes_by_itself(nodes) -> None:
    seeds = [i for _, schema in nodes.values() for i in schema.inputs if i.id == "seed"]
    assert len(seeds) == 7
    assert not any(s.given["control_after_generate"] for s in seeds)


@pytest.mark.parametrize(
    ("key", "config", "renamed", "left_out"),
    [
        ("RealEra_MineNeighbors", NeighborConfig, {}, {"tries"}),
        ("RealEra_ClosedForm", ClosedFormConfig, {}, {"max_condition"}),
        ("RealEra_TrainLora", AlignmentConfig, {"neighbors": "neighbor_steps", "clip": "clip_norm"}, set()),
        ("RealEra_TrainSuppression", SuppressionConfig, {"clip": "clip_norm"}, set()),
        ("RealEra_Refinement", RefinementConfig, {}, {"lambda_2", "prior_rows", "double_scale", "max_condition"}),
        ("RealEra_FuseLoras", RefinementConfig, {}, {"lambda_1", "prior_rows", "double_scale", "max_condition", "head"}),
        ("RealEra_Erase", ErasureConfig, {}, {"neighbors", "closed_form", "alignment"}),
        ("RealEra_Uce", UceConfig, {}, {"max_condition"}),
        ("RealEra_TrainEsd", EsdConfig, {"clip": "clip_norm"}, set()),
    ],
)
def test_settings_are_the_dataclasses_own(nodes, key, config, renamed, left_out) -> None:
    inputs = {i.id: i for i in nodes[key][1].inputs}
    for field in dataclasses.fields(config):
        if field.name in left_out:
            continue
        found = inputs[renamed.get(field.name, field.name)]
        wanted = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        assert found.default == wanted, field.name
        if isinstance(wanted, int | float) and not isinstance(wanted, bool):
            assert found.given["min"] <= wanted <= found.given["max"], field.name
        if "range" in field.metadata and field.name != "seed":  # those of the host are 32 bits
            bounds = field.metadata["range"]
            assert (found.given["min"], found.given["max"], found.given["step"]) == (bounds.low, bounds.high, bounds.step), (
                field.name
            )


def test_execute_takes_what_the_schema_gives(nodes) -> None:
    for key, (cls, schema) in nodes.items():
        code = cls.execute.__func__.__code__
        named = set(code.co_varnames[1 : code.co_argcount])
        given = {i.id for i in schema.inputs}
        assert named <= given, key
        assert named == given or code.co_flags & 0x08, key  # or **settings takes the rest


def test_docs_name_every_input(nodes) -> None:
    pages = PACK / "web" / "docs"
    assert {p.stem for p in pages.glob("*.md")} == set(nodes)
    for key, (_, schema) in nodes.items():
        page = (pages / f"{key}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        assert "## Example" in page
        inputs, _, outputs = page.partition("## Outputs")
        rows = {line.split("`")[1]: line for line in inputs.splitlines() if line.startswith("| `")}
        assert set(rows) == {i.id for i in schema.inputs}
        assert all(f"| `{o.display_name}` | {o.tooltip} |" in outputs for o in schema.outputs)
        for i in schema.inputs:
            assert i.tooltip in page, (key, i.id)


def test_english_words_are_the_schemas(nodes) -> None:
    words = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(words) == set(nodes)
    for key, (_, schema) in nodes.items():
        found = words[key]
        assert (found["display_name"], found["description"]) == (schema.display_name, schema.description)
        assert {k: v["tooltip"] for k, v in found["inputs"].items()} == {i.id: i.tooltip for i in schema.inputs}
        outputs = found.get("outputs", {})
        assert [v["tooltip"] for v in outputs.values()] == [o.tooltip for o in schema.outputs]


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows" / "api").glob("*.json")), ids=lambda p: p.stem)
def test_api_examples_give_every_input_and_no_other(nodes, path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    for name, part in graph.items():
        links = [v for v in part["inputs"].values() if isinstance(v, list)]
        assert all(source in graph for source, _ in links), name
        if part["class_type"] in nodes:
            inputs = nodes[part["class_type"]][1].inputs
            assert set(part["inputs"]) <= {i.id for i in inputs}, name
            assert set(part["inputs"]) >= {i.id for i in inputs if not i.optional}, name


def test_nodes_hold_no_mathematics() -> None:
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("torch", "numpy", "math", "scipy") for n in names), path.name


def test_the_host_is_met_only_behind_the_backend() -> None:
    allowed = {
        "comfy.py",
        "comfy_text.py",
        "comfy_student.py",
        "comfy_edits.py",
        "comfy_output.py",
        "comfy_weights.py",
        "comfy_mass.py",
    }
    for path in (PACK / "realera_nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(n.split(".")[0] in ("comfy", "folder_paths", "latent_preview", "server", "execution") for n in names):
                assert path.parent.name == "backends", path
                assert path.name in allowed, path


def test_the_root_needs_no_comfyui_to_be_imported() -> None:
    tree = ast.parse((PACK / "__init__.py").read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.AsyncFunctionDef)}
    assert names == {"comfy_entrypoint"}
    assert not any(isinstance(n, ast.Import | ast.ImportFrom) and getattr(n, "module", "") != "__future__" for n in tree.body)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, None),
        ({"phrase": None}, None),  # wired up: known when it runs
        ({"phrase": ""}, "is empty"),
        ({"anchor": "AIRPLANE "}, "both erased and the anchor"),
        ({"preserve": "bird: 0"}, "must be above 0"),
    ],
)
def test_validation_speaks_in_sentences(nodes, given, sentence) -> None:
    words = {"phrase": "airplane", "anchor": "sky", "kind": "object", "aliases": "", "preserve": "", "templates": ""} | given
    found = nodes["RealEra_Concept"][0].validate_inputs(**words)
    assert found is True if sentence is None else sentence in found


def test_validation_of_settings(nodes) -> None:
    mine, edit, train = (nodes[f"RealEra_{k}"][0].validate_inputs for k in ("MineNeighbors", "ClosedForm", "TrainLora"))
    good = {"d1": 0.6, "d2": 1.5, "inner": 0.75, "s1": 0.98, "s2": 0.8, "response": 0.6, "response_beyond": 0.4,
            "nearest": 0.3, "learnt": 0.7}  # fmt: skip
    assert mine(**good) is True
    assert "together at most 1" in mine(**(good | {"nearest": 0.4}))
    assert "d2 is 0.5" in mine(**(good | {"d2": 0.5}))
    assert "they must rise" in mine(**(good | {"response_beyond": 0.7}))
    assert edit(keys=False, values=True) is True
    assert "neither W_K nor W_V" in edit(keys=False, values=False)
    assert train(targets="attn2.to_v") is True
    assert "targets is empty" in train(targets=" , ")
    uce, esd = (nodes[f"RealEra_{k}"][0].validate_inputs for k in ("Uce", "TrainEsd"))
    fine = {"tokens": "aligned", "to_anchor": True, "guide": "", "templates": "{}\na photo of {}", "keys": True, "values": False}
    assert uce(**fine) is True
    assert uce(**dict.fromkeys(fine)) is True  # wired up: known when it runs
    assert "set to_anchor off" in uce(**(fine | {"guide": "art"}))
    assert uce(**(fine | {"guide": "art", "to_anchor": False})) is True
    assert "neither W_K nor W_V" in uce(**(fine | {"keys": False}))
    assert "must hold {} once" in uce(**(fine | {"templates": "\n"}))
    assert "tokens is " in uce(**(fine | {"tokens": "all"}))  # the host itself takes any word in place of an option
    words = {"variant": "u", "origin": "concept", "drawn_by": None, "templates": "a photo of {}"}
    assert esd(**words) is True
    assert "must hold {} once" in esd(**(words | {"templates": "a photo"}))
    assert "variant is " in esd(**(words | {"variant": "y"}))


def test_numbers_that_the_host_does_not_check_are_checked(nodes) -> None:
    train = nodes["RealEra_TrainSuppression"][0].validate_inputs
    assert train(targets="attn2.to_k", t1=200.0, t2=400.0) is True
    assert train(targets="attn2.to_k", t1=None, t2=400.0) is True
    assert train(targets="attn2.to_k", t1=500.0, t2=400.0) == "t1 must be below t2."
    for t1, t2 in ((-1.0, 400.0), (200.0, 1e9), (float("nan"), 400.0), (None, -5.0), (1e9, None)):
        assert "it must lie between 0 and 1000" in train(targets="attn2.to_k", t1=t1, t2=t2)
    mine = nodes["RealEra_MineNeighbors"][0].validate_inputs
    good = {"d1": 0.6, "d2": 1.5, "inner": 0.75, "s1": 0.98, "s2": 0.8, "response": 0.6, "response_beyond": 0.4,
            "nearest": 0.3, "learnt": 0.7}  # fmt: skip
    for name, value in (("d1", -1.0), ("d2", 1e308), ("inner", float("nan")), ("s1", 2.0), ("nearest", float("inf"))):
        assert f"{name} is {value}" in mine(**(good | {name: value}))
    within = sys.modules["realera_nodes.nodes.parsing"].within
    within(Job, pictures=4, guidance=5.0)
    with pytest.raises(ErasureError, match="guidance is nan"):
        within(Job, guidance=float("nan"))
    with pytest.raises(ErasureError, match="pictures is 100000"):
        within(Job, pictures=100000)


def test_phrases_of_widgets_are_those_of_the_prompts(nodes) -> None:
    parsing = sys.modules["realera_nodes.nodes.parsing"]
    made = parsing.concept(
        "tracer\\n\\(overwatch\\)".replace("\\n", "\n"), "a\u200b woman", "person", "x\\(y\\)\n\u200b\nz", "bird \\(sky\\): 2"
    )
    assert (made.phrase, made.anchor, made.aliases) == ("tracer (overwatch)", "a woman", ("x(y)", "z"))
    assert [(k.phrase, k.weight) for k in made.preserve] == [("bird (sky)", 2.0)]
    assert parsing.words("a\\(b\\)\n\ufeff\nc d") == ("a(b)", "c d")
    check = nodes["RealEra_Concept"][0].validate_inputs
    words = {"phrase": "airplane", "anchor": "sky", "kind": "object", "aliases": "", "preserve": "", "templates": ""}
    assert "is empty" in check(**(words | {"phrase": "\u200b\ufeff"}))
    assert "no text" in check(**(words | {"anchor": "\ud800"}))
    assert "shorten it" in check(**(words | {"phrase": "x" * 100_000}))
    assert "the weight of preserved" in check(**(words | {"preserve": "bird: " + "9" * 400}))
    many = nodes["RealEra_EraseMany"][0].validate_inputs
    listed = {"kind": "object", "retained": "", "preset": "none", "targets": "attn2.to_k", "t1": 200.0, "t2": 400.0}
    assert many(list="tracer \\(overwatch\\) -> a woman", **listed) is True
    assert "twice" in many(list="x \\(y\\) -> a\nX (y) -> b", **listed)


def test_text_widgets_become_concepts(nodes) -> None:
    parsing = sys.modules["realera_nodes.nodes.parsing"]
    made = parsing.concept(" airplane ", "sky", "object", "jet\n\n airliner ", "bird\nships: 2.5\nratio 16:9 screen", "a {}\n{}")
    assert (made.phrase, made.aliases, made.prompts) == ("airplane", ("jet", "airliner"), ("a {}", "{}"))
    assert [(k.phrase, k.weight) for k in made.preserve] == [("bird", 1.0), ("ships", 2.5), ("ratio 16:9 screen", 1.0)]
    assert parsing.concept("a", "b", "object").templates is None


def test_graphs_of_earlier_versions_still_load_and_run(nodes) -> None:
    """Widgets that came later are optional and last: values go by their order, and inputs that are missing by their names."""
    later = {"RealEra_Uce": ["kept_tokens", "keep_empty"], "RealEra_TrainEsd": ["left_out"],
             "RealEra_TrainSuppression": ["prompts"], "RealEra_EraseMany": ["prompts"],
             "RealEra_ClosedForm": ["head"]}  # fmt: skip
    for key, names in later.items():
        widgets = [i for i in nodes[key][1].inputs if i.default is not None]
        assert [i.id for i in widgets[-len(names) :]] == names
        assert [i.id for i in widgets if i.optional] == names, key
    assert nodes["RealEra_Uce"][0].validate_inputs("aligned", True, "", "{}", True, True) is True
    assert nodes["RealEra_TrainEsd"][0].validate_inputs("u", "empty", "tuned", "{}") is True
    assert "kept_tokens is " in nodes["RealEra_Uce"][0].validate_inputs("aligned", True, "", "{}", True, True, "some")
    assert "left_out is " in nodes["RealEra_TrainEsd"][0].validate_inputs("u", "empty", "tuned", "{}", "all")
    mass = sys.modules["realera_nodes.nodes.mass_inputs"]
    given = {i.id: i.default for i in mass.SUPPRESSION}
    for paper in (True, False):
        assert mass.suppression_config("object", paper, 0, given).prompts == 30
        assert mass.suppression_config("object", paper, 0, given | {"prompts": 1}).prompts == 1
