"""What `vlmo embed`, `retrieve`, `finetune` and `evaluate` do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .data import Loader, Report
from .distributed import gather_object, rank, world_size
from .downstream import ExampleBatches, evaluate, task_trainer
from .loading import Loaded, load_model, save_beside
from .retrieval import Embeddings, Gallery, embed, embed_images, embed_texts, match_scores, read_gallery, recall, rerank
from .retrieval import search as search_index
from .snapshots import load_config, write_atomically
from .sources import FolderSource, Source, open_source
from .tasks import NLVR2, Examples, ShapesQuestions, ShapesStatements, VQAv2
from .train import Recipe, check_out, initialise_distributed

console = Console()


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it runs: the options of `load_model` that every command has."""

    model: Path
    vocab: Path | None = None
    image_size: int | None = None
    device: str = "cpu"
    impl: str = "auto"

    def picture_size(self) -> int:
        """Pixels a side of the model's images, without loading it; 64 for a checkpoint file (they are resized)."""
        if self.image_size is not None or not self.model.is_dir():
            return self.image_size or 64
        return load_config(self.model)[0].image_size

    def load(self, task: str = "retrieval", classes: tuple[str, ...] | None = None) -> Loaded:
        device = initialise_distributed(self.device)
        loaded = load_model(
            self.model, task=task, classes=classes, vocab=self.vocab, image_size=self.image_size, device=device,
            impl=self.impl,
        )  # fmt: skip
        for note in loaded.notes:
            _say(note, "dim")
        return loaded


def run_embed(options: ModelOptions, data: str | None, texts: Path | None, out: Path, batch_size: int) -> None:
    """Embed a source (images, and captions where it has some) or a file of texts, one a line."""
    if (data is None) == (texts is None):
        raise ValueError("embed: there must be either --data or --texts.")
    if out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"embed: --out must be .safetensors or .npz, got '{out}'.")
    loaded = options.load()
    model, config = loaded.model, loaded.model.config
    if texts is not None:
        lines = _lines(texts)
        ids, mask, _ = loaded.tokenizer.encode_batch(lines, config.max_text_len)
        none = torch.empty(0, config.dim)
        made = Embeddings(none, embed_texts(model, ids, mask), torch.full((len(lines),), -1), [], lines)
    else:
        made = embed(model, _gallery(loaded, data)[0], batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    _say(f"{len(made.images)} images and {len(made.texts)} texts, {config.dim} numbers each: {out}")


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"embed: --texts must be a file, got '{path}'.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"embed: --texts must hold a text, '{path}' does not.")
    return lines


def run_retrieve(
    options: ModelOptions, queries: Sequence[str], images: str, index: Path | None, k: int, rerank_k: int, out: Path
) -> None:
    """The k best images of a source for every query: a table here, a sheet of the pictures in `out`."""
    loaded = options.load()
    model, config = loaded.model, loaded.model.config
    gallery, _ = _gallery(loaded, images, texts=False)
    if index is None:
        vectors = embed_images(model, gallery.pixels)
    else:
        vectors = _vectors_of(index, loaded, gallery)
    ids, mask, _ = loaded.tokenizer.encode_batch(list(queries), config.max_text_len)
    scores, found = search_index(embed_texts(model, ids, mask), vectors, max(k, rerank_k))
    kind = "similarity"
    if rerank_k:
        asked = Gallery(gallery.pixels, ids, mask, torch.empty(0), gallery.names, list(queries))
        texts = torch.arange(len(queries)).repeat_interleave(found.shape[1])
        scores = match_scores(model, asked, found.flatten(), texts).view(found.shape).sigmoid()
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        found, kind = found.gather(1, order), "match"
    rows = []
    for query, best, values in zip(queries, found[:, :k].tolist(), scores[:, :k].tolist()):
        rows.append([(gallery.pixels[i], gallery.names[i], value) for i, value in zip(best, values)])
        _say(query, "bold")
        table = Table("rank", "image", kind)
        for place, (_, name, value) in enumerate(rows[-1], 1):
            table.add_row(str(place), Text(name), f"{value:.3f}")
        console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(queries, rows).save(out)
    _say(f"sheet: {out}")


def _vectors_of(index: Path, loaded: Loaded, gallery: Gallery) -> Tensor:
    """What `vlmo embed` wrote, if it is of these pictures and of this model: some pictures are embedded to see."""
    made, dim = Embeddings.load(index), loaded.model.config.dim
    fits = made.names == gallery.names and made.images.shape[1] == dim
    if fits and gallery.names:
        some = sorted({0, len(gallery.names) // 2, len(gallery.names) - 1})
        again = embed_images(loaded.model, gallery.pixels[some])
        fits = bool(((again * made.images[some]).sum(1) > 0.9999).all())  # cosines
    if not fits:
        raise ValueError(
            f"retrieve: the index must be of these images and of this model, '{index}' holds {len(made.images)} "
            f"images of {made.images.shape[1]} numbers, there are {len(gallery.names)} of {dim}, and some embedded "
            "again must give what it holds. Hint: vlmo embed again."
        )
    return made.images


@contextlib.contextmanager
def _leaving_processes() -> Iterator[None]:
    """Take leave of the other processes, whatever happens."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@_leaving_processes()
def run_finetune(
    options: ModelOptions, task: str, data: str, annotations: Path | None, images: Path | None, out: Path,
    resume: bool, batch_size: int, workers: int, recipe: Recipe,
) -> None:  # fmt: skip
    """Fine-tune for a task and leave a folder that `evaluate` and the other commands take."""
    check_out("finetune", out, resume)
    examples = None
    if task != "retrieval":
        examples = open_examples(task, data, annotations, images, options.picture_size())
    torch.manual_seed(recipe.seed)  # a new classifier is drawn
    loaded = options.load(task, None if examples is None else tuple(examples.classes))
    config = loaded.model.config
    if examples is None:
        batches = Loader(
            open_source(data, config.image_size), loaded.tokenizer, batch_size=batch_size, seed=recipe.seed,
            rank=rank(), image_size=config.image_size, max_text_len=config.max_text_len, world_size=world_size(),
            num_workers=workers,
        )  # fmt: skip
    else:
        batches = ExampleBatches(
            examples, loaded.tokenizer, config.image_size, config.max_text_len, batch_size, recipe.seed
        )
    trainer = task_trainer(loaded.model, task, recipe, loaded.model.transformer.cls_token.device)
    out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, disable=rank() != 0) as progress:
        bar = progress.add_task(f"finetune {task}", total=recipe.steps)

        def show(line: dict[str, float]) -> None:
            said = f"{task}: loss {line['loss']:.3f}, right {line['accuracy']:.0%}"
            progress.update(bar, completed=line["step"], description=said)

        trainer.fit(batches, out, resume, show, lambda: save_beside(out, task, loaded))
    _show(Report.sum(gather_object(batches.report)))
    _say(f"model: {out}")


def run_evaluate(
    options: ModelOptions, task: str, data: str, annotations: Path | None, images: Path | None, rerank_k: int,
    batch_size: int, out: Path | None, predictions: Path | None,
) -> None:  # fmt: skip
    """Figures of a model on a task, as a table, and as JSON in `out`."""
    loaded = options.load(task)
    config = loaded.model.config
    figures: dict[str, float] = {}
    if task == "retrieval":
        gallery, _ = _gallery(loaded, data)
        if not gallery.captions:
            raise ValueError(f"evaluate: --data must have captions, '{data}' has none. Hint: a captions.json in it.")
        vectors = embed(loaded.model, gallery, batch_size)
        figures = {"images": len(vectors.images), "texts": len(vectors.texts)}
        figures |= recall(vectors.images, vectors.texts, vectors.picture_of_text)
        if rerank_k:
            again = rerank(loaded.model, gallery, vectors, rerank_k, batch_size)
            figures |= {f"reranked_{name}": value for name, value in again.items()}
    else:
        examples = open_examples(task, data, annotations, images, config.image_size, loaded.classes)
        batches = ExampleBatches(examples, loaded.tokenizer, config.image_size, config.max_text_len, batch_size)
        figures, chosen = evaluate(loaded.model, batches)
        _show(batches.report)
        if isinstance(examples, VQAv2) and examples.left_out:
            # Of these every answer would be wrong: over all questions the accuracy is lower by their share.
            figures["left_out"] = examples.left_out
            _say(f"{examples.left_out} questions left out: the model knows none of their answers", "yellow")
        if predictions is not None:
            name = "question_id" if task == "vqa" else "identifier"
            rows = [{name: key, "answer" if task == "vqa" else "label": answer} for key, answer in chosen]
            predictions.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(predictions, json.dumps(rows, indent=1) + "\n")
    _say(f"{task}: {data}", "bold")
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps({"task": task, "data": data, **figures}, indent=1) + "\n")


def open_examples(
    task: str, data: str, annotations: Path | None, images: Path | None, image_size: int,
    classes: tuple[str, ...] | None = None,
) -> Examples:  # fmt: skip
    """"shapes:N" or "shapes:N:heldout", or the official file with `images` (and for VQA v2 `annotations`)."""
    if data.startswith("shapes:"):
        kind = {"vqa": ShapesQuestions, "nlvr2": ShapesStatements}[task]
        _, number, *split = data.split(":")
        if not number.isdecimal() or int(number) < 1 or len(split) > 1:
            raise ValueError(f"{task}: shapes must be shapes:N or shapes:N:heldout, N at least 1, got {data!r}.")
        examples = kind(int(number), 0, image_size, *split)
    elif images is None:
        raise ValueError(f"{task}: with a file there must be --images, their folder. Hint: or --data shapes:2000.")
    elif task == "vqa":
        return VQAv2(data, annotations, images, classes)
    else:
        examples = NLVR2(data, images)
    if classes is not None and tuple(classes) != tuple(examples.classes):
        raise ValueError(f"{task}: the model must choose from the classes of the data, they differ.")
    return examples


def picture_sheet(queries: Sequence[str], rows: Sequence[Sequence[tuple[torch.Tensor, str, float]]]) -> Image.Image:
    """A row of pictures for every query; of each its pixels (uint8 [3, S, S]), name and score."""
    side, gap, line = 160, 8, 18
    width = max(gap + (side + gap) * max((len(row) for row in rows), default=1), 480)
    sheet = Image.new("RGB", (width, (side + 3 * line + gap) * len(rows) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (query, row) in enumerate(zip(queries, rows)):
        top = gap + number * (side + 3 * line + gap)
        draw.text((gap, top), query, "black", font)
        for place, (pixels, name, score) in enumerate(row):
            left = gap + place * (side + gap)
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top + line))
            draw.text((left, top + line + side), f"{score:.3f}  {name}"[:24], "dimgray", font)
    return sheet


def _gallery(loaded: Loaded, spec: str, texts: bool = True) -> tuple[Gallery, Report]:
    config = loaded.model.config
    source: Source = open_source(spec, config.image_size)
    texts = texts and not (isinstance(source, FolderSource) and not source.has_captions)
    gallery, report = read_gallery(source, loaded.tokenizer, config.image_size, config.max_text_len, texts)
    _show(report)
    return gallery, report


def _show(report: Report) -> None:
    first, *rest = report.lines()
    _say(first)
    for line in rest:
        _say(line, "yellow")


def _say(line: str, style: str = "") -> None:
    if rank() == 0:
        # Names of files are no markup, and are not broken over lines.
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
