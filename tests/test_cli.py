"""The command line: each command once, on the smallest input."""

import json

import pytest
import torch

from vlmo_kernels import check, cli
from vlmo_kernels.bench import display, environment, probe, rows, run
from vlmo_kernels.bench.error import hint, judge
from vlmo_kernels.runtime.dispatch import Explanation


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return exit_.value.code or 0


def test_info_names_versions_gemm_library_and_implementations(capsys):
    assert call("info") == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "F.linear", "threads", "GPU", "routed_ffn", "shared_attention"):
        assert word in out


def test_info_says_each_thing_once_and_narrowly(capsys):
    assert call("info") == 0
    table = capsys.readouterr().out.partition("\nimplementations")[2]
    assert all(len(line) <= 100 for line in table.splitlines())
    assert table.count("needs a CUDA device") <= 1 and table.count("routed_norm") == 1 + torch.cuda.is_available()


def test_reasons_that_hold_everywhere_name_no_place():
    found = [("not a on cpu", place, "no compiler") for place in ("x", "y")] + [("not b on cpu", "y", "too wide")]
    assert display.each_reason_once(found, 2) == [("not a on cpu", "no compiler"), ("not b on cpu, y", "too wide")]


def test_info_tells_an_op_that_cannot_be_explained(monkeypatch):
    def explain(op, device, dtype):
        if op == "routed_norm" and dtype == torch.float16:
            raise OSError("no such luck")
        return Explanation(op, "cpu", {"triton": "not here"})

    monkeypatch.setattr(probe, "explain_op", explain)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, notes = environment.implementations()
    assert found[:3] == [
        ("routed_linear", "cpu", "float32, bfloat16, float16", "cpu"),
        ("routed_norm", "cpu", "float32, bfloat16", "cpu"),
        ("routed_norm", "cpu", "float16", "unknown"),
    ]
    assert ("unknown on cpu, routed_norm float16", "OSError: no such luck") in notes


def test_notes_are_wrapped_and_tables_fit_120_columns(capsys):
    display.table("t", ["a", "b"], [["x " * 100, "y " * 100]], notes=[("who", "why " * 50)])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines) and lines[-1].startswith("    why why")


def test_info_needs_no_typer(monkeypatch, capsys):
    monkeypatch.setattr(cli, "typer", None)
    assert call("info") == 0
    assert call("demo") == 1
    assert "pip install 'vlmo_kernels[cli]'" in capsys.readouterr().err


def test_info_survives_a_broken_machine(monkeypatch, capsys):
    def broken():
        raise OSError("no such luck")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    assert call("info") == 0
    assert "no such luck" in capsys.readouterr().out


CASE = "1 token: the image expert is empty"


def test_check_passes_on_a_small_part():
    assert call("check", "--op", "routed_ffn", "--dtype", "fp32", "--case", CASE, "--device", "cpu") == 0


def test_check_says_once_what_it_did_not_try(capsys):
    assert call("check", "--op", "routed_norm", "--case", CASE, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.count("not tried: triton on cpu: ") == 1 and all(len(line) <= 100 for line in out.splitlines())


def test_check_fails_on_a_wrong_implementation(monkeypatch, capsys):
    right = check._results

    def wrong(call, impl):
        found = right(call, impl)
        return {k: v * 1.01 if impl == "cpu" else v for k, v in found.items()}

    monkeypatch.setattr(check, "_results", wrong)
    assert call("check", "--op", "routed_linear", "--dtype", "fp32", "--case", CASE) == 1
    assert "routed_linear cpu fp32 cpu" in capsys.readouterr().out


def test_the_hint_promises_no_more_than_check_does():
    assert "tries every op on small inputs" in hint("cuda") and "--device cuda" in hint("cuda")
    assert "it may pass where a fault takes the inputs of this run" in hint("cuda")


def test_judge_rejects_nan_shape_and_dtype():
    expected, eager = torch.ones(4, dtype=torch.float64), torch.ones(4)
    assert judge(torch.ones(4), expected, eager).ok
    assert "NaN" in judge(torch.full((4,), float("nan")), expected, eager).why
    assert "shape" in judge(torch.ones(5), expected, eager).why
    assert "dtype" in judge(torch.ones(4).half(), expected, eager).why


@pytest.fixture(scope="module")
def attention_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "attention.json"
    code = call("bench", "attention", "--case", "smoke", "--dtype", "fp32", "--rounds", "2", "--json", str(path))
    assert code == 0
    return path


def test_bench_writes_rows_of_the_schema(attention_file):
    found = json.loads(attention_file.read_text())
    assert {(r["contestant"], r["pass"]) for r in found} >= {
        (c, p) for c in ("eager", "sdpa", "ours") for p in ("forward", "training")
    }
    for row in found:
        assert tuple(row) == rows.FIELDS
        assert row["rounds"] == 2 and 0 < row["min_ms"] <= row["median_ms"]
        assert (row["saved_bytes"] is None) == (row["pass"] == "forward")
        assert row["gflop"] > 0 and row["ceiling_gflops"] > 0
        assert row["versions"]["gemm"] and row["versions"]["torch"] == torch.__version__
    kept = {r["contestant"]: r["saved_bytes"] for r in found if r["pass"] == "training"}
    assert 0 < kept["ours"] < kept["eager"]


@pytest.mark.parametrize("factor, code", [(1.05, 0), (1.2, 1)])
def test_compare_answers_with_its_exit_status(attention_file, tmp_path, factor, code):
    slower = [row | {"median_ms": row["median_ms"] * factor} for row in rows.read(attention_file)]
    head = tmp_path / "head.json"
    rows.write(head, slower)
    assert call("compare", str(attention_file), str(head), "--threshold", "1.1") == code


def test_compare_names_what_one_file_alone_has(attention_file, tmp_path, capsys):
    found = rows.read(attention_file)
    paths = [tmp_path / "base.json", tmp_path / "head.json"]
    rows.write(paths[0], [r for r in found if (r["contestant"], r["pass"]) != ("ours", "training")])
    rows.write(paths[1], [r for r in found if r["contestant"] != "sdpa"])
    assert call("compare", *map(str, paths)) in (0, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"only in base, {paths[0]}: attention smoke, forward, float32: sdpa " in said
    assert f"only in base, {paths[0]}: attention smoke, training, float32: sdpa " in said
    assert f"only in head, {paths[1]}: attention smoke, training, float32: ours" in said
    assert said.count("only in") == 3
    other = [r | {"device": "another"} if r["contestant"] == "ours" else r for r in found]
    rows.write(paths[1], other)
    call("compare", str(attention_file), str(paths[1]))
    assert "forward, float32: ours, on another" in " ".join(capsys.readouterr().out.split())


def test_compare_refuses_files_without_common_rows(attention_file, tmp_path, capsys):
    rows.write(tmp_path / "empty.json", [])
    assert call("compare", str(attention_file), str(tmp_path / "empty.json")) == 2
    assert "they share none" in capsys.readouterr().err


@pytest.mark.parametrize("suite, pass_", [("ffn", "forward"), ("block", "forward"), ("block", "training")])
def test_suites_find_ours_right(suite, pass_, monkeypatch):
    # Compiling is the other contestants' time, and not what is asked here.
    monkeypatch.setattr(torch, "compile", lambda function: function)
    results = run.run_case(suite, "smoke", torch.float32, pass_, "cpu", rounds=1)
    ours = {r.name: r for r in results if r.name.startswith("ours")}
    assert ours and all(r.verdict.ok and len(r.times_ms) == 1 for r in ours.values())


def test_bench_does_not_time_what_is_wrong(monkeypatch):
    from vlmo_kernels.bench import attention

    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(attention, "attend_sdpa", lambda q, k, v, *rest: v)
    found = {r.name: r for r in run.run_case("attention", "smoke", torch.float32, "forward", "cpu", rounds=1)}
    assert found["sdpa"].skipped.startswith("wrong") and not found["sdpa"].times_ms
    assert found["ours"].times_ms


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("bench", "block", "--case", "none"), "case must be one of"),
        (("check", "--op", "none"), "op must be one of"),
        (("demo", "--config", "none"), "config must be one of"),
        (("tune",), "there must be a GPU"),
        (("tune", "--model", "none"), "model must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
