"""The picture of a demo run. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

_COLOURS = {"published": "#8c8c8c", "sdpa": "#6f9fd8", "compile": "#e0a458", "ours": "#3a8f5c"}


def draw(path: Path, rows: Sequence[dict[str, Any]], photos: Sequence[Any], captions: Sequence[str]) -> None:
    """Bars of median times, one panel a dtype, under the photographs and captions they were taken on."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 2.4])
    for axis, photo, caption in zip(top.subplots(1, len(photos)), photos, captions, strict=True):
        axis.imshow(photo.resize((160, 160)))
        axis.set(xticks=[], yticks=[], anchor="N")
        axis.spines[:].set_visible(False)
        axis.set_xlabel(textwrap.fill(caption, 24), fontsize=7)
    for axis, dtype in zip(bottom.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        group = [row for row in rows if row["dtype"] == dtype]
        base = group[0]["median_ms"]
        bars = axis.bar(
            [row["contestant"] for row in group],
            [row["median_ms"] for row in group],
            color=[_COLOURS.get(row["contestant"], "#555555") for row in group],
        )
        axis.bar_label(
            bars, [f"{row['median_ms']:.0f} ms\n{base / row['median_ms']:.2f}x" for row in group], fontsize=9
        )
        axis.margins(y=0.18)
        axis.set_title(dtype)
        axis.set_ylabel("ms a batch (median; lower is better)")
        axis.spines[["top", "right"]].set_visible(False)
    if rows:
        bottom.supxlabel(f"{rows[0]['case']}, {rows[0]['device']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
