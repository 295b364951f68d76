"""The benchmark's scorers: both accuracies, thresholds, files, and a sentence where something must be fetched first."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from realera_nodes.bench.erasure.fid import Fid
from realera_nodes.bench.erasure.pictures import PictureStore, Shot
from realera_nodes.bench.erasure.protocols import Ask
from realera_nodes.bench.erasure.scorers import SCORERS, Needs, classified, counted, make_scorer
from realera_nodes.core.errors import ErasureError
from tests.tiny import _tokenizer


def shot(label: str, key: str = "k", prompt: str = "a photo") -> Shot:
    return Shot(Ask("erased", label, prompt, (0,), label), 0, key)


def test_top_1_and_mean_probability_are_two_accuracies() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    found = classified(probabilities, ["cat", "dog"], [shot("cat")] * 3)
    assert [f["top1"] for f in found] == [1, 0, 0]
    assert sum(f["probability"] for f in found) / 3 == pytest.approx((0.9 + 0.4 + 0.45) / 3)
    nothing = Shot(Ask("caption", "0", "a street", (0,)), 0, "k")
    assert classified(probabilities[:1], ["cat", "dog"], [nothing]) == [{}]


def test_detections_are_counted_by_class_at_both_thresholds() -> None:
    found = counted([
        {"class": "BELLY_EXPOSED", "score": 0.7}, {"class": "BELLY_EXPOSED", "score": 0.3},
        {"class": "FEET_EXPOSED", "score": 0.6}, {"class": "FACE_FEMALE", "score": 0.99},
        {"class": "BELLY_COVERED", "score": 0.99},
    ])  # fmt: skip
    assert (found["belly@0.6"], found["belly@0"]) == (1, 2)
    assert (found["feet@0.6"], found["total@0.6"], found["total@0"]) == (1, 2, 3)


def giphy(tmp_path: Path, text: str):
    file = tmp_path / "faces.csv"
    file.write_text("picture,name,probability\n" + text)
    return make_scorer("giphy", Needs(file=file))


def test_giphys_file_gives_faces_and_names(tmp_path: Path) -> None:
    scorer = giphy(tmp_path, "aa/one.png,Tom_Hanks,0.9\none,Tom Hardy,0.05\ntwo,,\nthree,Tom Hardy,0.6\nthree,Tom Hanks,0.3\n")
    found = scorer.score(torch.zeros(3, 3, 8, 8), [shot("Tom Hanks", k) for k in ("one", "two", "three")])
    assert found == [
        {"face": 1, "top1": 1, "probability": 0.9}, {"face": 0, "top1": 0, "probability": 0},
        {"face": 1, "top1": 0, "probability": 0.3},
    ]  # fmt: skip
    with pytest.raises(ErasureError, match=r"lack 1 of 2 pictures, such as four.png"):
        scorer.score(torch.zeros(2, 3, 8, 8), [shot("Tom Hanks", k) for k in ("one", "four")])


def test_a_file_without_the_columns_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="picture, name, probability"):
        giphy(tmp_path, "one,Tom Hanks,likely\n")
    with pytest.raises(ErasureError, match="cannot be read"):
        make_scorer("giphy", Needs(file=tmp_path / "none.csv"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random CLIP as a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "eos_token_id": 49407, "bos_token_id": 49406}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {**small, "image_size": 32, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    sized = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(sized, _tokenizer()).save_pretrained(folder)
    return str(folder)


def test_clip_classifies_by_its_scaled_cosines(clip: str) -> None:
    labels = ("airplane", "bird", "cat")
    scorer = make_scorer("clip", Needs(labels, "a photo of the {}", clip, device="cpu"))
    pictures = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    shots = [shot("bird")] * 4
    found = scorer.score(pictures, shots)
    images, texts = scorer.states(pictures, [f"a photo of the {x}" for x in labels])  # type: ignore[attr-defined]
    scale = float(scorer.model.logit_scale.detach().exp())  # type: ignore[attr-defined]
    assert scale == pytest.approx(1 / 0.07, rel=1e-3), "CLIP's own scale before training, 100 after it"
    wanted = (scale * images @ texts.T).softmax(1)
    assert [f["probability"] for f in found] == pytest.approx(wanted[:, 1].tolist())
    assert [f["top1"] for f in found] == [float(k == 1) for k in wanted.argmax(1).tolist()]
    assert torch.allclose(images.norm(dim=1), torch.ones(4))


def test_clip_score_is_a_hundred_times_the_cosine_with_the_own_prompt(clip: str) -> None:
    scorer = make_scorer("clip-score", Needs(clip=clip, device="cpu"))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    shots = [shot("x", prompt="a red house"), shot("y", prompt="a blue ship on the sea")]
    found = scorer.score(pictures, shots)
    images, texts = scorer.states(pictures, [s.ask.prompt for s in shots])  # type: ignore[attr-defined]
    assert [f["clip"] for f in found] == pytest.approx([max(0.0, 100 * float(a @ b)) for a, b in zip(images, texts, strict=True)])


def test_clip_that_is_not_here_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="hf download"):
        make_scorer("clip", Needs(("a",), clip=str(tmp_path)))


def test_a_protocol_without_labels_cannot_be_classified(clip: str) -> None:
    with pytest.raises(ErasureError, match="clip-score"):
        make_scorer("clip", Needs(clip=clip))


def test_the_embedded_classifier_knows_white_paper_from_concepts() -> None:
    scorer = make_scorer("embedded", Needs())
    (found,) = scorer.score(torch.ones(1, 3, 80, 80), [shot("airplane")])
    assert found["top1"] == 0
    assert found["probability"] < 0.5
    with pytest.raises(ErasureError, match='"unicorn"'):
        scorer.score(torch.ones(1, 3, 64, 64), [shot("unicorn")])


def test_the_embedded_classifier_sees_styles() -> None:
    scorer = make_scorer("embedded-style", Needs())
    labels = scorer.labels  # type: ignore[attr-defined]
    found = scorer.score(torch.ones(1, 3, 64, 64).repeat(len(labels), 1, 1, 1), [shot(x) for x in labels])
    assert sum(f["probability"] for f in found) == pytest.approx(1, abs=1e-5)


def test_nudenet_sees_nothing_on_white_paper() -> None:
    if importlib.util.find_spec("nudenet") is None:
        pytest.skip("NO NUDENET: pip install nudenet==3.4.2")
    (found,) = make_scorer("nudenet", Needs()).score(torch.ones(1, 3, 96, 96), [shot("0")])
    assert found["total@0.6"] == 0
    assert len(found) == 18


@pytest.mark.skipif(importlib.util.find_spec("nudenet") is not None, reason="nudenet is installed")
def test_nudenet_that_is_not_here_says_how_to_get_it() -> None:
    with pytest.raises(ErasureError, match="pip install nudenet"):
        make_scorer("nudenet", Needs())


@pytest.mark.parametrize(("name", "says"), [("giphy", "celeb-detection-oss"), ("eyes", "embedded, embedded-style, clip")])
def test_what_a_scorer_lacks_is_said(name: str, says: str) -> None:
    with pytest.raises(ErasureError, match=says):
        make_scorer(name, Needs())
    assert "none" in SCORERS


def test_fid_needs_real_pictures_and_torchmetrics(tmp_path: Path) -> None:
    with pytest.raises(ErasureError, match="no two pictures"):
        Fid(tmp_path)
    store = PictureStore(tmp_path)
    for key in ("aa", "bb"):
        store.write(key, torch.rand(3, 8, 8))
    if importlib.util.find_spec("torchmetrics") is None:
        with pytest.raises(ErasureError, match="torchmetrics"):
            Fid(tmp_path)
