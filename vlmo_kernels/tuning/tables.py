"""Tables of measured launch configurations, looked up at every launch; nothing is ever tuned in a user's forward.

A file holds one architecture:

    {"format": 1, "arch": "sm_90", "device": "<name>", "versions": {...}, "commit": "<hash>" or null, "entries": [
      {"kernel": "gemm", "dtype": "bfloat16", "sizes": [16384, 4096, 1024], "config": [128, 128, 64, 8, 3, 2, 128],
       "ms": <time>, "heuristic_ms": <time of what the heuristics choose, in the same run>}, ...]}

`sizes` are buckets: each is the power of two at or above the size of a launch. What they are is said beside each
kernel's lookup, as is the order of `config`. A name in its place is a route: "cublas", torch's own GEMM and a
pointwise kernel; "long", for the short attention backward, the two kernels that take any length.
The user's cache, written by `vlmo-kernels tune`, comes before the tables shipped in `measured/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
SHIPPED = Path(__file__).parent / "measured"
CUBLAS, LONG = "cublas", "long"  # routes
HEURISTIC = "heuristics"


class Problem(NamedTuple):
    """A launch as the tables know it: kernel, dtype of its operands, and sizes as given (not yet buckets)."""

    kernel: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kernel} {short(self.dtype)} {'x'.join(map(str, buckets(self.sizes)))}"


class Choice(NamedTuple):
    """A measured configuration (numbers, or the name of a route) and where it is from."""

    config: tuple[Any, ...] | str
    source: str


_forced: dict[str, Choice | None] = {}


def find(problem: Problem, device: torch.device) -> Choice | None:
    """What was measured for this launch; None: the heuristics choose."""
    if _forced and problem.kernel in _forced:
        return _forced[problem.kernel]
    if device.type != "cuda":
        return None
    entries = _entries(architecture(device.index))
    return entries.get((problem.kernel, short(problem.dtype), buckets(problem.sizes))) if entries else None


@contextlib.contextmanager
def forced(choices: dict[str, tuple[Any, ...] | str | None]) -> Iterator[None]:
    """Within, launches of these kernels take these configurations, in every thread (autograd has its own).

    None: what the heuristics choose, whatever the tables say.
    """
    before = dict(_forced)
    _forced.update({kernel: c if c is None else Choice(c, "forced") for kernel, c in choices.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def source(problem: Problem, device: torch.device) -> str:
    """Where the configuration of a launch comes from, in words."""
    choice = find(problem, device)
    if choice is not None:
        return choice.source
    return HEURISTIC if device.type == "cuda" else f"{HEURISTIC} of the interpreter"


def buckets(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 << max(size - 1, 0).bit_length() for size in sizes)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def architecture(index: int | None) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def cache_dir() -> Path:
    """`VLMO_KERNELS_CACHE`, or the platform's folder for caches."""
    chosen = os.environ.get("VLMO_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vlmo_kernels"


def user_file(arch: str) -> Path:
    return cache_dir() / f"{arch}.json"


def read(path: Path) -> dict[str, Any]:
    """A table file.

    Raises:
        ValueError: the file is no table of this format.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}, known is {FORMAT}")
        for entry in table["entries"]:
            if not isinstance(entry["kernel"], str) or not isinstance(entry["dtype"], str):
                raise ValueError(f"an entry without kernel or dtype: {entry}")
            if not isinstance(entry["config"], str | list):
                raise ValueError(f"a configuration that is neither a list nor a name: {entry}")
            if not all(isinstance(size, int) for size in entry["sizes"]):
                raise ValueError(f"sizes that are no integers: {entry}")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"tuning: '{path}' must be a table of format {FORMAT}: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"tuning: '{path}' must be a table of format {FORMAT}: {error}") from error
    return table


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace a table file at once: a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in table.items() if name != "entries"}
    entries = ",\n".join("  " + json.dumps(entry) for entry in table["entries"])
    text = f'{json.dumps(head)[:-1]}, "entries": [\n{entries}\n]}}\n'
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
    _entries.cache_clear()


@cache
def _entries(arch: str) -> dict[tuple[str, str, tuple[int, ...]], Choice]:
    found = {}
    for name in ("shipped table", "user cache"):
        try:
            path = user_file(arch) if name == "user cache" else SHIPPED / f"{arch}.json"
            if not path.exists():
                continue
            table = read(path)
        except (OSError, RuntimeError, ValueError) as error:
            # A forward must not fail over a file that only makes it faster.
            hint = "Hint: delete it, tune again, or set VLMO_KERNELS_CACHE"
            warnings.warn(f"{error}; the heuristics are used. {hint}", stacklevel=2)
            continue
        for e in table["entries"]:
            config = e["config"] if isinstance(e["config"], str) else tuple(e["config"])
            found[e["kernel"], e["dtype"], tuple(e["sizes"])] = Choice(config, f"{name} {path}")
    return found
