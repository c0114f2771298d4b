"""What `vlmo pretrain` does: configuration, tokenizer, data and trainer from names and paths."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from . import shapes
from .config import CONFIGS, VLMoConfig
from .data import Loader, Report
from .distributed import gather_object, rank, world_size
from .objectives import STAGES, WEIGHTS
from .snapshots import load_config
from .sources import open_source
from .tokenizer import Tokenizer
from .train import Recipe, build_stage, check_out, initialise_distributed, stage_trainer

USES = {"vision": "images", "language": "texts", "vision-language": "pairs"}
# Every word of the generated captions is one piece of it.
_SHAPES_VOCABULARY = 1000


@dataclass(frozen=True)
class Run:
    """One call of `vlmo pretrain`; see its help. None stands for the default."""

    stage: str
    out: Path
    data: str = "shapes:20000"
    config: str = "small"
    start: Path | None = None
    resume: bool = False
    vocab: Path | None = None
    image_size: int | None = None
    max_text_len: int | None = None
    drop_path: float | None = None
    batch_size: int = 64
    device: str = "cpu"
    workers: int = 0


def run(options: Run, recipe: Recipe) -> dict[str, float]:
    """Train one stage into `options.out`; returns the last line of the log."""
    device = initialise_distributed(options.device)
    try:
        return _run(options, recipe, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(options: Run, recipe: Recipe, device: torch.device) -> dict[str, float]:
    if options.stage not in STAGES:
        raise ValueError(f"pretrain: stage must be one of {STAGES}, got {options.stage!r}.")
    check_out("pretrain", options.out, options.resume)
    if options.start is not None and not options.start.exists():
        raise FileNotFoundError(f"pretrain: --from must exist, got '{options.start}'.")
    if options.start is not None and options.start.name == "model.safetensors":
        folder = options.start.parent
        if (folder / "config.json").is_file():  # a run of ours: its configuration goes with the file
            options = replace(options, start=folder)
    tokenizer = _tokenizer(options)
    config = _config(options, tokenizer)
    start = options.start
    if start is not None and start.is_dir():
        start = start / "model.safetensors"
        if not start.is_file():
            raise ValueError(
                f"pretrain: --from must hold model.safetensors, {options.start} does not. Hint: let that stage finish."
            )
    model, report = build_stage(config, options.stage, start, recipe.seed)
    data = Loader(
        open_source(options.data, config.image_size),
        tokenizer,
        batch_size=options.batch_size,
        image_size=config.image_size,
        max_text_len=config.max_text_len,
        use=USES[options.stage],
        seed=recipe.seed,
        rank=rank(),
        world_size=world_size(),
        num_workers=options.workers,
    )
    trainer = stage_trainer(model, options.stage, recipe, tokenizer, device)
    options.out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        for line in report.lines() if report else ():
            print(f"from {start}: {line}", file=sys.stderr)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"{options.stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
            f"{trained / 1e6:.1f} M of them trained, {world_size()} process(es) on {device}",
            file=sys.stderr,
        )
    with tqdm(total=recipe.steps, desc=options.stage, unit="step", disable=rank() != 0) as bar:

        def show(line: dict[str, float]) -> None:
            losses = {name: f"{line[name]:.3f}" for name in ("loss", *WEIGHTS) if name in line}
            bar.set_postfix(losses, refresh=False)
            bar.update(line["step"] - bar.n)

        def beside() -> None:
            if tokenizer is not None:
                tokenizer.save(options.out / "vocab.txt")

        last = trainer.fit(data, options.out, options.resume, show, beside)
    report = Report.sum(gather_object(data.report))
    if rank() == 0:
        for line in report.lines():
            print(f"data: {line}", file=sys.stderr)
    return last


def _tokenizer(options: Run) -> Tokenizer | None:
    candidates = [options.vocab, options.out / "vocab.txt"]
    if options.start is not None:
        folder = options.start if options.start.is_dir() else options.start.parent
        candidates.append(folder / "vocab.txt")
    for path in candidates:
        if path is not None and (path == options.vocab or path.is_file()):
            return Tokenizer.load(path)
    if options.data.startswith("shapes:"):
        return Tokenizer.train(shapes.vocabulary_captions(), _SHAPES_VOCABULARY)
    if options.stage == "vision":
        return None
    raise ValueError("pretrain: there must be a vocabulary. Hint: --vocab vocab.txt of a BERT, or --from a run.")


def _config(options: Run, tokenizer: Tokenizer | None) -> VLMoConfig:
    """The named size, or that of the stage before, with this run's vocabulary and lengths."""
    if options.config not in CONFIGS:
        raise ValueError(f"pretrain: --config must be one of {', '.join(CONFIGS)}, got {options.config!r}.")
    config = named = CONFIGS[options.config]
    if options.start is not None and options.start.is_dir():
        config, _ = load_config(options.start)
        if (named.dim, named.depth) != (config.dim, config.depth):
            raise ValueError(
                f"pretrain: --config must be the size of --from, {options.config!r} is not that of {options.start}."
            )
        config = replace(config, vlffn_start=named.vlffn_start)
    changes = {
        "image_size": options.image_size,
        "max_text_len": options.max_text_len,
        "drop_path": options.drop_path,
    }
    if tokenizer is not None:
        # A checkpoint's embeddings may have room for more pieces than the vocabulary has.
        changes["vocab_size"] = max(tokenizer.vocab_size, config.vocab_size if options.start else 0)
    return replace(config, **{name: value for name, value in changes.items() if value is not None})
