"""`vlmo compare` in seconds, and the architectures in it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.vlmo.training import CONFIG, batch, tokenizer
from vlmo.compare import QUICK, TITLES, Setup, measure_times, rows_of, run, score_recall, times_of, vectors
from vlmo.retrieval import read_gallery
from vlmo.sources import open_source
from vlmo.towers import Towers

SMALLEST = replace(
    QUICK, config="tiny", pictures=64, steps=(1, 1, 1), batch_size=4, question_steps=1, questions=8, gallery=6,
    large_gallery=8, sizes=(1, 4), max_text_len=20,
)  # fmt: skip


def towers(fusion_layers: int) -> Towers:
    torch.manual_seed(0)
    return Towers(CONFIG, fusion_layers)


def test_everything_is_trained_measured_and_drawn(tmp_path, capsys) -> None:
    run(tmp_path, SMALLEST, tmp_path / "results" / "vlmo_compare.json")
    result = json.loads((tmp_path / "results" / "vlmo_compare.json").read_text())
    assert list(result["contestants"]) == list(TITLES)
    assert [c["recall"]["by"] for c in result["contestants"].values()].count("all pairs") == 1
    assert {t["way"] for t in result["timings"]} == {
        "dual, vectors", "towers, vectors", "vlmo, vectors", "fusion, all pairs", "vlmo, all pairs"
    }  # fmt: skip
    for columns, rows in (rows_of(result), times_of(result)):
        assert all(len(row) == len(columns) for row in rows) and len(rows) == 5
    shown = capsys.readouterr().out
    assert all(len(line) <= 120 for line in shown.splitlines() if "│" in line)
    assert all(f"  {name}: {title}" in shown for name, title in TITLES.items())
    assert (tmp_path / "vlmo_compare.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_names_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="names must be among dual, fusion, .*, got clip"):
        run(tmp_path, SMALLEST, names=("clip",))


@pytest.mark.parametrize(
    "fusion_layers, names", [(0, {"itc"}), (CONFIG.depth, {"itm", "mlm"}), (2, {"itc", "itm", "mlm"})]
)
def test_losses_of_the_three_architectures(fusion_layers: int, names: set[str]) -> None:
    model = towers(fusion_layers)
    losses = model.losses(batch(8), tokenizer(), 0, 0)
    assert set(losses) == names | {"loss"}
    losses["loss"].backward()
    weight = {"itc": 1.0, "itm": 1.0, "mlm": 0.25}
    assert losses["loss"].item() == pytest.approx(sum(weight[n] * losses[n].item() for n in names))


@pytest.mark.parametrize("fusion_layers", [0, 2, CONFIG.depth])
def test_who_sees_what(fusion_layers: int) -> None:
    """The text reaches the image's encoding in no architecture, and the joint features in all."""
    model, given = towers(fusion_layers).eval(), batch(2)
    changed = given.text_ids.clone()
    changed[:, 1] = changed[:, 2]
    mask = given.text_mask
    before, after = (model.encode(given.image, ids, mask) for ids in (given.text_ids, changed))
    assert torch.equal(before.image, after.image) and not torch.equal(before.text, after.text)
    a, b = (model.joint(given.image, ids, mask) for ids in (given.text_ids, changed))
    assert a.shape == (2, CONFIG.dim * (1 if fusion_layers else 3)) and not torch.allclose(a, b)


def test_the_fusion_encoder_is_vlmo_without_modality_experts() -> None:
    model, given = towers(CONFIG.depth).eval(), batch(2)
    expected = model.fusion.infer(given.image, given.text_ids, given.text_mask).cls_feats
    torch.testing.assert_close(model.joint(given.image, given.text_ids, given.text_mask), expected, rtol=0, atol=0)
    assert all(block.mlp_vl is not None for block in model.fusion.transformer.blocks)


def test_fusion_layers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"fusion_layers must lie in 0..depth=4, got 5"):
        Towers(CONFIG, 5)


def test_score_recall_counts_ties_as_wrong() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 3.0, 2.5]])  # images by texts
    assert score_recall(scores) == {"t2i_r1": pytest.approx(2 / 3), "i2t_r1": pytest.approx(1 / 3)}
    assert score_recall(torch.zeros(4, 4)) == {"t2i_r1": 0.0, "i2t_r1": 0.0}


def test_times_beyond_the_budget_are_computed_and_say_so() -> None:
    gallery, _ = read_gallery(open_source("shapes:8:heldout", CONFIG.image_size), tokenizer(), CONFIG.image_size, 20)
    contestants = {"dual": towers(0).eval(), "fusion": towers(CONFIG.depth).eval()}
    setup = Setup(sizes=(1, 8), rounds=1, longest=0.0)
    lines = {(t["way"], t["n"]): t for t in measure_times(contestants, gallery, setup)}
    assert lines["dual, vectors", 8]["measured"] and lines["dual, vectors", 8]["passes"] == 16
    first, second = (lines["fusion, all pairs", n] for n in (1, 8))
    assert first["measured"] and not second["measured"] and second["passes"] == 64
    assert second["seconds"] == pytest.approx(64 * first["seconds"])
    assert vectors(contestants["dual"], gallery, 3)[0].shape == (3, CONFIG.dim)
