"""The command line: each command once, on the smallest input."""

import json

import pytest
import torch

from vlmo_kernels import check, cli
from vlmo_kernels.bench import rows, run
from vlmo_kernels.bench.error import judge


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return exit_.value.code or 0


def test_info_names_versions_gemm_library_and_implementations(capsys):
    assert call("info") == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "F.linear", "threads", "GPU", "routed_ffn", "shared_attention"):
        assert word in out


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


def test_check_fails_on_a_wrong_implementation(monkeypatch, capsys):
    right = check._results

    def wrong(call, impl):
        found = right(call, impl)
        return {k: v * 1.01 if impl == "cpu" else v for k, v in found.items()}

    monkeypatch.setattr(check, "_results", wrong)
    assert call("check", "--op", "routed_linear", "--dtype", "fp32", "--case", CASE) == 1
    assert "routed_linear cpu fp32 cpu" in capsys.readouterr().out


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
