"""The demo, on the tiny model: what it writes, and that it notices a wrong contestant."""

import re
import struct

import pytest
import torch

from vlmo import demo as model_part
from vlmo_kernels import demo
from vlmo_kernels.bench import rows
from vlmo_kernels.bench.error import Verdict

NAMES = ["published", "sdpa", "compile", "ours"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo.run(demo.Options(config="tiny", rounds=2, out=out, dtypes=("fp32",))) == 0
    return out


def test_results_have_the_schema_and_all_contestants(folder):
    found = rows.read(folder / "results.json")
    assert [row["contestant"] for row in found] == NAMES
    assert all(row["suite"] == "demo" and row["rounds"] == 2 and row["dtype"] == "float32" for row in found)
    kept = {row["contestant"]: row["saved_bytes"] for row in found}
    assert 0 < kept["ours"] < kept["published"] and kept["compile"] is None


def test_chart_is_a_picture(folder):
    header = (folder / "demo.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    assert width > 800 and height > 400


def test_chart_shows_every_caption_to_its_end(tmp_path, monkeypatch):
    from vlmo_kernels import demo_data
    from vlmo_kernels.bench import chart

    drawn = []
    monkeypatch.setattr(chart.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"dtype": "float32", "contestant": "ours", "median_ms": 1.0, "case": "c", "device": "d"}
    photos, captions = zip(*demo_data.load_photos())
    chart.draw(tmp_path / "demo.png", [row], photos, captions)
    drawn[0].draw_without_rendering()
    labels = [axis.xaxis.label for axis in drawn[0].axes[: len(photos)]]
    assert [label.get_text().replace("\n", " ") for label in labels] == list(captions)
    boxes = [label.get_window_extent() for label in labels]
    bars = drawn[0].axes[-1].title.get_window_extent()
    assert all(box.x0 >= 0 and box.x1 <= drawn[0].bbox.x1 and box.y0 >= bars.y1 for box in boxes)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_contestants_share_their_parameters():
    model = model_part.build_model("tiny", 600)
    models = model_part.make_contestants(model)
    assert list(models) == NAMES
    for other in models.values():
        assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_wrong_contestant_is_named_and_not_timed(tmp_path, monkeypatch, capsys):
    make = model_part.make_contestants

    def broken(model):
        models = make(model)
        models["compile"] = models["sdpa"]
        block = models["ours"].transformer.blocks[1]
        block.gamma_2 = torch.nn.Parameter(block.gamma_2 * 1.01)
        return models

    monkeypatch.setattr(model_part, "make_contestants", broken)
    assert demo.run(demo.Options(config="tiny", rounds=5, budget_s=0.0, out=tmp_path, dtypes=("fp32",))) == 1
    said = capsys.readouterr()
    assert "  ours: wrong, so not timed" in said.out
    assert "\nwrong: ours in float32; " in said.out and "Hint: `vlmo-kernels check --device cpu`" in said.out
    # Two rounds are run, three are not for want of time: the count says so and ends where it should.
    counts = re.findall(r"demo (\d+)/(\d+): (.*)", said.err)
    assert counts[-1][0] == counts[-1][1] and "3 of 5 rounds left out" in counts[-1][2]
    assert [int(c[0]) for c in counts[:-1]] == list(range(1, len(counts)))
    assert "ours" not in [row["contestant"] for row in rows.read(tmp_path / "results.json")]


def test_a_contestant_that_must_run_fails_with_a_hint(tmp_path, monkeypatch):
    make = model_part.make_contestants

    def broken(model):
        models = make(model)
        models["compile"] = models["sdpa"]
        models["ours"] = torch.nn.Module()
        return models

    monkeypatch.setattr(model_part, "make_contestants", broken)
    with pytest.raises(RuntimeError, match="ours must run in float32, it failed with AttributeError: .* Hint: "):
        demo.run(demo.Options(config="tiny", rounds=1, out=tmp_path, dtypes=("fp32",)))


@pytest.mark.parametrize(
    "verdicts, said, advice",
    [
        ({"ours": "", "compile": ""}, "all contestants agree", ""),
        ({"ours": "", "compile": None}, "all that ran agree; failed: compile in float32", "needs a C++ compiler"),
        ({"ours": "far", "sdpa": "far"}, "wrong: ours in float32, sdpa in float32", "vlmo-kernels check"),
        ({"ours": "", "sdpa": "far"}, "wrong: sdpa in float32", "torch's own"),
    ],
)
def test_the_last_line_says_who_is_wrong_and_the_next_what_to_do(verdicts, said, advice):
    outcomes = [
        demo.Outcome(name, torch.float32, None if why is None else Verdict(0.0, 0.0, 0.0, 0.0, why))
        for name, why in verdicts.items()
    ]
    found, hints = demo._conclusion(outcomes, "cpu")
    assert found == said and (advice in hints[0] if advice else not hints)


def test_missing_model_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vlmo.demo", None)
    with pytest.raises(RuntimeError, match="vlmo must be importable"):
        demo.run(demo.Options(config="tiny"))
