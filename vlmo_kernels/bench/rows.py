"""The rows of a results file: one schema for every suite and for the demo."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import environment

FIELDS = (
    "suite", "case", "contestant", "pass", "dtype", "median_ms", "min_ms", "rounds", "max_err", "rms_err",
    "saved_bytes", "gflop", "ceiling_gflops", "versions", "commit", "device",
)  # fmt: skip
ADDED = ("gflop", "ceiling_gflops")  # older files have none of them: None
KEY = ("suite", "case", "contestant", "pass", "dtype", "device")
PASSES = ("forward", "training")


def make_row(
    *,
    suite: str,
    case: str,
    contestant: str,
    pass_: str,
    dtype: torch.dtype,
    times_ms: Sequence[float],
    max_err: float | None,
    rms_err: float | None,
    saved_bytes: int | None,
    gflop: float | None,
    ceiling_gflops: float | None,
    device: torch.device | str,
) -> dict[str, Any]:
    """One row.

    Args:
        max_err, rms_err: against fp64.
        saved_bytes: None where the pass keeps nothing for backward.
        gflop: useful FLOPs of one call, in units of 1e9 (`flops.py`); None where they are not counted.
        ceiling_gflops: the best GEMM rate of the same run, GFLOP/s (`ceiling.py`).
    """
    values = (
        suite, case, contestant, pass_, str(dtype).removeprefix("torch."), statistics.median(times_ms),
        min(times_ms), len(times_ms), max_err, rms_err, saved_bytes, gflop, ceiling_gflops, environment.versions(),
        environment.commit(), environment.device_name(device),
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def validate(row: dict[str, Any]) -> None:
    """Raise ValueError if `row` does not have the schema."""
    if set(row) != set(FIELDS):
        odd = sorted(set(row) ^ set(FIELDS))
        raise ValueError(f"rows: a row must have exactly {', '.join(FIELDS)}; missing or foreign: {', '.join(odd)}")
    for name in ("median_ms", "min_ms"):
        if not isinstance(row[name], (int, float)) or row[name] < 0:
            raise ValueError(f"rows: `{name}` must be a time, got {row[name]!r}")
    for name in ADDED:
        if row[name] is not None and not (isinstance(row[name], (int, float)) and row[name] > 0):
            raise ValueError(f"rows: `{name}` must be a positive number or null, got {row[name]!r}")


def write(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as a JSON list, one row a line; makes the folder."""
    for row in rows:
        validate(row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f"[\n{lines}\n]\n" if rows else "[]\n", encoding="utf-8")


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read rows and check them.

    Raises:
        ValueError: the file is missing, or no list of rows.
    """
    if not Path(path).is_file():
        raise ValueError(f"rows: '{path}' must be a results file (vlmo-kernels bench --json FILE), it is not there")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"rows: '{path}' must be JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"rows: '{path}' must hold a list of rows")
    rows = [dict.fromkeys(ADDED) | row for row in rows]
    for row in rows:
        validate(row)
    return rows


def compare(base: Sequence[dict], head: Sequence[dict], threshold: float) -> list[dict[str, Any]]:
    """Rows of both files side by side: the key, both medians, head / base, and whether that is a regression.

    Only rows with the same suite, case, contestant, pass, dtype and device are compared. A regression is one of ours;
    the baselines' drift tells how far two runs can be compared at all.

    Raises:
        ValueError: a threshold below 1.
    """
    if not threshold >= 1.0:
        raise ValueError(f"compare: `threshold` must be at least 1, got {threshold}")
    before = {_key(row): row for row in base}
    found = []
    for row in head:
        other = before.get(_key(row))
        if other is None:
            continue
        ratio = row["median_ms"] / other["median_ms"] if other["median_ms"] else float("inf")
        found.append(
            {k: row[k] for k in KEY}
            | {"base_ms": other["median_ms"], "head_ms": row["median_ms"], "ratio": ratio}
            | {"regression": ratio > threshold and row["contestant"].startswith("ours")}
        )
    return found


def only_in(rows: Sequence[dict], others: Sequence[dict]) -> list[dict]:
    """The rows that have no counterpart among the others."""
    there = {_key(row) for row in others}
    return [row for row in rows if _key(row) not in there]


def _key(row: dict) -> tuple:
    return tuple(row[k] for k in KEY)
