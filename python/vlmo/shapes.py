"""A data set without files: captioned pictures of coloured shapes, questions and statements about them.

Every picture follows from (seed, index, split) alone, on any machine. It shows one to three shapes on a plain
background and is described exactly: no caption of another meaning is true of it. Four kinds, 40, 35, 10 and 15 % of
the pictures:

    place  "a small red circle at the top left on white"
    pair   "a large blue star above a small pink square on gray"
    line   "a red circle, a blue square and a green star in a row on black" (left to right, top to bottom)
    count  "two small red crosses on white", "two small red crosses and one large blue star on white"

There are `NUM_CAPTIONS` captions, of at most `MAX_TOKENS` WordPiece tokens with [CLS] and [SEP] where every word is
in the vocabulary. One meaning in 16 is held out: no picture of the split "train" has the meaning of a picture of
"heldout", whatever the seeds. (`A left of B` and `B right of A` are two captions of one meaning.)
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

COLOURS = {
    "red": (222, 30, 38),
    "green": (24, 140, 50),
    "blue": (35, 65, 215),
    "yellow": (250, 218, 25),
    "orange": (250, 132, 15),
    "purple": (118, 30, 150),
    "cyan": (35, 205, 222),
    "pink": (250, 145, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
BACKGROUNDS = {"white": (246, 246, 246), "black": (12, 12, 12), "gray": (128, 128, 128)}
# Half the width of a shape over the side of the picture. "medium" is never said.
SIZES = {"small": 0.105, "medium": 0.13, "large": 0.155}
PLACES = {
    "top left": (0.19, 0.19),
    "top": (0.5, 0.19),
    "top right": (0.81, 0.19),
    "left": (0.19, 0.5),
    "center": (0.5, 0.5),
    "right": (0.81, 0.5),
    "bottom left": (0.19, 0.81),
    "bottom": (0.5, 0.81),
    "bottom right": (0.81, 0.81),
}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three")
SPLITS = ("train", "heldout")
ANSWERS = (*COLOURS, *BACKGROUNDS, *SHAPES, "yes", "no", *NUMBERS)

_LOOKS = 2 * len(COLOURS) * len(SHAPES)  # small and large
_PLAIN = len(COLOURS) * len(SHAPES)
NUM_CAPTIONS = len(BACKGROUNDS) * (
    _LOOKS * len(PLACES)
    + _LOOKS * (_LOOKS - 1) * len(RELATIONS)
    + _PLAIN * (_PLAIN - 1) * (_PLAIN - 2) * 2
    + _LOOKS * 2  # two or three of a kind
    + _LOOKS * (_LOOKS - 1)  # two of a kind and another
)
MAX_TOKENS = 18
_HELD_OUT_ONE_IN = 16
_JITTER = 0.02  # of a shape's place, over the side of the picture
_COLOUR_JITTER = 10  # of 255


@dataclass(frozen=True)
class Thing:
    """One shape: what is said of it, and its centre, in sides of the picture from the top left."""

    size: str
    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0

    def name(self, plural: bool = False) -> str:
        size = "" if self.size == "medium" else self.size + " "
        return f"{size}{self.colour} {_plural(self.shape) if plural else self.shape}"

    @property
    def look(self) -> tuple[str, str, str]:
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Facts:
    """What a picture shows. `meaning`: equal if and only if one caption would describe both pictures."""

    kind: str
    background: str
    things: tuple[Thing, ...]
    meaning: str


@dataclass(frozen=True)
class Picture:
    """image: RGB, square."""

    image: Image.Image
    caption: str
    facts: Facts


@dataclass(frozen=True)
class Question:
    picture: Picture
    question: str
    answer: str


@dataclass(frozen=True)
class Statement:
    """A sentence about two pictures, as in NLVR2."""

    left: Picture
    right: Picture
    text: str
    truth: bool


def sample(index: int, seed: int = 0, image_size: int = 64, split: str = "train") -> Picture:
    """Picture number `index` of the endless data set `seed`. image_size: pixels a side."""
    caption, facts, rng = _described(index, seed, split)
    return Picture(_draw(facts, image_size, rng), caption, facts)


def dataset(n: int, seed: int = 0, image_size: int = 64, split: str = "train") -> Pictures:
    """The first `n` pictures of a split, as a sequence; each is made when asked for.

    In the split "heldout" no two pictures have one meaning, so no two have one caption, and retrieval has one
    right answer. In "train" they may, as captions in the wild do.
    """
    return Pictures(n, seed, image_size, split)


class Pictures(Sequence[Picture]):
    """What `dataset` returns."""

    def __init__(self, n: int, seed: int, image_size: int, split: str) -> None:
        if n < 1:
            raise ValueError(f"shapes.dataset: n must be at least 1, got {n}.")
        if image_size < 16:
            raise ValueError(f"shapes.dataset: image_size must be at least 16, got {image_size}.")
        if split not in SPLITS:
            raise ValueError(f"shapes.dataset: split must be one of {SPLITS}, got {split!r}.")
        self.seed, self.image_size, self.split = seed, image_size, split
        if split == "heldout":
            self.indices: Sequence[int] = _first_distinct(n, seed)
        else:
            self.indices = range(n)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Picture:
        return sample(self.indices[i], self.seed, self.image_size, self.split)

    def caption(self, i: int) -> str:
        """The caption alone, without drawing."""
        return _described(self.indices[i], self.seed, self.split)[0]


def vocabulary_captions() -> list[str]:
    """A few sentences with every word of captions, questions and statements, to train a tokenizer on."""
    looks = [Thing(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
    sentences = [f"a {thing.name()}" for thing in looks] + [f"two {thing.name(plural=True)}" for thing in looks]
    sentences += [f"at the {place} on {background}" for place in PLACES for background in BACKGROUNDS]
    for index in range(2000):
        caption, facts, rng = _described(index, 0, "train")
        sentences += [caption, _ask(facts, rng)[0]]
        after = _described(index + 1, 0, "train")[1]
        sentences.append(_state(facts, after, rng)[0])
    return sentences


def question(index: int, seed: int = 0, image_size: int = 64, split: str = "train") -> Question:
    """Question number `index`, about picture number `index`; the answer is one of `ANSWERS`.

    Colour, shape, background, how many, is there, and is one left of or above the other; yes and no are balanced.
    """
    picture = sample(index, seed, image_size, split)
    return Question(picture, *_ask(picture.facts, _rng("question", index, seed, split)))


def statement(index: int, seed: int = 0, image_size: int = 64, split: str = "train") -> Statement:
    """Statement number `index`, about pictures 2 * index and 2 * index + 1; true and false are balanced."""
    left = sample(2 * index, seed, image_size, split)
    right = sample(2 * index + 1, seed, image_size, split)
    text, truth = _state(left.facts, right.facts, _rng("statement", index, seed, split))
    return Statement(left, right, text, truth)


def _rng(purpose: str, index: int, seed: int, split: str) -> Random:
    return Random(zlib.crc32(f"{purpose} {seed} {split}".encode()) << 64 | index)


def _described(index: int, seed: int, split: str) -> tuple[str, Facts, Random]:
    """Caption and facts of a picture, and the generator that goes on to draw it."""
    if split not in SPLITS:
        raise ValueError(f"shapes: split must be one of {SPLITS}, got {split!r}.")
    rng = _rng("picture", index, seed, split)
    while True:
        caption, facts = _invent(rng)
        if (zlib.crc32(facts.meaning.encode()) % _HELD_OUT_ONE_IN == 0) == (split == "heldout"):
            return caption, facts, rng


def _first_distinct(n: int, seed: int) -> list[int]:
    meanings: set[str] = set()
    indices: list[int] = []
    index = 0
    while len(indices) < n:
        if index > 20 * n + 1000:
            raise ValueError(
                f"shapes.dataset: n must leave enough held-out meanings, got {n}. Hint: {len(indices)} are there."
            )
        meaning = _described(index, seed, "heldout")[1].meaning
        if meaning not in meanings:
            meanings.add(meaning)
            indices.append(index)
        index += 1
    return indices


def _look(rng: Random, sizes: tuple[str, ...] = ("small", "large")) -> tuple[str, str, str]:
    return rng.choice(sizes), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)


def _looks(rng: Random, count: int, sizes: tuple[str, ...] = ("small", "large")) -> list[tuple[str, str, str]]:
    """`count` looks of which no two are equal."""
    looks: list[tuple[str, str, str]] = []
    while len(looks) < count:
        look = _look(rng, sizes)
        if look not in looks:
            looks.append(look)
    return looks


def _invent(rng: Random) -> tuple[str, Facts]:
    """A caption, and facts that it describes."""
    kind = rng.choices(("place", "pair", "line", "count"), (40, 35, 10, 15))[0]
    background = rng.choice(tuple(BACKGROUNDS))
    if kind == "place":
        place = rng.choice(tuple(PLACES))
        things = [Thing(*_look(rng), *PLACES[place])]
        caption = f"a {things[0].name()} at the {place}"
        meaning = caption
    elif kind == "pair":
        relation = rng.choice(RELATIONS)
        first, second = _looks(rng, 2)
        # Along the relation's axis far apart, across it level.
        near, far, level = rng.uniform(0.2, 0.32), rng.uniform(0.68, 0.8), rng.uniform(0.2, 0.8)
        along = (near, far) if relation in ("left of", "above") else (far, near)
        flat = relation in ("left of", "right of")
        things = [Thing(*look, *((at, level) if flat else (level, at))) for look, at in zip((first, second), along)]
        caption = f"a {things[0].name()} {relation} a {things[1].name()}"
        ordered = sorted(things, key=lambda thing: thing.x if flat else thing.y)
        meaning = f"a {ordered[0].name()} {'left of' if flat else 'above'} a {ordered[1].name()}"
    elif kind == "line":
        direction = rng.choice(("row", "column"))
        level = rng.uniform(0.2, 0.8)
        places = [(at, level) if direction == "row" else (level, at) for at in (0.18, 0.5, 0.82)]
        things = [Thing(*look, *place) for look, place in zip(_looks(rng, 3, ("medium",)), places)]
        caption = f"a {things[0].name()}, a {things[1].name()} and a {things[2].name()} in a {direction}"
        meaning = caption
    else:
        places = rng.sample(tuple(PLACES.values()), 3)
        # One in three of one kind only: there are far fewer of those captions.
        if rng.random() < 1 / 3:
            number = rng.choice((2, 3))
            look = _look(rng)
            things = [Thing(*look, *place) for place in places[:number]]
            caption = f"{NUMBERS[number]} {things[0].name(plural=True)}"
        else:
            first, second = _looks(rng, 2)
            things = [Thing(*look, *place) for look, place in zip((first, first, second), places)]
            caption = f"two {things[0].name(plural=True)} and one {things[2].name()}"
        meaning = caption
    moved = tuple(
        Thing(*thing.look, thing.x + rng.uniform(-_JITTER, _JITTER), thing.y + rng.uniform(-_JITTER, _JITTER))
        for thing in things
    )
    return f"{caption} on {background}", Facts(kind, background, moved, f"{meaning} on {background}")


def _draw(facts: Facts, image_size: int, rng: Random) -> Image.Image:
    """Drawn at twice the size and averaged, for smooth edges."""
    side = 2 * image_size
    image = Image.new("RGB", (side, side), _shade(BACKGROUNDS[facts.background], rng))
    draw = ImageDraw.Draw(image)
    for thing in facts.things:
        x, y, radius = thing.x * side, thing.y * side, SIZES[thing.size] * side
        fill = _shade(COLOURS[thing.colour], rng)
        if thing.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        else:
            draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[thing.shape]], fill)
    return image.reduce(2)


def _shade(colour: tuple[int, int, int], rng: Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for channel in colour)


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    corners = []
    for i in range(2 * points):
        length, angle = (1.1 if i % 2 == 0 else inner), math.pi * (i / points - 0.5)
        corners.append((length * math.cos(angle), length * math.sin(angle)))
    return corners


# Corners, in half widths from the centre. The square is smaller than the rest so that all cover similar areas.
_A = 0.36
_OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1), (1.05, 0.85), (-1.05, 0.85)],
    "cross": [(-_A, -1), (_A, -1), (_A, -_A), (1, -_A), (1, _A), (_A, _A)]
    + [(_A, 1), (-_A, 1), (-_A, _A), (-1, _A), (-1, -_A), (-_A, -_A)],
    "star": _star(),
    "diamond": [(0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)],
}


def _ask(facts: Facts, rng: Random) -> tuple[str, str]:
    """A question about one picture, and its answer."""
    choices = list(_questions(facts, rng))
    topic = rng.choice(sorted({topic for topic, _, _ in choices}))
    return rng.choice([(text, answer) for given, text, answer in choices if given == topic])


def _questions(facts: Facts, rng: Random) -> Iterator[tuple[str, str, str]]:
    """Topic, question, answer."""
    things = facts.things
    yield "background", "what color is the background", facts.background
    for thing in things:
        if len({other.colour for other in things if other.shape == thing.shape}) == 1:
            alone = sum(other.shape == thing.shape for other in things) == 1
            which = f"is the {thing.shape}" if alone else f"are the {_plural(thing.shape)}"
            yield "colour", f"what color {which}", thing.colour
        if len({other.shape for other in things if other.colour == thing.colour}) == 1:
            yield "shape", f"what shape is {thing.colour}", thing.shape
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    if rng.random() < 0.7:  # else mostly zero
        shape, colour = rng.choice([(thing.shape, thing.colour) for thing in things])
    yield "count", f"how many {_plural(shape)} are there", NUMBERS[sum(thing.shape == shape for thing in things)]
    yield "count", f"how many {colour} shapes are there", NUMBERS[sum(thing.colour == colour for thing in things)]
    yield "count", "how many shapes are there", NUMBERS[len(things)]
    yield "exists", *_exists(facts, rng)
    if facts.kind == "pair" or facts.kind == "line":
        yield "relation", *_relation(facts, rng)


def _exists(facts: Facts, rng: Random) -> tuple[str, str]:
    present = {(thing.colour, thing.shape) for thing in facts.things}
    colour, shape = rng.choice(sorted(present))
    truth = rng.random() < 0.5
    while not truth and (colour, shape) in present:
        # A colour or a shape of the picture, so that neither word alone answers.
        if rng.random() < 0.5:
            colour = rng.choice(tuple(COLOURS))
        else:
            shape = rng.choice(SHAPES)
    return f"is there a {colour} {shape}", "yes" if truth else "no"


def _relation(facts: Facts, rng: Random) -> tuple[str, str]:
    """Along the line on which the shapes stand; the false ones name them in the wrong order."""
    things = facts.things
    flat = max(abs(a.x - b.x) for a in things for b in things) > max(abs(a.y - b.y) for a in things for b in things)
    ordered = sorted(things, key=lambda thing: thing.x if flat else thing.y)
    i, j = sorted(rng.sample(range(len(ordered)), 2))
    relation = rng.choice(("left of", "right of") if flat else ("above", "below"))
    truth = rng.random() < 0.5
    forward = relation in ("left of", "above")
    first, second = (ordered[i], ordered[j]) if truth == forward else (ordered[j], ordered[i])
    return f"is the {first.name()} {relation} the {second.name()}", "yes" if truth else "no"


def _state(left: Facts, right: Facts, rng: Random) -> tuple[str, bool]:
    """A statement about two pictures. The topic is drawn first and then the truth, so that no topic is mostly true."""
    options = list(_statements(left, right, rng))
    both = [{topic for topic, _, value in options if value == truth} for truth in (False, True)]
    topic, truth = rng.choice(sorted(both[0] & both[1])), rng.random() < 0.5
    return rng.choice([text for given, text, value in options if (given, value) == (topic, truth)]), truth


def _statements(left: Facts, right: Facts, rng: Random) -> Iterator[tuple[str, str, bool]]:
    """Topic, statement, truth."""
    for side, facts in (("left", left), ("right", right)):
        number = len(facts.things)
        wrong = rng.choice([other for other in (1, 2, 3) if other != number])
        for claim in (number, wrong):
            shapes = "shape" if claim == 1 else "shapes"
            yield "number", f"the {side} picture shows {NUMBERS[claim]} {shapes}", claim == number
        wrong = rng.choice([background for background in BACKGROUNDS if background != facts.background])
        yield "background", f"the {side} picture is {facts.background}", True
        yield "background", f"the {side} picture is {wrong}", False
    difference = len(left.things) - len(right.things)
    yield "more", "there are more shapes in the left picture than in the right", difference > 0
    yield "more", "there are more shapes in the right picture than in the left", difference < 0
    yield "more", "there are as many shapes in the left picture as in the right", difference == 0
    yield "same", "both pictures have the same background", left.background == right.background
    yield "same", "the pictures have different backgrounds", left.background != right.background
    for key, known in (("colour", tuple(COLOURS)), ("shape", SHAPES)):
        there, too = ({getattr(thing, key) for thing in facts.things} for facts in (left, right))
        # Two pictures of three shapes can show all six.
        absent = [word for word in known if word not in there | too]
        for word in (*sorted(there | too), *([rng.choice(absent)] if absent else [])):
            something = f"a {word}" if key == "shape" else f"a shape that is {word}"
            yield f"both {key}", f"both pictures show {something}", word in there & too
            yield f"only {key}", f"only one picture shows {something}", word in there ^ too


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")
