"""`vlmo demo` in seconds: every part runs, and its figures are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.vlmo.training import CONFIG, tokenizer
from vlmo import VLMo, shapes
from vlmo.demo_vlmo import QUICK, loss_ends, matching_accuracy, run, shortcomings, word_accuracy
from vlmo.retrieval import Embeddings, read_gallery
from vlmo.sources import open_source

STAGES = {"vision": (2, 4, 1e-3), "language": (2, 4, 1e-3), "vision-language": (2, 4, 1e-3)}
SMALLEST = replace(QUICK, config="tiny", pictures=64, stages=STAGES, heldout=12, max_text_len=20)
GOOD = {"t2i_r1": 0.9, "i2t_r1": 0.8, "itm_accuracy": 0.85, "mlm_accuracy": 0.61, "mlm_unigram_accuracy": 0.2}


def test_three_stages_figures_and_curves(tmp_path, capsys) -> None:
    assert run(tmp_path, SMALLEST) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(GOOD) <= set(results)
    assert all(0.0 <= results[name] <= 1.0 for name in GOOD)
    assert results["variety"]["heldout_captions"] == 12 and results["variety"]["captions_in_both"] == 0
    losses = {"vision/mim", "language/mlm", "vision-language/itc", "vision-language/itm", "vision-language/mlm"}
    assert losses <= set(results["loss_begin_end"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "vision-language" / "model.safetensors").is_file()
    assert "held-out captioned pictures" in capsys.readouterr().out


def test_thresholds_that_are_missed_fail(tmp_path, capsys) -> None:
    assert run(tmp_path, replace(SMALLEST, checked=True)) == 1  # two steps teach nothing
    said = capsys.readouterr().err
    assert "t2i_r1 must be at least 0.8, it is 0." in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["passed"] and results["missed"]


@pytest.mark.parametrize(
    "change, word",
    [
        ({}, None),
        ({"t2i_r1": 0.79}, "t2i_r1"),
        ({"i2t_r1": float("nan")}, "i2t_r1"),
        ({"itm_accuracy": 0.84}, "itm_accuracy"),
        ({"mlm_accuracy": 0.59}, "unigram"),
    ],
)
def test_shortcomings(change: dict[str, float], word: str | None) -> None:
    lines = shortcomings(GOOD | change, {"vision/mim": (1.0, 0.5)})
    assert len(lines) == (word is not None) and all(word in line for line in lines)


def test_a_loss_that_rises_is_a_shortcoming() -> None:
    log = [{"step": i, "loss": float(i), "itm": 1.0 - i / 100} for i in range(20)]
    ends = loss_ends(log)
    assert ends == {"loss": (0.5, 18.5), "itm": pytest.approx((0.995, 0.815))}
    assert [line.split(" must")[0] for line in shortcomings(GOOD, ends)] == ["the loss loss"]


@pytest.fixture(scope="module")
def gallery():
    return read_gallery(open_source("shapes:20:heldout", CONFIG.image_size), tokenizer(), CONFIG.image_size, 20)[0]


def test_matching_accuracy_of_a_model_that_always_agrees(gallery) -> None:
    torch.manual_seed(0)
    model = VLMo(CONFIG).eval()
    with torch.no_grad():
        model.itm_score.fc.weight.zero_()
        model.itm_score.fc.bias.copy_(torch.tensor([0.0, 1.0]))
    same = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    figures = matching_accuracy(model, gallery, Embeddings(same, same, torch.arange(20)))
    assert figures == {"itm_accuracy": 0.5, "itm_hard_accuracy": 0.5, "itm_positive_accuracy": 1.0}


def test_the_unigram_rate_is_that_of_the_most_frequent_word(gallery) -> None:
    torch.manual_seed(0)
    model = VLMo(CONFIG).eval()
    captions = [shapes.dataset(4000).caption(i) for i in range(4000)]
    words = [word for caption in captions for word in caption.replace(",", " ,").split()]
    most_frequent = tokenizer()._wordpiece.token_to_id(max(set(words), key=words.count))
    with torch.no_grad():
        model.mlm_score.bias[most_frequent] = 1e6
    figures = word_accuracy(model, gallery, tokenizer())
    assert figures["mlm_accuracy"] == figures["mlm_unigram_accuracy"] > 0.05
