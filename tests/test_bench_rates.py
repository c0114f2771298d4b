"""FLOPs, the ceiling and what is printed of them."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmo_kernels.bench import attention, block, ceiling, display, ffn, harness, rows, run
from vlmo_kernels.bench.cases import CASES, Case
from vlmo_kernels.bench.error import judge
from vlmo_kernels.bench.flops import useful
from vlmo_kernels.cpu import onednn

ROOT = Path(__file__).resolve().parents[1]
SUITES = {"block": block, "ffn": ffn, "attention": attention}
# Nothing is padded, so that what eager torch computes is what is useful.
FULL = Case("full", 32, 2, 64, (5, 5, 5), (9, 9, 9), 5, 9)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Compiling takes long, and is not what is asked here."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.mark.parametrize("pass_", ["forward", "training"])
@pytest.mark.parametrize("suite", SUITES)
def test_flops_are_what_torch_counts(suite, pass_):
    contestants, _ = SUITES[suite].build(FULL, "cpu", torch.float32, pass_)
    eager = next(c for c in contestants if c.name == SUITES[suite].EAGER)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # the counter cannot do inference mode
        eager.forward() if pass_ == "forward" else harness.run_training(eager)
    # Eager attention keeps its probabilities; a backward that does not computes Q K^T again, half a forward.
    again = useful("attention", FULL, "forward") / 2 if suite != "ffn" and pass_ == "training" else 0
    assert useful(suite, FULL, pass_) == counter.get_total_flops() + again


def test_padding_is_not_useful():
    padded = Case("padded", 32, 2, 64, (5, 5, 5), (9, 9, 9), 40, 197)
    assert useful("block", padded, "training") == useful("block", FULL, "training")
    assert useful("attention", padded, "forward") == 4 * 32 * 3 * 14**2


def test_the_ceiling_is_the_fastest_round_of_the_fastest_product():
    tried = {"slow": ceiling.Product(torch.empty, 4e9), "fast": ceiling.Product(torch.empty, 1e9)}
    assert ceiling.best(tried, {"slow": [4.0, 2.0], "fast": [9.0, 0.25]}) == ceiling.Ceiling(4000.0, "fast")
    assert ceiling.best({}, {}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_all_libraries_are_right(dtype):
    found = ceiling.products(FULL, "cpu", dtype)
    libraries = Counter(name.rpartition(" ")[0] for name in found)
    packed = {"oneDNN with packed weight": 2} if onednn.why_not(dtype) is None else {}
    assert libraries == {"F.linear": 2, "torch.mm": 2} | packed
    for name, product in found.items():
        plain = found[f"F.linear {name.rpartition(' ')[2]}"].call
        x, w = plain.args
        assert product.flops == 2 * 42 * 32 * 64
        assert judge(product.call(), x.double() @ w.double().T, plain()).ok, name


def test_products_run_in_every_round_and_all_results_share_their_ceiling():
    calls = Counter()
    x = torch.ones(8)
    racing = [harness.Contestant(name, partial(torch.exp, x)) for name in ("eager", "ours")]
    found = harness.gate(racing, {"output": x.double().exp()}, "forward", "eager")
    product = ceiling.Product(lambda: calls.update(["product"]), 1e6)
    harness.measure(racing, found, "forward", "cpu", rounds=3, products={"bare": product})
    assert calls["product"] == 4  # a warm-up and three rounds
    assert found[0].ceiling is found[1].ceiling and found[0].ceiling.what == "bare"
    assert [len(r.times_ms) for r in found] == [3, 3]


def row(**fields):
    given = dict(
        suite="block", case="a", contestant="ours", pass_="forward", dtype=torch.float32, times_ms=[2.0], max_err=0.0,
        rms_err=0.0, saved_bytes=None, gflop=3.0, ceiling_gflops=2000.0, device="cpu",
    )  # fmt: skip
    return rows.make_row(**(given | fields))


def without_rates(found):
    return [{k: v for k, v in r.items() if k not in rows.ADDED} for r in found]


def test_files_of_before_are_read(tmp_path):
    rows.write(tmp_path / "new.json", [row()])
    (tmp_path / "old.json").write_text(json.dumps(without_rates([row()])))
    old, new = rows.read(tmp_path / "old.json"), rows.read(tmp_path / "new.json")
    assert old[0]["gflop"] is None and old[0]["ceiling_gflops"] is None
    assert new[0]["gflop"] == 3.0 and new[0]["ceiling_gflops"] == 2000.0
    assert [r["ratio"] for r in rows.compare(old, new, 1.1)] == [1.0]
    for wrong in (row(gflop=0.0), row(ceiling_gflops="fast")):
        with pytest.raises(ValueError, match="positive number or null"):
            rows.validate(wrong)


def test_a_regression_is_one_of_ours():
    before, now = [row(), row(contestant="compile")], [row(times_ms=[40.0]), row(contestant="compile", times_ms=[40.0])]
    assert [r["regression"] for r in rows.compare(before, now, 1.1)] == [True, False]
    assert not any(r["regression"] for r in rows.compare(now, before, 1.1))
    with pytest.raises(ValueError, match="`threshold` must be at least 1, got 0.5"):
        rows.compare(before, now, 0.5)


def test_the_report_shows_the_share_where_it_was_measured(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(report, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr("vlmo_kernels.bench.environment.commit", lambda: "abc")
    found = [row(contestant="compile", times_ms=[4.0]), row()]
    path = tmp_path / "block.json"
    path.write_text(json.dumps(found))
    text = report.table(path)
    assert "| case | dtype | pass | useful GFLOP | ceiling, GFLOP/s | compile | ours |" in text
    # 3 GFLOP in 2 ms are 1500 of 2000 GFLOP/s
    assert "| a | float32 | forward | 3.0 | 2000 | 4.0 (1.00x, 38%) | 2.0 (2.00x, 75%) |" in text
    path.write_text(json.dumps(without_rates(found)))
    text = report.table(path)
    assert "| a | float32 | forward | 4.0 (1.00x) | 2.0 (2.00x) |" in text and "ceiling" not in text


@pytest.mark.parametrize("rich", [True, False])
def test_tables_leave_out_empty_columns_and_say_notes_below(rich, monkeypatch, capsys):
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    lines = [["ours", "1 ms", "-"], ["compile", "-", ""]]
    display.table("title", ["contestant", "median", "peak"], lines, notes=[("compile", "failed: why")])
    out = capsys.readouterr().out
    assert "median" in out and "peak" not in out
    assert out.splitlines()[-1] == "  compile: failed: why"
    display.table("title", ["contestant", "peak"], [])
    assert "peak" in capsys.readouterr().out  # an empty table keeps its head


def test_rates_stand_beside_every_time_and_notes_are_no_cells(monkeypatch, capsys):
    monkeypatch.setattr(attention, "attend_sdpa", lambda q, k, v, *rest: v)
    assert run.run("attention", "cpu", None, ["fp32"], ["smoke"], 1) == 0
    out = capsys.readouterr().out.splitlines()
    assert all(word in next(line for line in out if "contestant" in line) for word in ("GFLOP/s", "of ceiling"))
    assert "%" in next(line for line in out if " ours " in line).split("│")[7]
    assert any("useful GFLOP a call; ceiling: " in line for line in out)
    assert any(line.startswith("  sdpa: wrong, so not timed: ") for line in out)
    drawn = [line for line in out if line.startswith(("│", "┃", "┏", "└"))]
    assert max(map(len, drawn)) <= 100


def test_a_wrong_contestant_of_ours_comes_with_a_hint(monkeypatch, capsys):
    right = attention.shared_attention
    monkeypatch.setattr(attention, "shared_attention", lambda *a, **k: right(*a, **k) * 1.01)
    assert run.run("attention", "cpu", None, ["fp32"], ["smoke"], 1) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "not so: ours in smoke, float32, forward; ours in smoke, float32, training. Hint: " in last


def test_a_run_that_fails_says_what_to_do_and_what_is_kept(monkeypatch, tmp_path):
    right = attention.build

    def short_of_memory(case, device, dtype, pass_):
        if pass_ == "training":
            raise torch.OutOfMemoryError("out of memory")
        return right(case, device, dtype, pass_)

    monkeypatch.setattr(attention, "build", short_of_memory)
    file = tmp_path / "rows.json"
    said = r"smoke, float32, training: .* Hint: --case .* rows before it are in .*json"
    with pytest.raises(RuntimeError, match=said):
        run.run("attention", "cpu", file, ["fp32"], ["smoke"], 1)
    assert {r["pass"] for r in rows.read(file)} == {"forward"}
    assert all(r["gflop"] == useful("attention", CASES["smoke"], "forward") / 1e9 for r in rows.read(file))
