"""`vlmo-kernels`: info, demo, check, bench, compare, audit, tune. What they do lives in other modules."""

from __future__ import annotations

import importlib
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the library itself needs torch alone
    typer = None


class Suite(str, Enum):
    block = "block"
    ffn = "ffn"
    attention = "attention"


class DType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the script."""
    if typer is None:
        if (sys.argv[1:] if argv is None else argv) == ["info"]:  # it prints on any machine
            sys.exit(_info())
        print("vlmo-kernels: typer must be installed. Hint: pip install 'vlmo_kernels[cli]'", file=sys.stderr)
        sys.exit(1)
    _app()(args=argv, prog_name="vlmo-kernels")


def _run(module: str, function: str, *args) -> None:
    """Call `vlmo_kernels.<module>.<function>`, say its errors in one line, exit with its answer."""
    try:
        code = getattr(importlib.import_module(f"vlmo_kernels.{module}"), function)(*args)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        print(f"vlmo-kernels: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(int(code or 0))


def _info() -> int:
    """Versions, hardware, the GEMM library, and which implementation of every op runs here."""
    from .bench import display, environment

    for name, value in environment.report():
        print(f"{name:>20}: {value}")
    try:
        found, notes = environment.implementations()
        print()
        display.table("implementations", ["op", "device", "dtypes", "runs"], found, notes=notes)
    except Exception as error:  # the report must end, whatever the installation is like
        print(f"{'implementations':>20}: could not be told ({type(error).__name__}: {error})")
    return 0


def _app():
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Fused kernels for transformers with modality experts.",
    )

    @app.command()
    def info() -> None:
        """Versions, hardware, the GEMM library, and which implementation of every op runs here."""
        raise typer.Exit(_info())

    @app.command()
    def demo(
        config: Annotated[str, typer.Option(help="Size of VLMo: base, base_plus, large, small, tiny.")] = "base",
        checkpoint: Annotated[str | None, typer.Option(help="Weights; random by default.")] = None,
        vocab: Annotated[str | None, typer.Option(help="BERT vocab.txt; by default trained on the captions.")] = None,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds at most.")] = 5,
        budget: Annotated[float, typer.Option(help="Seconds of rounds in one dtype; two rounds always run.")] = 20.0,
        out: Annotated[Path, typer.Option(help="Folder of results.json and demo.png.")] = Path("out/demo"),
        dtype: Annotated[list[DType] | None, typer.Option(help="fp32 or bf16; may be repeated.")] = None,
    ) -> None:
        """Swap the kernels into VLMo, check that all agree, time them, draw a chart."""
        from .demo import Options

        dtypes = tuple(d.value for d in dtype or ())
        _run("demo", "run", Options(config, checkpoint, vocab, device, rounds, budget, out, dtypes))

    @app.command()
    def check(
        device: Annotated[str, typer.Option(help="cpu or cuda; by default all there are.")] = "",
        op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
        dtype: Annotated[list[DType] | None, typer.Option(help="May be repeated; by default all.")] = None,
        case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    ) -> None:
        """Every op and implementation against fp64 on this machine, forward and gradients."""
        _run("check", "run", device, tuple(op or ()), tuple(d.value for d in dtype or ()), tuple(case or ()))

    @app.command()
    def bench(
        suite: Annotated[Suite, typer.Argument(help="What to time.")],
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        json: Annotated[Path | None, typer.Option(help="File for the rows.")] = None,
        dtype: Annotated[list[DType] | None, typer.Option(help="May be repeated.")] = None,
        case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
        rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    ) -> None:
        """Time one suite: correctness gate first, then interleaved rounds."""
        _run(
            "bench.run",
            "run",
            suite.value,
            device,
            json,
            tuple(d.value for d in dtype or ()),
            tuple(case or ()),
            rounds,
        )

    @app.command()
    def compare(
        base: Annotated[Path, typer.Argument(help="Rows of before.")],
        head: Annotated[Path, typer.Argument(help="Rows of now.")],
        threshold: Annotated[float, typer.Option(help="Ours, slower by more than this: a regression.")] = 1.1,
    ) -> None:
        """Two results files side by side; exit status 1 on a regression."""
        _run("bench.run", "compare", base, head, threshold)

    @app.command()
    def audit(
        arch: Annotated[list[int] | None, typer.Option(help="80, 90, 100, 120; may be repeated; default: all.")] = None,
        brief: Annotated[bool, typer.Option("--brief", help="One configuration of every kernel.")] = False,
    ) -> None:
        """Compile every Triton kernel for GPUs that are not there and read what came out."""
        _run("audit", "main", tuple(arch or ()), (), brief)

    @app.command()
    def tune(
        model: Annotated[str, typer.Option(help="Widths: base or large.")] = "base",
        pairs: Annotated[int, typer.Option(min=1, help="Text-image pairs in the batch.")] = 64,
        dtype: Annotated[DType, typer.Option(help="Of weights and activations.")] = DType.bf16,
        budget: Annotated[float, typer.Option(help="Seconds.")] = 300.0,
        out: Annotated[Path | None, typer.Option(help="Table to write; by default the user's cache.")] = None,
    ) -> None:
        """Race kernel configurations on this GPU; the fastest right ones go into the user's cache."""
        _run("tuning.tune", "run", model, pairs, dtype.value, budget, out)

    return app


if __name__ == "__main__":
    main()
