"""Suite `launches`: every launch of a block alone, its rate beside the bare product of cuBLAS and the GPU's ceiling."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from vlmo_kernels.tuning import tables
from vlmo_kernels.tuning.tune import DTYPES, MODELS, jobs

from . import ceiling, environment, rows
from .display import milliseconds, table
from .error import hint, judge, worst
from .harness import interleave


def run(
    device: str = "cuda", json: Path | None = None, model: str = "base", pairs: int = 64, dtype: str = "bf16",
    rounds: int = 30,
) -> int:  # fmt: skip
    """Time the launches of one block; 1 if one was wrong by the rule.

    "ours" is the launch with its whole epilogue in the configuration a user gets, "product" torch's GEMM of the same
    shape with none.
    """
    size = ceiling.SQUARE if device != "cpu" else 64
    kind = DTYPES[dtype]
    products = ceiling.square(device, kind, size)
    best = ceiling.best(products, interleave({n: p.call for n, p in products.items()}, device, rounds))
    print(f"{environment.device_name(device)}: {best.what} in {dtype}, {best.gflops / 1e3:.1f} TFLOP/s")
    found, lines, notes, wrong = [], [], [], False
    for job in jobs(*MODELS[model], pairs, kind, device):
        with tables.forced(job.without):
            outputs = job.run()
        verdict = worst([judge(*t) for t in zip(outputs, job.plain(torch.float64), job.plain(kind), strict=True)])
        wrong |= not verdict.ok
        calls = {"ours": _forced(job)} | ({"product": job.product} if job.product else {})
        times = interleave(calls, device, rounds) if verdict.ok else {}
        for name, ms in times.items():
            found.append(
                rows.make_row(
                    suite="launches", case=str(job.problem), contestant=name, pass_="forward", dtype=kind,
                    times_ms=ms, max_err=verdict.max_err if name == "ours" else None,
                    rms_err=verdict.rms_err if name == "ours" else None, saved_bytes=None,
                    gflop=job.flops / 1e9, ceiling_gflops=best.gflops, device=device,
                )
            )  # fmt: skip
        lines.append(_line(job, times, best.gflops / 1e3))
        if not verdict.ok:
            notes.append((str(job.problem), f"wrong, so not timed: {verdict.why}"))
        if json is not None:
            rows.write(json, found)
    columns = ["launch", "ours", "spread", "TFLOP/s", "of the ceiling", "product", "of its rate"]
    table(f"launches, {model}, {pairs} pairs, {dtype}", columns, lines, notes=notes)
    if wrong:
        print(hint(device))
    return int(wrong)


def _forced(job):
    def call() -> None:
        with tables.forced(job.without):
            job.run()

    return call


def _line(job, times: dict[str, list[float]], peak: float) -> list[str]:
    """Cells of a launch; `peak` in TFLOP/s."""
    if not times:
        return [str(job.problem), *"------"]
    ours = statistics.median(times["ours"])
    rate = job.flops / ours / 1e9
    spread = f"{100 * (max(times['ours']) - min(times['ours'])) / ours:.0f}%"
    cells = [str(job.problem), milliseconds(ours), spread, f"{rate:.1f}", f"{100 * rate / peak:.0f}%"]
    if "product" not in times:
        return [*cells, "-", "-"]
    product = statistics.median(times["product"])
    return [*cells, milliseconds(product), f"{100 * product / ours:.0f}%"]
