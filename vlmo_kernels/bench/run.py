"""`vlmo-kernels bench` and `vlmo-kernels compare`."""

from __future__ import annotations

import importlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from . import ceiling, environment, rows
from .cases import CASES, DEFAULT, DEFAULT_GPU
from .display import megabytes, milliseconds, progress, rate_cells, table
from .error import hint
from .flops import useful
from .harness import Result, gate, measure

SUITES = ("block", "ffn", "attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(
    suite: str,
    device: str = "cpu",
    json: Path | None = None,
    dtypes: Sequence[str] = (),
    cases: Sequence[str] = (),
    rounds: int = 10,
) -> int:
    """Time a suite, print tables, write rows; 1 if a contestant of ours was wrong."""
    if suite not in SUITES:
        raise ValueError(f"bench: suite must be one of {', '.join(SUITES)}, got {suite!r}")
    for name in cases:
        if name not in CASES:
            raise ValueError(f"bench: case must be one of {', '.join(CASES)}, got {name!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"bench: device {device!r} needs a GPU that torch can use, none was found")
    module = importlib.import_module(f"vlmo_kernels.bench.{suite}")
    chosen = [DTYPES[d] for d in dtypes] or _default_dtypes(device)
    batches = cases or (DEFAULT if device == "cpu" else DEFAULT_GPU)
    plan = [(c, d, p) for c in batches for d in chosen for p in module.PASSES]
    found, wrong = [], []
    print(f"{environment.device_name(device)}; torch {torch.__version__}; F.linear: {environment.gemm_library()}")
    with progress(f"bench {suite}", len(plan)) as bar:
        for case, dtype, pass_ in plan:
            what = f"{case}, {_short(dtype)}, {pass_}"
            bar.step(what)
            try:
                results = run_case(suite, case, dtype, pass_, device, rounds)
            except RuntimeError as fault:  # of eager torch itself: the gate keeps the others' to themselves
                raise RuntimeError(_failed(suite, what, module.EAGER, fault, json if found else None)) from fault
            lost = [r.name for r in results if r.name.startswith("ours") and r.skipped not in ("", "inference only")]
            wrong += [f"{name} in {what}" for name in lost]
            _print(suite, case, dtype, pass_, results, module.EAGER)
            found += [_row(suite, case, dtype, pass_, device, r) for r in results if r.times_ms]
            if json is not None:
                rows.write(json, found)  # after every case, so that a run cut short keeps what it has
    if json is not None:
        rows.write(json, found)
        print(f"wrote {json}")
    if wrong:
        print(f"bench {suite}: ours must run and be right, not so: {'; '.join(wrong)}. {hint(device)}")
    return int(bool(wrong))


def _failed(suite: str, what: str, eager: str, fault: RuntimeError, written: Path | None) -> str:
    reason = (str(fault).strip() or "?").splitlines()[0][:200]
    kept = f" The rows before it are in {written}." if written else ""
    return (
        f"bench {suite}: {what}: contestant {eager} must run, it is what others are judged by; it failed with "
        f"{type(fault).__name__}: {reason}. Hint: --case and --dtype choose others, --case smoke is the smallest.{kept}"
    )


def run_case(suite: str, case: str, dtype: torch.dtype, pass_: str, device: str, rounds: int) -> list[Result]:
    """Gate and time one case."""
    # What was compiled before is forgotten: torch.compile would make a second batch size symbolic, and after eight
    # variants of one function leave it uncompiled, both to the loss of that contestant alone.
    torch.compiler.reset()
    module = importlib.import_module(f"vlmo_kernels.bench.{suite}")
    contestants, expected = module.build(CASES[case], device, dtype, pass_)
    results = gate(contestants, expected, pass_, module.EAGER)
    measure(contestants, results, pass_, device, rounds, products=ceiling.products(CASES[case], device, dtype))
    return results


def _default_dtypes(device: str) -> list[torch.dtype]:
    if device != "cpu":
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16] if environment.cpu_supports_bf16() else [torch.float32]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(suite: str, case: str, dtype: torch.dtype, pass_: str, device: str, result: Result) -> dict:
    return rows.make_row(
        suite=suite, case=case, contestant=result.name, pass_=pass_, dtype=dtype, times_ms=result.times_ms,
        max_err=result.verdict.max_err, rms_err=result.verdict.rms_err, saved_bytes=result.saved_bytes,
        gflop=useful(suite, CASES[case], pass_) / 1e9, ceiling_gflops=result.ceiling and result.ceiling.gflops,
        device=device,
    )  # fmt: skip


def _print(suite, case, dtype, pass_, results: Sequence[Result], eager: str) -> None:
    base = next((statistics.median(r.times_ms) for r in results if r.name == eager and r.times_ms), None)
    gflop = useful(suite, CASES[case], pass_) / 1e9
    best = next((r.ceiling for r in results if r.ceiling), None)
    lines = []
    for r in results:
        if r.skipped == "inference only":
            continue
        if not r.times_ms:
            lines.append([r.name, *"---------"])
            continue
        median = statistics.median(r.times_ms)
        lines.append([
            r.name, milliseconds(median), milliseconds(min(r.times_ms)),
            f"{100 * (max(r.times_ms) - min(r.times_ms)) / median:.0f}%", f"{base / median:.2f}x" if base else "-",
            *rate_cells(gflop, best and best.gflops, median), f"{r.verdict.max_err:.1e}", megabytes(r.saved_bytes),
            megabytes(r.peak_bytes),
        ])  # fmt: skip
    columns = [
        "contestant", "median", "fastest", "spread", "speed", "GFLOP/s", "of ceiling", "max error", "saved", "peak",
    ]  # fmt: skip
    caption = f"{gflop:.3g} useful GFLOP a call"
    if best is not None:
        caption += f"; ceiling: {best.gflops:.0f} GFLOP/s, {best.what} in the same rounds"
    notes = [(r.name, r.skipped or r.note) for r in results if r.skipped != "inference only"]
    table(f"{suite}, {case}, {_short(dtype)}, {pass_}", columns, lines, caption, [n for n in notes if n[1]])


def _alone(whose: str, here: Sequence[dict], there: Sequence[dict]) -> list[tuple[str, str]]:
    """Notes on the rows that only one of two files has: a line a device, case, pass and dtype."""
    contestants = defaultdict(list)
    for r in rows.only_in(here, there):
        contestants[r["device"], f"{r['suite']} {r['case']}, {r['pass']}, {r['dtype']}"].append(r["contestant"])
    devices = {r["device"] for r in (*here, *there)}
    return [
        (whose, f"{what}: {', '.join(names)}" + (f", on {device}" if len(devices) > 1 else ""))
        for (device, what), names in contestants.items()
    ]


def compare(base: Path, head: Path, threshold: float = 1.1) -> int:
    """Print two results files side by side, and what only one of them has; 1 on a regression.

    Raises:
        ValueError: a file has no rows of this schema, or the two have none in common.
    """
    before, after = rows.read(base), rows.read(head)
    found = rows.compare(before, after, threshold)
    if not found:
        raise ValueError(
            f"compare: '{base}' and '{head}' must have rows of the same suite, case, contestant, pass, dtype and "
            "device, they share none"
        )
    lines = [
        [
            f"{r['suite']} {r['case']} {r['contestant']}", r["pass"], r["dtype"], milliseconds(r["base_ms"]),
            milliseconds(r["head_ms"]), f"{r['ratio']:.2f}", "REGRESSION" if r["regression"] else "",
        ]
        for r in found
    ]  # fmt: skip
    table(
        f"head / base, threshold {threshold:g}", ["row", "pass", "dtype", "base", "head", "ratio", "note"], lines,
        notes=_alone(f"only in base, {base}", before, after) + _alone(f"only in head, {head}", after, before),
    )  # fmt: skip
    return int(any(r["regression"] for r in found))
