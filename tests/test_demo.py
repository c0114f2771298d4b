"""The demo, on the tiny model: what it writes, and that it notices a wrong contestant."""

import struct

import pytest
import torch

from vlmo import demo as model_part
from vlmo_kernels import demo
from vlmo_kernels.bench import rows

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
    assert demo.run(demo.Options(config="tiny", rounds=1, out=tmp_path, dtypes=("fp32",))) == 1
    assert "wrong, so not timed" in capsys.readouterr().out
    assert "ours" not in [row["contestant"] for row in rows.read(tmp_path / "results.json")]


def test_missing_model_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vlmo.demo", None)
    with pytest.raises(RuntimeError, match="vlmo must be importable"):
        demo.run(demo.Options(config="tiny"))
