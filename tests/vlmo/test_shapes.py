"""The generated data set: deterministic, exactly described, and split without overlap."""

from collections import Counter
from itertools import permutations, product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from vlmo import shapes
from vlmo.tokenizer import Tokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "vlmo_data.md"


def test_a_picture_follows_from_its_number_alone():
    one, again, other = shapes.sample(7, seed=3), shapes.sample(7, seed=3), shapes.sample(7, seed=4)
    assert one.caption == again.caption and one.image.tobytes() == again.image.tobytes()
    assert one.image.tobytes() != other.image.tobytes()
    assert one.image.mode == "RGB" and one.image.size == (64, 64)


def test_pinned_captions():
    """The data set is the same everywhere: figures made with it can be made again."""
    assert [shapes.sample(i).caption for i in range(3)] == PINNED


def test_number_of_captions():
    def thing(look):
        return shapes.Thing(*look).name()

    looks = list(product(("small", "large"), shapes.COLOURS, shapes.SHAPES))
    plain = [("medium", *look) for look in product(shapes.COLOURS, shapes.SHAPES)]
    captions = {f"a {thing(look)} at the {place}" for look in looks for place in shapes.PLACES}
    captions |= {f"a {thing(a)} {r} a {thing(b)}" for a, b in permutations(looks, 2) for r in shapes.RELATIONS}
    captions |= {f"{n} {shapes.Thing(*look).name(plural=True)}" for n in ("two", "three") for look in looks}
    captions |= {f"two {shapes.Thing(*a).name(plural=True)} and one {thing(b)}" for a, b in permutations(looks, 2)}
    names = [thing(look) for look in plain]
    lines = len(set(names)) * (len(names) - 1) * (len(names) - 2) * 2
    assert shapes.NUM_CAPTIONS == len(shapes.BACKGROUNDS) * (len(captions) + lines)
    assert f"{shapes.NUM_CAPTIONS:,} captions" in DOCS.read_text()
    drawn = [shapes.sample(i, image_size=16) for i in range(300)]
    for picture in drawn:
        stem, _, background = picture.caption.rpartition(" on ")
        assert background == picture.facts.background
        assert stem in captions or picture.facts.kind == "line"


def test_held_out_pictures_are_new_and_pairwise_distinct():
    held_out = shapes.dataset(200, seed=1, split="heldout")
    meanings = {picture.facts.meaning for picture in held_out}
    assert len(meanings) == len({held_out.caption(i) for i in range(200)}) == 200
    assert not meanings & {shapes.sample(i, image_size=16).facts.meaning for i in range(3000)}


def colour_at(picture: shapes.Picture, thing: shapes.Thing) -> str:
    side = picture.image.size[0]
    pixel = np.array(picture.image.getpixel((int(thing.x * side), int(thing.y * side))))
    palette = {**shapes.COLOURS, **shapes.BACKGROUNDS}
    return min(palette, key=lambda name: np.abs(np.array(palette[name]) - pixel).sum())


def test_pictures_show_what_the_captions_say():
    for i in range(300):
        picture = shapes.sample(i)
        things, caption = picture.facts.things, picture.caption
        for thing in things:
            assert colour_at(picture, thing) == thing.colour, caption
            assert thing.colour in caption and thing.shape in caption
            reach = shapes.SIZES[thing.size]
            assert reach < min(thing.x, thing.y) and max(thing.x, thing.y) < 1 - reach, "cut off at the border"
        if picture.facts.kind == "pair":
            (a, b), relation = things, next(r for r in shapes.RELATIONS if r in caption)
            gap = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
            assert gap > 0.3, caption
            assert abs((b.y - a.y) if "of" in relation else (b.x - a.x)) < 0.05, caption
        if picture.facts.kind == "line":
            along = [thing.x if "in a row" in caption else thing.y for thing in things]
            assert along == sorted(along), caption


def test_questions_have_known_and_balanced_answers():
    asked = [shapes.question(i, image_size=16) for i in range(2000)]
    answers = Counter(q.answer for q in asked)
    assert set(answers) == set(shapes.ANSWERS)
    assert 0.85 < answers["yes"] / answers["no"] < 1.18
    for q in asked:
        things = q.picture.facts.things
        if q.question == "how many shapes are there":
            assert q.answer == shapes.NUMBERS[len(things)]
        if q.question.startswith("is there a "):
            colour, shape = q.question.split()[-2:]
            assert (q.answer == "yes") == any((t.colour, t.shape) == (colour, shape) for t in things)
        for relation in shapes.RELATIONS:
            if f" {relation} the " in q.question:
                first, second = q.question.removeprefix("is the ").split(f" {relation} the ")
                at = {thing.name(): thing for thing in things}
                a, b = at[first], at[second]
                true = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
                assert (q.answer == "yes") == true[relation], (q.question, q.picture.caption)


def test_statements_are_balanced_and_right():
    stated = [shapes.statement(i, image_size=16) for i in range(2000)]
    assert 0.45 < sum(s.truth for s in stated) / len(stated) < 0.55
    for s in stated:
        left, right = s.left.facts, s.right.facts
        if s.text.endswith("in the left picture than in the right"):
            assert s.truth == (len(left.things) > len(right.things))
        if s.text.startswith("both pictures show a shape that is "):
            colours = [{thing.colour for thing in facts.things} for facts in (left, right)]
            assert s.truth == (s.text.split()[-1] in colours[0] & colours[1])
    for start in ("both pictures show a shape", "only one picture shows a shape", "the left picture shows"):
        truths = [s.truth for s in stated if s.text.startswith(start)]
        assert 0.4 < sum(truths) / len(truths) < 0.6, start


def test_two_pictures_with_every_shape_between_them():
    things = [shapes.Thing("medium", "red", shape, x=0.2) for shape in shapes.SHAPES]
    left, right = (shapes.Facts("line", "white", tuple(part), "") for part in (things[:3], things[3:]))
    said = dict(shapes._state(left, right, Random(i)) for i in range(200))
    # Whatever is said of a single shape has one answer only, so it is not asked.
    assert not any(shape in text for text in said for shape in ("star", "circle"))
    assert said["the left picture is white"] is True and len(said) > 8


def test_captions_fit_the_promised_length():
    tokenizer = Tokenizer.train(shapes.vocabulary_captions(), 1000)
    captions = shapes.dataset(3000, image_size=16)
    ids, mask, _ = tokenizer.encode_batch([captions.caption(i) for i in range(3000)], 40)
    assert mask.sum(1).max() == shapes.MAX_TOKENS
    assert not (ids == tokenizer.unk_id).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shapes.sample(0, split="test"), "split must be one of"),
        (lambda: shapes.dataset(0), "n must be at least 1"),
        (lambda: shapes.dataset(1, image_size=8), "image_size must be at least 16"),
        (lambda: shapes.dataset(1)[1], "out of range"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, IndexError), match=message):
        make()


PINNED = [
    "a small blue circle below a large yellow star on white",
    "two large yellow diamonds and one small blue diamond on black",
    "three large blue stars on gray",
]
