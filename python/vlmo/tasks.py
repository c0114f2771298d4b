"""Examples of VQA and NLVR2: from the generated shapes, and from the official annotation files.

A set of examples has `len`, `[i]` -> `Example`, and `classes`, the names of what is predicted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from . import shapes

TRUTHS = ("False", "True")
# VQA v2: what an answer is worth that 0, 1, 2, 3, or more of the ten people gave, as in ViLT and VLMo.
VQA_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
# Answers given at least this often in train and val: 3129 of them in VQA v2.
VQA_MIN_COUNT = 9
_NUMBERS = {word: str(i) for i, word in enumerate("none one two three four five six seven eight nine ten".split())}
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Example:
    """images: one, or NLVR2's left and right; PIL, encoded bytes or files. target: class to its score in (0, 1]; empty
    where nobody knows. key: what the data set calls the example.
    """

    images: tuple[Image.Image | Path | bytes, ...]
    text: str
    target: dict[int, float]
    key: str | int


class Examples(Protocol):
    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


class ShapesQuestions:
    """`shapes.question` number 0 to n - 1; classes are `shapes.ANSWERS`."""

    classes = shapes.ANSWERS

    def __init__(self, n: int, seed: int = 0, image_size: int = 64, split: str = "train") -> None:
        self.n, self.seed, self.image_size, self.split = n, seed, image_size, split

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        asked = shapes.question(i, self.seed, self.image_size, self.split)
        return Example((asked.picture.image,), asked.question, {self.classes.index(asked.answer): 1.0}, i)


class ShapesStatements:
    """`shapes.statement` number 0 to n - 1; classes are false and true."""

    classes = TRUTHS

    def __init__(self, n: int, seed: int = 0, image_size: int = 64, split: str = "train") -> None:
        self.n, self.seed, self.image_size, self.split = n, seed, image_size, split

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        said = shapes.statement(i, self.seed, self.image_size, self.split)
        return Example((said.left.image, said.right.image), said.text, {int(said.truth): 1.0}, i)


class VQAv2:
    """Questions of VQA v2 (Goyal et al. 2017).

    questions: v2_OpenEnded_mscoco_*_questions.json. annotations: v2_mscoco_*_annotations.json, or None for a test
    set. images: the folder; a file is found by the name COCO_<split>_<12 digits>.jpg or <12 digits>.jpg. classes: the
    answers to choose from, by default those that `answer_classes` finds in `annotations`. With annotations, questions
    none of whose answers is among the classes are left out, as in published training, and counted in `left_out`.
    """

    def __init__(
        self,
        questions: str | Path,
        annotations: str | Path | None,
        images: str | Path,
        classes: Sequence[str] | None = None,
    ) -> None:
        asked = _rows(questions, "questions", ("image_id", "question", "question_id"))
        given = None
        if annotations is not None:
            rows = _rows(annotations, "annotations", ("question_id", "answers"))
            given = {row["question_id"]: [normalise_answer(a["answer"]) for a in row["answers"]] for row in rows}
        if classes is None:
            if given is None:
                raise ValueError("VQAv2: without annotations there must be classes. Hint: those of the training.")
            classes = answer_classes(given.values())
        self.classes = tuple(classes)
        self._folder = _folder("VQAv2", images)
        self._split = next((s for s in ("train2014", "val2014", "test2015") if s in Path(questions).name), "")
        number = {answer: i for i, answer in enumerate(self.classes)}
        self._rows: list[tuple[int, str, int, dict[int, float]]] = []
        self.left_out = 0
        for row in asked:
            target = {}
            if given is not None:
                counts = Counter(given.get(row["question_id"], ()))
                target = {number[a]: VQA_SCORES[min(n, 4)] for a, n in counts.items() if a in number}
                if not target:
                    self.left_out += 1
                    continue
            self._rows.append((row["image_id"], row["question"], row["question_id"], target))
        if not self._rows:
            raise ValueError(f"VQAv2: questions and annotations must belong together, '{questions}' has no answer.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        image_id, text, key, target = self._rows[i]
        file = self._folder / f"COCO_{self._split}_{image_id:012d}.jpg"
        if not file.exists():
            file = self._folder / f"{image_id:012d}.jpg"
        return Example((file,), text, target, key)


class NLVR2:
    """Statements of NLVR2 (Suhr et al. 2019): a .json with one object a line, and the folder of its images.

    The images of "dev-12-0-1" are dev-12-0-img0.png and dev-12-0-img1.png, directly in the folder or below its
    `directory` (as the training set is packed) or below the name of the split.
    """

    classes = TRUTHS

    def __init__(self, path: str | Path, images: str | Path) -> None:
        self._folder = _folder("NLVR2", images)
        self._rows = [_object(path, i, line, ("identifier", "sentence")) for i, line in enumerate(_lines(path))]
        if not self._rows:
            raise ValueError(f"NLVR2: the file must hold at least one statement, '{path}' does not.")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Example:
        row = self._rows[i]
        stem = row["identifier"].rpartition("-")[0]
        folders = [self._folder, self._folder / str(row.get("directory", "")), self._folder / stem.partition("-")[0]]
        folder = next((f for f in folders if (f / f"{stem}-img0.png").exists()), self._folder)
        target = {} if "label" not in row else {int(str(row["label"]).lower() == "true"): 1.0}
        files = tuple(folder / f"{stem}-img{number}.png" for number in (0, 1))
        return Example(files, row["sentence"], target, row["identifier"])


def normalise_answer(answer: str) -> str:
    """An answer as it is compared: lower case, no articles and punctuation, number words as digits.

    The official evaluation also puts apostrophes back into some 120 contractions ("dont"); here they are left out
    on both sides.
    """
    answer = re.sub(r"(?<=\d),(?=\d)|'", "", answer.lower())
    answer = re.sub(r"(?!(?<=\d)[.:](?=\d))[^\w\s$%]", " ", answer)
    words = (_NUMBERS.get(word, word) for word in answer.split() if word not in _ARTICLES)
    return " ".join(words)


def answer_classes(answers: Sequence[Sequence[str]], min_count: int = VQA_MIN_COUNT) -> tuple[str, ...]:
    """Normalised answers that are the most frequent one of at least `min_count` questions, most frequent first."""
    best = Counter(Counter(people).most_common(1)[0][0] for people in answers if people)
    return tuple(answer for answer, n in sorted(best.items(), key=lambda item: (-item[1], item[0])) if n >= min_count)


def _folder(who: str, path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{who}: the folder of images must exist, got '{path}'.")
    return Path(path)


def _text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"tasks: the annotation file must exist, got '{path}'.")
    return Path(path).read_text(encoding="utf-8")


def _lines(path: str | Path) -> list[str]:
    return [line for line in _text(path).splitlines() if line.strip()]


def _rows(path: str | Path, name: str, keys: Sequence[str]) -> list[dict]:
    """The list under `name` of a json object, its rows checked for `keys`."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"tasks: '{path}' must be JSON: {error}.") from error
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"tasks: '{path}' must be an object with a list {name!r}.")
    for i, row in enumerate(rows):
        _check(path, i, row, keys)
    return rows


def _object(path: str | Path, i: int, line: str, keys: Sequence[str]) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"tasks: line {i + 1} of '{path}' must be a JSON object: {error}.") from error
    return _check(path, i, row, keys)


def _check(path: str | Path, i: int, row: object, keys: Sequence[str]) -> dict:
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"tasks: row {i} of '{path}' must have {', '.join(keys)}, it lacks {', '.join(missing)}.")
    return row
