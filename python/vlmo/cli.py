"""`vlmo`: pretrain, demo and compare here, the others in `cli_tasks`. What they do lives in other modules."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    typer = None


class Stage(str, Enum):
    vision = "vision"
    language = "language"
    vision_language = "vision-language"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Strategy(str, Enum):
    ddp = "ddp"
    fsdp = "fsdp"


def main(argv: list[str] | None = None) -> None:
    """Entry point of the script."""
    if typer is None:
        print("vlmo: typer must be installed. Hint: pip install 'vlmo_kernels[cli]'", file=sys.stderr)
        sys.exit(1)
    try:
        app(args=argv, prog_name="vlmo")
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        print(f"vlmo: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        print(f"vlmo: {error}. Hint: pip install 'vlmo_kernels[vlmo]'", file=sys.stderr)
        sys.exit(1)


if typer is not None:
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="VLMo: pre-training in three stages, retrieval and fine-tuning.",
    )

    @app.callback()
    def _commands() -> None:
        """VLMo: pre-training in three stages, retrieval and fine-tuning."""

    @app.command()
    def pretrain(
        stage: Annotated[Stage, typer.Option(help="Which of the three; in this order.")],
        out: Annotated[Path, typer.Option(help="Folder of the run: log, snapshots, model.")],
        data: Annotated[
            str, typer.Option(help="shapes:N, photos, a folder, Parquet, Arrow, tar shards, a Karpathy json.")
        ] = "shapes:20000",
        config: Annotated[str, typer.Option(help="base, base_plus, large; on a CPU small, tiny.")] = "small",
        start: Annotated[
            Path | None, typer.Option("--from", help="Folder or file of the stage before, or a BEiT.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest snapshot in --out.")] = False,
        vocab: Annotated[
            Path | None, typer.Option(help="BERT vocab.txt; default: that of --from, else trained for shapes.")
        ] = None,
        image_size: Annotated[
            int | None, typer.Option(min=1, help="Pixels a side; default: the configuration's.")
        ] = None,
        max_text_len: Annotated[
            int | None, typer.Option(min=3, help="Tokens of a text; default: the configuration's.")
        ] = None,
        steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
        batch_size: Annotated[int, typer.Option(min=2, help="Samples of a batch over all processes.")] = 64,
        accumulate: Annotated[
            int, typer.Option(min=1, help="Batches of a step; contrast and negatives stay within each.")
        ] = 1,
        lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
        warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")] = 0,
        weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
        layer_decay: Annotated[float, typer.Option(help="Factor on the learning rate from layer to layer.")] = 1.0,
        clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: none.")] = 0.0,
        drop_path: Annotated[
            float | None, typer.Option(help="Rate of the last layer; default: the configuration's.")
        ] = None,
        precision: Annotated[Precision, typer.Option(help="bf16 is autocast.")] = Precision.fp32,
        recompute: Annotated[bool, typer.Option("--recompute", help="Activation checkpointing.")] = False,
        compile: Annotated[bool, typer.Option("--compile", help="torch.compile of every block.")] = False,
        strategy: Annotated[Strategy, typer.Option(help="Of several processes (torchrun).")] = Strategy.ddp,
        impl: Annotated[str, typer.Option(help="auto, triton, cpu or reference.")] = "auto",
        device: Annotated[str, typer.Option(help="cpu or cuda; a process takes the GPU of its rank.")] = "cpu",
        workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
        seed: Annotated[int, typer.Option(help="Of initialisation, order, masks, negatives, DropPath.")] = 0,
        save_every: Annotated[int, typer.Option(min=1, help="Steps between snapshots.")] = 500,
        log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.")] = 10,
    ) -> None:
        """Train one stage. With torchrun, on all its processes."""
        from .pretrain import Run, run
        from .train import Recipe

        recipe = Recipe(
            steps=steps, lr=lr, warmup=warmup, weight_decay=weight_decay, layer_decay=layer_decay, clip=clip,
            accumulate=accumulate, precision=precision.value, recompute=recompute, compile=compile,
            strategy=strategy.value, impl=impl, seed=seed, save_every=save_every, log_every=log_every,
        )  # fmt: skip
        run(
            Run(
                stage=stage.value, out=out, data=data, config=config, start=start, resume=resume, vocab=vocab,
                image_size=image_size, max_text_len=max_text_len, drop_path=drop_path, batch_size=batch_size,
                device=device, workers=workers,
            ),
            recipe,
        )  # fmt: skip

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder of the results, the curves and the models.")] = Path(
            "out/demo-vlmo"
        ),
        quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, figures not judged.")] = False,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with one that was stopped.")] = False,
        impl: Annotated[str, typer.Option(help="auto, cpu or reference.")] = "auto",
        precision: Annotated[Precision | None, typer.Option(help="Default: bf16 where the CPU has it.")] = None,
        seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    ) -> None:
        """The three stages on generated pictures, on a CPU; then retrieval, matching and masked words, measured."""
        from .demo_vlmo import FULL, QUICK, run

        sys.exit(run(out, QUICK if quick else FULL, seed, impl, precision.value if precision else None, resume))

    @app.command()
    def compare(
        out: Annotated[Path, typer.Option(help="Folder of the result, the chart and VLMo's runs.")] = Path(
            "out/compare"
        ),
        results: Annotated[Path | None, typer.Option(help="Another place for the result file, to commit it.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything.")] = False,
        steps: Annotated[
            tuple[int, int, int] | None, typer.Option(help="Of the three stages; all others take the sum.")
        ] = None,
        only: Annotated[list[str] | None, typer.Option(help="dual, fusion, towers, vlmo_scratch, vlmo.")] = None,
        seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    ) -> None:
        """VLMo beside dual encoder, fusion encoder and separate encoders under fusion, trained small and measured."""
        from dataclasses import replace

        from .compare import QUICK, Setup, run

        setup = QUICK if quick else Setup()
        run(out, replace(setup, steps=steps) if steps else setup, results, seed, tuple(only or ()))

    from .cli_tasks import add_commands

    add_commands(app)


if __name__ == "__main__":
    main()
