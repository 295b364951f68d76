"""What ComfyUI and its registry pick up besides the nodes: example workflows, languages, the archive."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import realera_nodes
from tests import test_nodes_schema
from tests.ui_graphs import CORE, NOTES, prompt_of, structure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

nodes = test_nodes_schema.nodes

PACK = Path(realera_nodes.__file__).parents[1]
EXAMPLES = PACK / "example_workflows"
LOCALES = PACK / "locales"
DRAWN = sorted(EXAMPLES.glob("*.json"))
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
TITLE = 30  # height of a node's title, which is above its place


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def widgets_of(schema: Any) -> list[str]:
    """Names of the inputs that are widgets, in the page's order: those with a default, required ones first."""
    return [i.id for i in sorted(schema.inputs, key=lambda i: i.optional) if i.default is not None]


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def test_each_api_example_is_drawn_and_pictured() -> None:
    names = [p.stem for p in sorted((EXAMPLES / "api").glob("*.json"))]
    assert len(names) == 6
    assert [p.stem for p in DRAWN] == names
    assert [p.stem for p in sorted(EXAMPLES.glob("*.jpg"))] == names
    for path in EXAMPLES.glob("*.jpg"):
        assert path.stat().st_size < 60_000, path.name
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 200


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_a_drawing_sends_what_the_api_example_does(nodes, path) -> None:
    widgets = CORE | {key: widgets_of(schema) for key, (_, schema) in nodes.items()}
    assert structure(prompt_of(read(path), widgets)) == structure(read(EXAMPLES / "api" / path.name))


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_a_drawings_parts_agree(nodes, path) -> None:
    drawn = read(path)
    parts = {node["id"]: node for node in drawn["nodes"]}
    links = {link[0]: link for link in drawn["links"]}
    assert len(parts) == len(drawn["nodes"])
    assert len(links) == len(drawn["links"])
    assert (max(parts), max(links)) == (drawn["last_node_id"], drawn["last_link_id"])
    for key, source, out, target, into, kind in drawn["links"]:
        left, right = parts[source]["outputs"][out], parts[target]["inputs"][into]
        assert key in left["links"]
        assert right["link"] == key
        assert left["type"] == right["type"] == kind
        assert parts[source]["order"] < parts[target]["order"]
    used = [i["link"] for n in parts.values() for i in n["inputs"] if i["link"] is not None]
    assert sorted(used) == sorted(links) == sorted(k for n in parts.values() for o in n["outputs"] for k in o["links"])
    for node in parts.values():
        if node["type"] in NOTES:
            continue
        ours = node["type"] in nodes
        pack = PROJECT["project"]["name"] if ours else "comfy-core"
        assert node["properties"] == {"cnr_id": pack, "Node name for S&R": node["type"]}
        if ours:
            schema = nodes[node["type"]][1]
            names = {i["name"] for i in node["inputs"]}
            assert {i.id for i in schema.inputs if not i.optional} <= names <= {i.id for i in schema.inputs}
            assert [o["name"] for o in node["outputs"]] == [o.display_name for o in schema.outputs]
            assert [i["name"] for i in node["inputs"] if "widget" in i] == widgets_of(schema)
            assert all(i["widget"] == {"name": i["name"]} for i in node["inputs"] if "widget" in i)


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.stem)
def test_a_drawing_reads_from_left_to_right(path) -> None:
    drawn = read(path)
    parts = {node["id"]: node for node in drawn["nodes"]}
    for a, b in itertools.combinations(parts.values(), 2):
        one, other = box(a), box(b)
        apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
        assert apart, (a["type"], b["type"])
    assert all(parts[source]["pos"][0] < parts[target]["pos"][0] for _, source, _, target, _, _ in drawn["links"])
    groups = [group["bounding"] for group in drawn["groups"]]
    assert all(a[0] + a[2] < b[0] for a, b in itertools.pairwise(groups))
    assert [group["title"].split(" - ")[0] for group in drawn["groups"]] == [str(i) for i in range(1, len(groups) + 1)]
    for node in parts.values():
        left, top, right, bottom = box(node)
        around = [g for g in groups if g[0] < left and right < g[0] + g[2] and g[1] < top and bottom < g[1] + g[3]]
        assert len(around) == (node["type"] not in NOTES), node["type"]
    (note,) = (n for n in parts.values() if n["type"] in NOTES)
    assert "python -m realera_nodes demo-model --layout checkpoint" in note["widgets_values"][0]
    assert all(f"**{i}**" in note["widgets_values"][0] for i in range(1, len(groups) + 1)) or len(groups) <= 3


def leaves(tree: Any, at: str = "") -> dict[str, str]:
    """Texts of a language by their place."""
    if isinstance(tree, str):
        return {at: tree}
    return {k: v for key, part in tree.items() for k, v in leaves(part, f"{at}/{key}").items()}


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_languages_say_the_same(language) -> None:
    files = {p.name for p in (LOCALES / "en").glob("*.json")}
    assert {p.name for p in (LOCALES / language).glob("*.json")} == files
    for name in files:
        english, other = (leaves(read(LOCALES / x / name)) for x in ("en", language))
        assert set(other) == set(english)
        for at, text in other.items():
            assert text.strip() == text != "", at
            if at.endswith("/name"):
                continue  # some are symbols: M, D1, CLIP
            kana, kanji = (re.search(letters, text) for letters in (r"[\u3040-\u30ff]", r"[\u4e00-\u9fff]"))
            assert (kana or kanji) if language == "ja" else (kanji and not kana), (at, text)
            terms = set(re.findall(r"\d+|W_[KV]|LoRA|UNet|VAE|Adam\w|SDXL|loras/|checkpoints/|\{\}|Markdown|JSON", english[at]))
            assert all(term in text for term in terms), (at, terms)


def test_every_node_is_in_every_language(nodes) -> None:
    for language in ("en", "zh", "ja"):
        words = read(LOCALES / language / "nodeDefs.json")
        assert set(words) == set(nodes)
        for key, (_, schema) in nodes.items():
            assert set(words[key]["inputs"]) == {i.id for i in schema.inputs}, (language, key)
            assert set(words[key].get("outputs", {})) == {str(i) for i in range(len(schema.outputs))}, (language, key)


def git(*arguments: str) -> set[str]:
    found = shutil.which("git")
    if found is None or not (PACK / ".git").exists():
        pytest.skip("NO GIT CHECKOUT: the registry's archive is what git holds, less .comfyignore")
    done = subprocess.run([found, "ls-files", "-z", *arguments], cwd=PACK, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (PACK / name).exists()}


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """What the registry's tool packs: files of git (and those not yet in it) without what .comfyignore names."""
    return git("-c", "-o", "--exclude-standard") - git("-c", "-o", "-i", "--exclude-from=.comfyignore")


def test_the_archive_holds_what_runs_and_nothing_else(archive) -> None:
    tops = {name.split("/")[0] for name in archive}
    assert tops == {
        "LICENSE", "README.md", "__init__.py", "example_workflows", "install.py", "locales", "pyproject.toml", "realera_nodes",
        "requirements.txt", "web",
    }  # fmt: skip
    for folder in ("realera_nodes", "web", "locales", "example_workflows"):
        there = {p.relative_to(PACK).as_posix() for p in (PACK / folder).rglob("*") if p.is_file()}
        assert {p for p in there if "__pycache__" not in p} <= archive
    # the example workflows need the checkpoint, which is made from these
    assert {f"realera_nodes/demo/assets/{n}.safetensors" for n in ("text", "unet", "vae")} <= archive


#: imports the pack as ComfyUI does: from a folder, under a name made of its path, without the packages given
LOAD = """
import asyncio, importlib.abc, importlib.machinery, importlib.util, sys
from unittest.mock import MagicMock
folder, stages, absent = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
class Host(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        if top in absent:
            raise ModuleNotFoundError(name)
        if top in ("comfy", "comfy_api", "folder_paths", "latent_preview", "server", "node_helpers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec)
        module.ComfyExtension = module.io.ComfyNode = object
        return module
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Host())
spec = importlib.util.spec_from_file_location("pack", folder + "/__init__.py", submodule_search_locations=[folder])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
async def load():
    return await (await pack.comfy_entrypoint()).get_node_list()
print(*(node.__name__ for node in asyncio.run(load())))
for stage in stages:
    importlib.import_module("pack." + stage)
assert all(m.__file__.startswith(folder) for n, m in sys.modules.items() if n.startswith("pack.")), "from elsewhere"
"""


def imported_late(folder: Path) -> set[str]:
    """Modules of the pack that nodes import only when they run."""
    found = set()
    for path in (folder / "realera_nodes" / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ["realera_nodes", "nodes"][: 3 - node.level]
                found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def test_the_archive_is_enough_without_the_headless_packages(archive, nodes, tmp_path) -> None:
    for name in archive:
        if not name.startswith("realera_nodes/demo/assets/"):  # large, and read only by the demo
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK / name, tmp_path / name)
    stages = imported_late(tmp_path)
    assert "realera_nodes.backends.comfy" in stages
    absent = [re.split(r"[^\w-]", r)[0] for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra]
    absent = [name.replace("-", "_") for name in (*absent, "gradio")]
    assert {"diffusers", "peft", "transformers", "typer"} <= set(absent)
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path), " ".join(sorted(stages)), " ".join(absent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [cls.__name__ for cls, _ in nodes.values()]


def test_the_registry_finds_its_fields() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert comfy["Icon"] == "" or comfy["Icon"].startswith("https://")
    assert "web" not in comfy  # the pack names its folder itself: each script would be loaded twice
    with Image.open(PACK / "docs" / "images" / "icon.png") as icon:
        assert icon.size == (400, 400)


def test_the_readme_shows_the_client() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (PACK / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [b for b in blocks if "websockets" in b] == [(EXAMPLES / "client.py").read_text(encoding="utf-8")]
