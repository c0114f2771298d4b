"""The commands of `vlmo` that use a trained model: embed, retrieve, finetune, evaluate."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Task(str, Enum):
    retrieval = "retrieval"
    vqa = "vqa"
    nlvr2 = "nlvr2"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


Model = Annotated[Path, typer.Option(help="Folder of a run, or a checkpoint file.")]
Vocab = Annotated[Path | None, typer.Option(help="BERT vocab.txt; by default the model's.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Pixels a side; by default the model's.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Impl = Annotated[str, typer.Option(help="auto (the kernels) or reference (plain torch).")]
Data = Annotated[
    str,
    typer.Option(
        help="shapes:N[:heldout]; for retrieval also photos, a folder, Parquet, Arrow, tar shards, a Karpathy json; "
        "for VQA and NLVR2 their official json."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples of a step, over all processes.")]
Annotations = Annotated[Path | None, typer.Option(help="VQA v2: the answers; --data is the questions.")]
Images = Annotated[Path | None, typer.Option(help="VQA v2 and NLVR2: the folder of images.")]


def add_commands(app: typer.Typer) -> None:
    """Add the four commands to the application."""

    @app.command()
    def embed(
        model: Model,
        out: Annotated[Path, typer.Option(help=".safetensors or .npz.")],
        data: Annotated[str | None, typer.Option(help="Images, with captions or without; as for evaluate.")] = None,
        texts: Annotated[Path | None, typer.Option(help="Instead: a file of texts, one a line.")] = None,
        batch_size: BatchSize = 64,
        vocab: Vocab = None,
        image_size: ImageSize = None,
        device: Device = "cpu",
        impl: Impl = "auto",
    ) -> None:
        """Unit vectors of images and texts, into a file."""
        from .commands import ModelOptions, run_embed

        run_embed(ModelOptions(model, vocab, image_size, device, impl), data, texts, out, batch_size)

    @app.command()
    def retrieve(
        query: Annotated[list[str], typer.Argument(help="What to look for; several are allowed.")],
        model: Model,
        images: Annotated[str, typer.Option(help="Folder of images, or any other source.")],
        k: Annotated[int, typer.Option(min=1, help="Images shown.")] = 6,
        rerank: Annotated[int, typer.Option(min=0, help="Let the fusion encoder reorder so many; 0: do not.")] = 0,
        index: Annotated[Path | None, typer.Option(help="Vectors of the images, from `vlmo embed`.")] = None,
        out: Annotated[Path, typer.Option(help="Sheet of the pictures.")] = Path("out/retrieve.png"),
        vocab: Vocab = None,
        image_size: ImageSize = None,
        device: Device = "cpu",
        impl: Impl = "auto",
    ) -> None:
        """The images that fit a text best: a table and a sheet of pictures."""
        from .commands import ModelOptions, run_retrieve

        run_retrieve(ModelOptions(model, vocab, image_size, device, impl), query, images, index, k, rerank, out)

    @app.command()
    def finetune(
        task: Annotated[Task, typer.Option(help="What for.")],
        model: Model,
        data: Data,
        out: Annotated[Path, typer.Option(help="Folder of the fine-tuned model.")],
        annotations: Annotations = None,
        images: Images = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest snapshot in --out.")] = False,
        steps: Annotated[int, typer.Option(min=1, help="Optimizer steps; a tenth of them to warm up.")] = 1000,
        batch_size: BatchSize = 64,
        accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step; contrast stays within each.")] = 1,
        lr: Annotated[float, typer.Option(help="Peak; classifiers learn 10 times as fast.")] = 3e-5,
        seed: Annotated[int, typer.Option(help="Of the new classifier, order, dropout, DropPath.")] = 0,
        precision: Annotated[Precision, typer.Option(help="bf16 is autocast.")] = Precision.fp32,
        workers: Annotated[int, typer.Option(min=0, help="Processes that decode (retrieval).")] = 0,
        save_every: Annotated[int, typer.Option(min=1, help="Steps between snapshots.")] = 500,
        log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.")] = 10,
        vocab: Vocab = None,
        image_size: ImageSize = None,
        device: Device = "cpu",
        impl: Impl = "auto",
    ) -> None:
        """Fine-tune a pre-trained model for a task. With torchrun, on all its processes."""
        from .commands import ModelOptions, run_finetune
        from .train import Recipe

        recipe = Recipe(
            steps=steps, lr=lr, warmup=steps // 10, clip=1.0, accumulate=accumulate, precision=precision.value,
            seed=seed, save_every=save_every, log_every=log_every,
        )  # fmt: skip
        run_finetune(
            ModelOptions(model, vocab, image_size, device, impl), task.value, data, annotations, images, out,
            resume, batch_size, workers, recipe,
        )  # fmt: skip

    @app.command()
    def evaluate(
        task: Annotated[Task, typer.Option(help="On what.")],
        model: Model,
        data: Data,
        annotations: Annotations = None,
        images: Images = None,
        rerank: Annotated[int, typer.Option(min=0, help="Retrieval: reorder so many by the fusion encoder.")] = 0,
        batch_size: BatchSize = 64,
        out: Annotated[Path | None, typer.Option(help="The figures as JSON.")] = None,
        predictions: Annotated[Path | None, typer.Option(help="VQA, NLVR2: every answer, as JSON.")] = None,
        vocab: Vocab = None,
        image_size: ImageSize = None,
        device: Device = "cpu",
        impl: Impl = "auto",
    ) -> None:
        """Figures of a model on a task."""
        from .commands import ModelOptions, run_evaluate

        run_evaluate(
            ModelOptions(model, vocab, image_size, device, impl), task.value, data, annotations, images, rerank,
            batch_size, out, predictions,
        )  # fmt: skip

