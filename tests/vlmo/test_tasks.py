"""VQA and NLVR2: annotation files, classifiers, fine-tuning and evaluation."""

import json
import math
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image

from tests.common.numerics import assert_close_as_eager
from vlmo import CONFIGS, shapes
from vlmo.data import Loader
from vlmo.downstream import ExampleBatches, FineTuning, VLMoForNLVR2, VLMoForVQA, evaluate, task_trainer
from vlmo.model import VLMo
from vlmo.sources import ShapesSource
from vlmo.tasks import NLVR2, Example, ShapesQuestions, ShapesStatements, VQAv2, answer_classes, normalise_answer
from vlmo.tokenizer import Tokenizer
from vlmo.train import Recipe


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(shapes.vocabulary_captions(), 1000)


@pytest.fixture(scope="module")
def config(tokenizer):
    return replace(
        CONFIGS["tiny"], max_text_len=18, text_only_len=18, vocab_size=tokenizer.vocab_size, num_token_types=3
    )


def batches_of(examples, tokenizer, batch_size=8, seed=0) -> ExampleBatches:
    return ExampleBatches(examples, tokenizer, 32, 18, batch_size, seed)


# Annotation files


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("10:30", "10:30"),
        ("don't know", "dont know"),
        ("black & white", "black white"),
        ("yes, an apple", "yes apple"),
        ("$5", "$5"),
    ],
)
def test_answers_are_normalised(answer, expected):
    assert normalise_answer(answer) == expected


def write_vqa(folder, answers_by_question, image_ids=None):
    questions, annotations = [], []
    for number, answers in enumerate(answers_by_question):
        image = (image_ids or range(len(answers_by_question)))[number]
        questions.append({"image_id": image, "question": f"question {number}?", "question_id": number * 10})
        annotations.append({"question_id": number * 10, "image_id": image, "answers": [{"answer": a} for a in answers]})
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"COCO_val2014_{image:012d}.jpg")
    files = [folder / "v2_OpenEnded_mscoco_val2014_questions.json", folder / "v2_mscoco_val2014_annotations.json"]
    files[0].write_text(json.dumps({"questions": questions}))
    files[1].write_text(json.dumps({"annotations": annotations}))
    return files


def test_vqa_scores_what_people_said(tmp_path):
    people = [["Yes"] * 2 + ["no"] * 3 + ["a cat"] * 5, ["two"] * 10, ["rare"] * 10, ["yes"] * 10]
    questions, annotations = write_vqa(tmp_path, people, image_ids=[7, 8, 9, 7])
    examples = VQAv2(questions, annotations, tmp_path, classes=("yes", "no", "cat", "2"))
    assert len(examples) == 3, "the question whose answers are not among the classes is left out"
    assert examples.left_out == 1
    assert examples[0].target == {0: 0.6, 1: 0.9, 2: 1.0} and examples[1].target == {3: 1.0}
    assert examples[2].key == 30 and examples[2].images[0].name == "COCO_val2014_000000000007.jpg"
    without = VQAv2(questions, None, tmp_path, classes=("yes", "no"))
    assert len(without) == 4 and without[2].target == {}


def test_vqa_answer_classes():
    people = [["red"] * 6 + ["blue"] * 4] * 9 + [["green"] * 10] * 8 + [["The one"] * 10] * 10 + [[]]
    normal = [[normalise_answer(a) for a in answers] for answers in people]
    assert answer_classes(normal) == ("1", "red")


def test_nlvr2_file(tmp_path):
    rows = [
        {"identifier": "dev-12-0-1", "sentence": "two dogs", "label": "True"},
        {"identifier": "train-3-1-0", "sentence": "one cat", "label": "False", "directory": 42},
        {"identifier": "test1-3-1-0", "sentence": "unknown"},
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "42").mkdir()
    for name in ("dev-12-0-img0.png", "dev-12-0-img1.png", "42/train-3-1-img0.png", "42/train-3-1-img1.png"):
        Image.new("RGB", (10, 10)).save(tmp_path / name)
    examples = NLVR2(tmp_path / "dev.json", tmp_path)
    assert [e.target for e in map(examples.__getitem__, range(3))] == [{1: 1.0}, {0: 1.0}, {}]
    assert [file.exists() for i in range(3) for file in examples[i].images] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: NLVR2(d / "none.json", d), "annotation file must exist"),
        (lambda d: NLVR2(_write(d, "{"), d), "line 1 of"),
        (lambda d: NLVR2(_write(d, '{"sentence": "a"}'), d), "it lacks identifier"),
        (lambda d: NLVR2(_write(d, ""), d), "at least one statement"),
        (lambda d: NLVR2(_write(d, ""), d / "none"), "folder of images must exist"),
        (lambda d: VQAv2(_write(d, "["), None, d, ("a",)), "must be JSON"),
        (lambda d: VQAv2(_write(d, "[]"), None, d, ("a",)), "a list 'questions'"),
        (lambda d: VQAv2(_write(d, '{"questions": [{}]}'), None, d, ("a",)), "row 0 of"),
        (lambda d: VQAv2(_write(d, '{"questions": []}'), None, d), "there must be classes"),
        (lambda d: VQAv2(_write(d, '{"questions": []}'), None, d, ("a",)), "must belong together"),
    ],
)
def test_bad_annotation_files(make, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path)


def _write(folder, text):
    (folder / "a.json").write_text(text)
    return folder / "a.json"


# Models


def test_classifiers_have_published_names_and_shapes(config):
    d = config.dim
    for model, name, inputs, outputs in (
        (VLMoForVQA(config, 7), "vqa_classifier", d, 7),
        (VLMoForNLVR2(config), "nlvr2_classifier", 2 * d, 2),
    ):
        found = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith(name)}
        assert found == {
            f"{name}.0.weight": (2 * d, inputs),
            f"{name}.0.bias": (2 * d,),
            f"{name}.1.weight": (2 * d,),
            f"{name}.1.bias": (2 * d,),
            f"{name}.3.weight": (outputs, 2 * d),
            f"{name}.3.bias": (outputs,),
        }
    with pytest.raises(ValueError, match="num_token_types must be 3"):
        VLMoForNLVR2(replace(config, num_token_types=2))


def test_nlvr2_sees_the_order_of_the_pictures(config, tokenizer):
    torch.manual_seed(0)
    model = VLMoForNLVR2(config).eval()
    batch = next(iter(batches_of(ShapesStatements(8, image_size=32), tokenizer)))
    with torch.no_grad():
        model.token_type_embeddings.weight.normal_()
        one = model.classify(batch.images, batch.text_ids, batch.text_mask)
        left, right = (
            model.infer(image, batch.text_ids, batch.text_mask, i + 1) for i, image in enumerate(batch.images)
        )
        torch.testing.assert_close(one, model.nlvr2_classifier(torch.cat([left.cls_feats, right.cls_feats], 1)))
        assert not torch.allclose(one, model.classify(batch.images[::-1], batch.text_ids, batch.text_mask))


def test_losses_are_as_published(config, tokenizer):
    torch.manual_seed(0)
    examples = ShapesQuestions(16, image_size=32)
    tuning = FineTuning(VLMoForVQA(config, len(examples.classes)), "vqa").eval()
    batch = next(iter(batches_of(examples, tokenizer)))
    logits = tuning.model.classify(batch.images, batch.text_ids, batch.text_mask)

    def published(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p = z.sigmoid()
        return -(t * p.log() + (1 - t) * (1 - p).log()).sum(1).mean()

    t = batch.target
    out = tuning(batch)
    assert_close_as_eager(out["loss"], published(logits.double(), t.double()), published(logits, t), "loss")
    assert out["accuracy"].item() == pytest.approx((logits.argmax(1) == t.argmax(1)).double().mean().item())
    with pytest.raises(ValueError, match="task must be one of"):
        FineTuning(tuning.model, "caption")


def test_an_unreadable_image_is_replaced_in_training_and_left_out_in_evaluation(tokenizer, config):
    class Broken(ShapesQuestions):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return Example((b"broken",), example.text, example.target, i) if i % 3 == 0 else example

    examples = Broken(12, image_size=32)
    batches = batches_of(examples, tokenizer, batch_size=12)
    batch = next(iter(batches))
    assert len(batch.text_ids) == 12 and batches.report.corrupt_images == 4
    model = VLMoForVQA(config, len(examples.classes))
    figures, chosen = evaluate(model, batches_of(examples, tokenizer, batch_size=3))
    assert figures["examples"] == 8 and [key for key, _ in chosen] == [i for i in range(12) if i % 3]


def test_evaluation_is_its_definition(config, tokenizer):
    torch.manual_seed(0)
    examples = ShapesQuestions(50, image_size=32)
    model = VLMoForVQA(config, len(examples.classes)).eval()
    figures, chosen = evaluate(model, batches_of(examples, tokenizer, batch_size=16))
    right = [shapes.question(i, image_size=32).answer == answer for i, answer in chosen]
    assert figures["accuracy"] == pytest.approx(sum(right) / 50)
    answers = [shapes.question(i, image_size=32).answer for i in range(50)]
    assert figures["majority"] == pytest.approx(max(map(answers.count, answers)) / 50)


def model_and_batches(task, config, tokenizer, count=8, batch_size=8):
    """A fresh model whose parameters are large enough for its width, and endless batches of `count` examples."""
    torch.manual_seed(0)
    config = replace(config, layer_scale_init=None)
    if task == "retrieval":
        model = VLMo(config)
        source = ShapesSource(shapes.dataset(count, image_size=32))
        batches = Loader(source, tokenizer, batch_size=batch_size, image_size=32, max_text_len=18)
    else:
        examples = {"vqa": ShapesQuestions, "nlvr2": ShapesStatements}[task](count, image_size=32)
        model = VLMoForVQA(config, len(examples.classes)) if task == "vqa" else VLMoForNLVR2(config)
        batches = batches_of(examples, tokenizer, batch_size)
    with torch.no_grad():  # 0.02 is meant for a width of 768; at 32 nothing would come through
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model, batches


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


TASKS = pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])


@TASKS
def test_fine_tuning_learns_a_few_examples_by_heart(task, config, tokenizer, tmp_path):
    model, batches = model_and_batches(task, config, tokenizer)
    recipe = Recipe(steps=60, lr=2e-3, warmup=6, clip=1.0, log_every=1)
    task_trainer(model, task, recipe).fit(batches, tmp_path)
    log = log_of(tmp_path)
    assert log[-1]["loss"] < 0.3 * log[0]["loss"] and log[-1]["accuracy"] > 0.8
    if task != "retrieval":
        figures, _ = evaluate(model, batches_of(batches.examples, tokenizer))
        assert figures["accuracy"] > 0.8 > figures["majority"]


@TASKS
@pytest.mark.parametrize("bias_table", [True, False], ids=["bias table", "absolute"])
def test_what_a_task_uses_trains_and_nothing_else(task, bias_table, config, tokenizer):
    model, batches = model_and_batches(task, replace(config, relative_position_bias=bias_table), tokenizer)
    trainer = task_trainer(model, task, Recipe(steps=1))
    every = [p.requires_grad_(True) for p in model.parameters()]
    trainer.module(next(iter(batches)))["loss"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert reached == {name for name, p in model.named_parameters() if id(p) in optimised}
    assert len(reached) < len(every)


@TASKS
def test_resumed_fine_tuning_continues_the_same_curve(task, config, tokenizer, tmp_path):
    """With DropPath and dropout, and from the middle of a pass over the examples."""
    config, recipe = replace(config, drop_path=0.1), Recipe(steps=6, lr=1e-3, warmup=1, log_every=1, save_every=2)
    model, batches = model_and_batches(task, config, tokenizer, count=20)
    task_trainer(model, task, recipe).fit(batches, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(line):
        if line["step"] == 3:
            raise Stop

    model, batches = model_and_batches(task, config, tokenizer, count=20)
    with pytest.raises(Stop):
        task_trainer(model, task, recipe).fit(batches, tmp_path / "part", progress=stop)
    model, batches = model_and_batches(task, config, tokenizer, count=20)
    with torch.no_grad():  # nothing of the initial state may matter
        for p in model.parameters():
            p.add_(1.0)
    trainer = task_trainer(model, task, recipe)
    # Frozen parameters are in the snapshot as well.
    trainer.fit(batches, tmp_path / "part", resume=True)
    curves = [[(r["step"], r["loss"], r["grad_norm"]) for r in log_of(tmp_path / name)] for name in ("whole", "part")]
    assert curves[0] == curves[1] and len(curves[0]) == 6
    if task != "retrieval":
        other = batches_of(batches.examples, tokenizer, seed=1)
        with pytest.raises(ValueError, match="seed must be what the state was saved with, 0, got 1"):
            other.load_state_dict(batches.state_dict())


class About:
    """The statements of NLVR2's kind that speak of backgrounds: of one picture, or whether both have the same."""

    classes = ShapesStatements.classes

    def __init__(self, n, split):
        self.all, self.numbers, i = ShapesStatements(10**6, 0, 32, split), [], 0
        while len(self.numbers) < n:
            facts = [shapes._described(number, 0, split)[1] for number in (2 * i, 2 * i + 1)]
            text, _ = shapes._state(*facts, shapes._rng("statement", i, 0, split))  # without drawing
            if re.search("background|picture is", text):
                self.numbers.append(i)
            i += 1

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.all[self.numbers[i]]


class OfOthers:
    """The same questions, each with the pictures of the next: what is right here is right by guessing."""

    def __init__(self, examples):
        self.examples, self.classes = examples, examples.classes

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return replace(self.examples[i], images=self.examples[(i + 1) % len(self)].images)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_fine_tuning_learns_to_look_at_pictures_it_has_not_seen(task, config, tokenizer, tmp_path, monkeypatch):
    """From scratch, in half a minute: right about held-out pictures more often than chance and than without them."""
    torch.manual_seed(0)
    config = replace(
        config, depth=2, vlffn_start=1, layer_scale_init=None, relative_position_bias=False, init_std=0.1, heads=(),
        max_text_len=shapes.MAX_TOKENS,
    )  # fmt: skip
    if task == "vqa":
        seen, new = (ShapesQuestions(n, 0, 32, split) for n, split in ((20_000, "train"), (1000, "heldout")))
        model = VLMoForVQA(config, len(seen.classes))
    else:
        seen, new = About(8000, "train"), About(1000, "heldout")
        model = VLMoForNLVR2(config)
    monkeypatch.setattr("vlmo.train.HEAD_LR", 1.0)  # nothing is pre-trained, so nothing must be spared
    recipe = Recipe(steps=300, lr=2e-3, warmup=30, clip=1.0, save_every=300)
    task_trainer(model, task, recipe).fit(batches_of(seen, tokenizer, 64), tmp_path)
    figures, blind = (evaluate(model, batches_of(e, tokenizer, 100))[0] for e in (new, OfOthers(new)))
    for guess in (figures["majority"], blind["accuracy"]):
        # Five standard errors of a difference of two shares: not once in a million by chance.
        shares = (guess, figures["accuracy"])
        assert shares[1] - shares[0] > 5 * math.sqrt(sum(p * (1 - p) for p in shares) / len(new))


def test_fine_tuning_stops_at_what_it_cannot_learn_from(config, tokenizer, tmp_path):
    class Unanswered(ShapesStatements):
        def __getitem__(self, i):
            return replace(super().__getitem__(i), target={})

    with pytest.raises(ValueError, match="every example to train on must have its answer"):
        next(iter(batches_of(Unanswered(8, image_size=32), tokenizer)))
    model = VLMoForNLVR2(config)
    with torch.no_grad():
        model.nlvr2_classifier[3].bias.fill_(float("nan"))
    batches = batches_of(ShapesStatements(8, image_size=32), tokenizer)
    with pytest.raises(RuntimeError, match="must be finite, they are nan and nan at step 1"):
        task_trainer(model, "nlvr2", Recipe(steps=2, log_every=1)).fit(batches, tmp_path)


def test_the_processes_share_out_what_one_would_take(tokenizer, monkeypatch):
    examples = ShapesQuestions(20, image_size=32)
    alone = list(islice(batches_of(examples, tokenizer), 6))  # two epochs and a bit
    parts = []
    monkeypatch.setattr("vlmo.downstream.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("vlmo.downstream.rank", lambda rank=rank: rank)
        parts.append(list(islice(batches_of(examples, tokenizer), 6)))
    for one, left, right in zip(alone, *parts):
        assert len(left.text_ids) == 4
        assert torch.equal(one.text_ids, torch.cat([left.text_ids, right.text_ids]))
        assert torch.equal(one.images[0], torch.cat([left.images[0], right.images[0]]))
        assert torch.equal(one.target, torch.cat([left.target, right.target]))
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        batches_of(examples, tokenizer, batch_size=7)
