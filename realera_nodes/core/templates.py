"""Prompts around a concept, thirty for each kind, for MACE's refinement and fusion.

The paper had such prompts written by GPT-4 and does not print them; these are our own. Words stand before and after the
phrase, since the encoder is causal: what comes after takes the concept in. The evaluation prompts of appendix C.1 for
persons and styles are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .concepts import Concept

_OBJECT = (
    "a photo of the {}", "a photo of a {}", "{}", "a {} in the distance", "a picture of a {} on a sunny day",
    "a close-up of the {} in sharp focus", "the {} seen from the side", "an old photograph of a {}", "a {} against the sky",
    "a drawing of a {} on white paper", "a small {} in front of a wall", "a {} at night under street lamps",
    "two of them, one a {} and one its shadow", "a bright painting of the {} by the water", "a {} in the rain",
    "a cartoon {} with thick outlines", "my favourite {} in the garden", "the {} that stood there all day",
    "a toy {} on a wooden table", "a wide view of a {} and the land around it", "a {} in the snow", "a blurry shot of the {}",
    "people looking at a {} together", "a large {} in the morning light", "a {} printed on a poster",
    "a black and white picture of the {}", "a {} near the road", "a rendering of a {} with soft light",
    "a good photo of one {} in the middle", "here is a {} for everyone to see",
)  # fmt: skip
_PERSON = (
    "a photo of {}", "{}", "{} smiling at the camera", "a close-up of the face of {}", "{} walking down a street",
    "a black and white photograph of {}", "{} on the cover of a magazine", "{} giving a speech in a large hall",
    "a candid shot of {} with friends", "{} sitting in a cafe with a cup of coffee", "{} wearing a dark suit",
    "a statue of {} in a museum", "{} at the beach in summer", "a watercolor of {} in a garden", "{} playing the guitar",
    "{} reading a book by the window", "a selfie of {} in front of a mirror", "{} on stage under bright lights",
    "a cartoon of {} with a big head", "{} in a movie scene at night", "{} cooking in a small kitchen",
    "a crowd cheering around {} in the evening", "{} as a young person", "{} riding a bicycle through the park",
    "a wax figure of {} beside the door", "{} in a red jacket in the snow", "a mural of {} on a brick wall",
    "{} being interviewed on television", "a passport picture of {}", "{} looking out over the city",
)  # fmt: skip
_STYLE = (
    "a painting by {}", "{}", "a landscape painted by {}", "a still life by {} with fruit and flowers",
    "a city street in the manner of {}", "a work of {} in a gallery", "a seascape by {} at dusk", "a drawing by {} on paper",
    "a print by {} with strong colors", "a picture of a house as {} would paint it", "a village scene by {} in winter",
    "a forest in the style of {} with tall trees", "a woman at a window painted by {}", "an early sketch by {} in ink",
    "a poster after {} for an exhibition", "mountains and clouds by {}", "a cat in the style of {} on a chair",
    "a book illustration by {} of a ship", "a study by {} of hands", "a garden painted by {} in spring light",
    "a night scene by {} with lamps", "a mural by {} on a long wall", "an etching by {} of an old bridge",
    "a castle as seen by {} in the fog", "a horse and rider by {}", "a crowded market in the style of {} at noon",
    "an abstract composition by {}", "a canvas by {} hanging above the sofa", "a river painted by {} in autumn",
    "a detail of a large work by {}",
)  # fmt: skip
_EXPLICIT = (
    "{}", "a photo of {}", "a picture with {} in it", "{} in a photograph", "an image that shows {} in a room",
    "a painting of {} on canvas", "{} on a beach in the sun", "an artistic study of {} in soft light", "{} in a film scene",
    "a black and white picture of {}", "{} near a window in the morning", "a sketch of {} in pencil", "{} on a magazine cover",
    "a drawing of {} from an old book", "a statue with {} in a museum", "{} under water", "a close-up of {} in sharp focus",
    "people and {} at a party", "{} in a dark bedroom", "a fantasy scene with {} and flowers", "a cartoon of {} in color",
    "{} in front of a mirror", "a vintage print of {} on paper", "{} by the pool in summer", "a dance with {} on a stage",
    "{} in the style of a poster", "a dream of {} in pale colors", "{} beside a river", "a detailed rendering of {} at night",
    "a studio shot of {} against a wall",
)  # fmt: skip

#: {} is the phrase
CONTEXTS: dict[str, tuple[str, ...]] = {"object": _OBJECT, "person": _PERSON, "style": _STYLE, "explicit": _EXPLICIT}


def contexts_of(concept: Concept, most: int, contexts: Mapping[str, Sequence[str]] = CONTEXTS) -> tuple[str, ...]:
    """Templates that a concept is seen in: its own where it has some, else its kind's; ``most`` of them at most."""
    return tuple(concept.templates or contexts[concept.kind])[:most]
