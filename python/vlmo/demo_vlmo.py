"""`vlmo demo`: the three stages of pre-training on generated pictures, on a CPU in minutes, and what was learned.

Trained on captions of one set of meanings, measured on captioned pictures of other meanings (`vlmo.shapes`).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vlmo_kernels import bench

from . import shapes
from .data import Batch
from .loading import load_model
from .masking import mask_words
from .model import VLMo
from .objectives import STAGES, WEIGHTS
from .pretrain import Run
from .pretrain import run as pretrain
from .retrieval import RANKS, Embeddings, Gallery, embed, match_scores, read_gallery, recall, rerank, to_float
from .snapshots import write_atomically
from .sources import open_source
from .tokenizer import Tokenizer
from .train import Recipe

# What a full run must reach, on 200 held-out pictures where chance is 0.005, 0.5 and the unigram rate.
MIN_RECALL = 0.8
MIN_ITM = 0.85
MIN_MLM_OVER_UNIGRAM = 3.0
_MLM_DRAWS = 10  # maskings of every held-out caption: one or two words each


@dataclass(frozen=True)
class Scale:
    """How much is trained. Per stage: steps, batch size and peak learning rate. pictures: of the training set.
    heldout: pictures measured on. image_size: None for the configuration's. checked: whether figures below the
    thresholds, or a loss that does not fall, are a failure."""

    config: str
    pictures: int
    stages: dict[str, tuple[int, int, float]]
    heldout: int = 200
    max_text_len: int | None = None
    checked: bool = True


FULL = Scale(
    "small",
    60_000,
    {"vision": (160, 64, 1e-3), "language": (100, 64, 1e-3), "vision-language": (1000, 64, 8e-4)},
)
QUICK = replace(
    FULL,
    stages={"vision": (20, 32, 2e-3), "language": (20, 32, 2e-3), "vision-language": (20, 32, 2e-3)},
    checked=False,
)


def run(
    out: Path, scale: Scale, seed: int = 0, impl: str = "auto", precision: str | None = None, resume: bool = False
) -> int:
    """The whole demo into `out`; 0, or 1 where a threshold is missed.

    precision: None for bf16 where the CPU has it. resume: go on with a demo in `out` that was stopped.
    """
    if precision is None:
        precision = "bf16" if bench.cpu_supports_bf16() else "fp32"
    begun = time.perf_counter()
    times = train(out, scale, seed, impl, precision, resume)
    logs = {stage: read_log(out / stage) for stage in STAGES}
    started = time.perf_counter()
    figures = measure(out / "vision-language", scale.heldout, impl)
    times["measuring"] = {"seconds": time.perf_counter() - started}
    falling = {f"{stage}/{name}": ends for stage, log in logs.items() for name, ends in loss_ends(log).items()}
    missed = shortcomings(figures, falling) if scale.checked else []
    results = {
        **figures,
        "loss_begin_end": falling,
        "passed": not missed if scale.checked else None,
        "missed": missed,
        "seconds": time.perf_counter() - begun,
        "times": times,
        "variety": variety(scale, seed),
        "recipe": {stage: dict(zip(("steps", "batch_size", "lr"), value)) for stage, value in scale.stages.items()},
        "precision": precision,
        "impl": impl,
        "versions": bench.versions(),
        "commit": bench.commit(),
        "device": bench.device_name("cpu"),
    }
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    draw_curves(out / "curves.png", logs)
    show(results, scale, out)
    for line in missed:
        print(f"vlmo demo: {line}", file=sys.stderr)
    return 1 if missed else 0


# ---------------------------------------------------------------------- training


def train(
    out: Path, scale: Scale, seed: int, impl: str, precision: str, resume: bool = False
) -> dict[str, dict[str, float]]:
    """The three stages, each from the last one's model, as `vlmo pretrain` runs them; seconds of each in this call."""
    times, start = {}, None
    for stage in STAGES:
        steps, batch_size, lr = scale.stages[stage]
        if not resume:
            shutil.rmtree(out / stage, ignore_errors=True)  # of an earlier demo
        recipe = Recipe(
            steps=steps, lr=lr, warmup=steps // 20, clip=1.0, precision=precision, impl=impl, seed=seed,
            log_every=max(1, steps // 100), save_every=max(1, steps // 8),
        )  # fmt: skip
        options = Run(
            stage, out / stage, f"shapes:{scale.pictures}", scale.config, start, resume, batch_size=batch_size,
            max_text_len=scale.max_text_len,
        )  # fmt: skip
        wall, cpu = time.perf_counter(), time.process_time()
        pretrain(options, recipe)
        times[stage] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        start = out / stage
    return times


def read_log(folder: Path) -> list[dict[str, float]]:
    """The lines of a stage's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_ends(log: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Of every loss its mean over the first and over the last tenth of the log."""
    tenth = max(1, len(log) // 10)
    names = [name for name in ("loss", *WEIGHTS) if name in log[0]]
    mean = {n: [sum(line[n] for line in part) / tenth for part in (log[:tenth], log[-tenth:])] for n in names}
    return {name: (begin, end) for name, (begin, end) in mean.items()}


# ---------------------------------------------------------------------- measuring


def measure(folder: Path, heldout: int, impl: str = "auto") -> dict[str, float]:
    """Figures of a vision-language model on held-out pictures, no two of which have one caption."""
    loaded = load_model(folder, impl="reference" if impl == "reference" else "auto")
    model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.model.config
    source = open_source(f"shapes:{heldout}:heldout", config.image_size)
    gallery, _ = read_gallery(source, tokenizer, config.image_size, config.max_text_len)
    vectors = embed(model, gallery)
    figures = recall(vectors.images, vectors.texts, vectors.picture_of_text)
    if heldout >= max(RANKS):
        figures |= {f"reranked_{name}": value for name, value in rerank(model, gallery, vectors).items()}
    return figures | matching_accuracy(model, gallery, vectors) | word_accuracy(model, gallery, tokenizer)


def matching_accuracy(model: VLMo, gallery: Gallery, vectors: Embeddings) -> dict[str, float]:
    """Of ITM on every right pair and as many wrong ones: with a random caption, and with the most similar wrong one."""
    size = len(gallery.captions)
    each = torch.arange(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle through all: nobody gets his own
    similar = (vectors.images @ vectors.texts.T).fill_diagonal_(float("-inf")).argmax(1)
    right = match_scores(model, gallery, each, each) > 0
    random, hard = (match_scores(model, gallery, each, wrong) <= 0 for wrong in (other, similar))
    return {
        "itm_accuracy": _mean(torch.cat([right, random])),
        "itm_hard_accuracy": _mean(torch.cat([right, hard])),
        "itm_positive_accuracy": _mean(right),
    }


@torch.no_grad()
def word_accuracy(model: VLMo, gallery: Gallery, tokenizer: Tokenizer) -> dict[str, float]:
    """Of MLM with the picture in view, and of always saying the most frequent word of the training captions."""
    captions = [shapes.dataset(4000).caption(i) for i in range(4000)]
    ids, mask, starts = tokenizer.encode_batch(gallery.captions, model.config.max_text_len)
    batch = Batch(None, ids, mask, torch.arange(len(ids)), starts)
    right, labels = [], []
    for draw in range(_MLM_DRAWS):
        hidden = mask_words(batch, tokenizer, 0, draw)
        for rows in torch.arange(len(ids)).split(64):
            feats = model.infer(to_float(gallery.pixels[rows]), hidden.ids[rows], mask[rows]).text_feats
            inside = (hidden.sample >= rows[0]) & (hidden.sample <= rows[-1])
            sample, position, label = hidden.sample[inside] - rows[0], hidden.position[inside], hidden.label[inside]
            right.append(model.mlm_score(feats[sample, position]).argmax(1) == label)
            labels.append(label)
    most_frequent = _words(tokenizer, captions, model.config.max_text_len).bincount().argmax()
    return {
        "mlm_accuracy": _mean(torch.cat(right)),
        "mlm_unigram_accuracy": _mean(torch.cat(labels) == most_frequent),
        "mlm_words": len(torch.cat(labels)),
    }


def _words(tokenizer: Tokenizer, captions: list[str], length: int) -> Tensor:
    ids, mask, _ = tokenizer.encode_batch(captions, length)
    return ids[mask & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)]


def _mean(hits: Tensor) -> float:
    return hits.double().mean().item()


def variety(scale: Scale, seed: int) -> dict[str, int]:
    """How many captions the generator can say, and how many different ones training and measuring see."""
    train, heldout = shapes.dataset(scale.pictures), shapes.dataset(scale.heldout, split="heldout")
    said, asked = ({data.caption(i) for i in range(len(data))} for data in (train, heldout))
    return {
        "possible_captions": shapes.NUM_CAPTIONS,
        "training_pictures": scale.pictures,
        "training_captions": len(said),
        "heldout_pictures": scale.heldout,
        "heldout_captions": len(asked),
        "captions_in_both": len(said & asked),
    }


def shortcomings(figures: dict[str, float], falling: dict[str, tuple[float, float]]) -> list[str]:
    """What a full run had to reach and did not; one line each."""
    lines = []
    for name, least in (("t2i_r1", MIN_RECALL), ("i2t_r1", MIN_RECALL), ("itm_accuracy", MIN_ITM)):
        if not figures[name] >= least:
            lines.append(f"{name} must be at least {least}, it is {figures[name]:.3f}.")
    least = MIN_MLM_OVER_UNIGRAM * figures["mlm_unigram_accuracy"]
    if not figures["mlm_accuracy"] >= least:
        reached = figures["mlm_accuracy"]
        lines.append(f"mlm_accuracy must be at least 3x the unigram rate, {least:.3f}; it is {reached:.3f}.")
    for name, (begin, end) in falling.items():
        if not end < begin:
            lines.append(f"the loss {name} must fall, it went from {begin:.3f} to {end:.3f}.")
    return lines


# ---------------------------------------------------------------------- showing


def draw_curves(path: Path, logs: dict[str, list[dict[str, float]]]) -> None:
    """One panel a stage: every loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"mim": "masked pixels (L1)", "mlm": "masked words", "itc": "contrast", "itm": "matching"}
    figure, panels = pyplot.subplots(1, len(logs), figsize=(12, 3.6), layout="constrained")
    for panel, (stage, log) in zip(panels, logs.items()):
        for name, label in names.items():
            if name in log[0]:
                panel.plot([line["step"] for line in log], [line[name] for line in log], label=label)
        panel.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, None))
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(results: dict, scale: Scale, out: Path) -> None:
    """The figures, what was asked of them, and where the files are."""
    unigram = results["mlm_unigram_accuracy"]
    wanted = {
        "t2i_r1": ("text to image, recall@1", MIN_RECALL, 1 / scale.heldout),
        "i2t_r1": ("image to text, recall@1", MIN_RECALL, 1 / scale.heldout),
        "reranked_t2i_r1": ("text to image, re-ranked by ITM", None, 1 / scale.heldout),
        "reranked_i2t_r1": ("image to text, re-ranked by ITM", None, 1 / scale.heldout),
        "itm_accuracy": ("ITM, random wrong captions", MIN_ITM, 0.5),
        "itm_hard_accuracy": ("ITM, most similar wrong captions", None, 0.5),
        "mlm_accuracy": ("MLM, masked words in view of the picture", MIN_MLM_OVER_UNIGRAM * unigram, unigram),
    }
    rows = [
        [label, f"{results[name]:.3f}", f"{least:.3f}" if least and scale.checked else "", f"{chance:.3f}"]
        for name, (label, least, chance) in wanted.items()
        if name in results
    ]
    minutes = results["seconds"] / 60
    said = results["variety"]
    bench.table(
        f"{scale.heldout} held-out captioned pictures, after {minutes:.1f} minutes ({results['precision']})",
        ("figure", "reached", "wanted", "chance"),
        rows,
        f"{said['training_captions']} captions in training, of {said['possible_captions']} possible; "
        f"{said['captions_in_both']} of the held-out ones among them.",
    )
    print(f"{out / 'results.json'}, {out / 'curves.png'}; the model: {out / 'vision-language'}")
