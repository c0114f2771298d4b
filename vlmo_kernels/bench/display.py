"""Tables and progress: with rich where it is installed, in plain text where not."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    notes: Sequence[tuple[str, str]] = (),
) -> None:
    """Print a table to stdout. The first column is left-aligned; a column without a value in any row is left out.

    Args:
        notes: (whose, text), each on a line of its own below: a sentence in a cell would squeeze all other columns.
    """
    kept = [i for i in range(len(columns)) if not rows or any(row[i] not in ("", "-") for row in rows)]
    _draw(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], caption)
    for whose, text in notes:
        print(textwrap.fill(f"{whose}: {text}", 100, initial_indent="  ", subsequent_indent="    ", **_WHOLE_WORDS))


def each_reason_once(found: Sequence[tuple[str, str, str]], places: int) -> list[tuple[str, str]]:
    """Notes for a table from (whose, where, why); a reason that holds in all of the `places` names none of them."""
    where = defaultdict(list)
    for whose, place, why in found:
        where[whose, why].append(place)
    return [(w if len(at) == places else f"{w}, {', '.join(at)}", why) for (w, why), at in where.items()]


def _draw(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        _plain(title, columns, rows, caption)
        return
    # Without a terminal rich assumes 80 columns and folds every cell.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    drawn = Table(title=escape(title), caption=escape(caption) or None, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        drawn.add_column(escape(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    console.print(drawn)


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for row in [columns, *rows]:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    if caption:
        print(caption)


class Steps:
    """What a progress display offers: `step(text)` says what begins now and counts what came before."""

    def __init__(self, advance, total: int) -> None:
        self._advance, self.total, self.done = advance, total, 0

    def step(self, text: str) -> None:
        self._advance(text, self.done)
        self.done += 1

    def skip(self, count: int, text: str) -> None:
        """Count steps that will not be taken as done, and say why."""
        self.done += count - 1
        self.step(text)


@contextmanager
def progress(title: str, total: int) -> Iterator[Steps]:
    """A progress bar on stderr; one line a step where there is no terminal or no rich."""
    begun = time.perf_counter()
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        rich = None
    else:
        rich = Console(stderr=True)
    if rich is None or not rich.is_terminal:

        def line(text: str, done: int) -> None:
            print(
                f"[{time.perf_counter() - begun:5.1f} s] {title} {done + 1}/{total}: {text}",
                file=sys.stderr,
                flush=True,
            )

        yield Steps(line, total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=rich, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield Steps(lambda text, done: bar.update(task, completed=done, description=f"{title}: {text}"), total)


def rate_cells(gflop: float | None, ceiling_gflops: float | None, ms: float) -> list[str]:
    """Useful GFLOP/s of a time, and its share of the ceiling."""
    if gflop is None:
        return ["-", "-"]
    rate = gflop / ms * 1e3
    return [f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}", f"{rate / ceiling_gflops:.0%}" if ceiling_gflops else "-"]


def milliseconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.2f} ms" if ms >= 1 else f"{ms * 1000:.1f} us"


def megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"
