"""`vlmo-kernels`: info, demo, check, bench, compare, audit, tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library itself needs torch alone
    typer = None

DTYPES = ("fp32", "bf16", "fp16")
SUITES = ("block", "ffn", "attention")


def info() -> int:
    """Print versions, hardware, the GEMM library and which implementation of every op runs here."""
    from .bench import display, environment

    for name, value in environment.report():
        print(f"{name:>20}: {value}")
    try:
        display.table("implementations", ["op", "on", "runs", "why not the others"], environment.implementations())
    except Exception as error:  # the report must end, whatever the installation is like
        print(f"{'implementations':>20}: could not be told ({type(error).__name__}: {error})")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of the script."""
    if typer is None:
        arguments = sys.argv[1:] if argv is None else argv
        if arguments == ["info"]:
            sys.exit(info())
        sys.exit(_plain(arguments))
    _app()(args=argv, prog_name="vlmo-kernels")


def _plain(arguments: list[str]) -> int:
    """The few commands that a machine without typer gets: those that a benchmark machine needs."""
    print("vlmo-kernels: typer must be installed. Hint: pip install 'vlmo_kernels[cli]'", file=sys.stderr)
    return 1


def _run(function, *args, **kwargs) -> None:
    """Call, turn our own errors into one line, and exit with the answer."""
    try:
        code = function(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        print(f"vlmo-kernels: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(int(code or 0))
