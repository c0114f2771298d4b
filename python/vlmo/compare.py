"""`vlmo compare`: VLMo beside what the paper argues against, trained small on the same pictures and measured.

Every model passes an image or a text through equally many layers of equal width and takes equally many steps on
equal batches in the same order. What differs: the architecture and, by its nature, the losses. VLMo is trained
twice: in three stages, and in the vision-language stage alone for the sum of their steps.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vlmo_kernels import bench

from . import shapes
from .config import CONFIGS
from .data import Loader
from .downstream import ExampleBatches, classifier
from .loading import load_model
from .model import VLMo
from .objectives import STAGES
from .pretrain import Run
from .pretrain import run as pretrain
from .retrieval import Gallery, read_gallery, recall, search, to_float
from .snapshots import write_atomically
from .sources import open_source
from .tasks import ShapesQuestions
from .tokenizer import Tokenizer
from .towers import Towers
from .train import Recipe

SUITE = "vlmo_compare"
TITLES = {
    "dual": "dual encoder, contrast alone (CLIP, ALIGN)",
    "fusion": "fusion encoder, one FFN for all (ViLT)",
    "towers": "separate encoders under fusion, three losses (ALBEF)",
    "vlmo_scratch": "VLMo, vision-language stage alone",
    "vlmo": "VLMo, three stages",
}
_PASSES = 128  # pairs or samples of one forward pass


@dataclass(frozen=True)
class Setup:
    """How much of everything. Steps: of the three stages; all others take their sum. queries: steps of training on
    questions. gallery: pictures that recall is measured on, for all; large_gallery: for dual encoders alone.
    sizes: N of the timings. longest: seconds that a timing may take; beyond it is computed from the largest measured.
    """

    config: str = "small"
    pictures: int = 60_000
    steps: tuple[int, int, int] = (160, 100, 1000)
    batch_size: int = 64
    lr: float = 8e-4
    question_steps: int = 300
    question_lr: float = 5e-4
    questions: int = 2000
    gallery: int = 200
    large_gallery: int = 1000
    sizes: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    rounds: int = 3
    longest: float = 30.0
    max_text_len: int | None = None


QUICK = Setup(
    steps=(8, 8, 8), question_steps=8, questions=64, gallery=20, large_gallery=40, sizes=(1, 10, 30), rounds=1,
    longest=2.0, batch_size=32,
)  # fmt: skip


class Unified(nn.Module):
    """VLMo behind the methods of `Towers`."""

    def __init__(self, model: VLMo) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def image_vectors(self, image: Tensor) -> Tensor:
        return self.model.infer_image_ft(image).itc_feats

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.infer_text_ft(ids, mask).itc_feats

    def match(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model.itm_score(self.joint(image, ids, mask))
        return logits[:, 1] - logits[:, 0]

    def joint(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.infer(image, ids, mask).cls_feats


Contestant = Towers | Unified


def run(out: Path, setup: Setup, results: Path | None = None, seed: int = 0, names: tuple[str, ...] = ()) -> None:
    """Train and measure all of TITLES (or `names`) into `out`; the result file also goes to `results`."""
    unknown = set(names) - set(TITLES)
    if unknown:
        raise ValueError(f"compare: names must be among {', '.join(TITLES)}, got {', '.join(sorted(unknown))}.")
    bf16 = bench.cpu_supports_bf16()
    config = CONFIGS[setup.config]
    if setup.max_text_len:
        config = replace(config, max_text_len=setup.max_text_len)
    tokenizer = Tokenizer.train(shapes.vocabulary_captions(), 1000)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    found: dict[str, dict] = {}
    contestants: dict[str, Contestant] = {}
    for name in [n for n in TITLES if not names or n in names]:
        torch.manual_seed(seed)
        begun = time.process_time()
        if name.startswith("vlmo"):
            contestants[name] = Unified(_train_vlmo(out / name, name, setup, seed, bf16))
        else:
            layers = {"dual": 0, "fusion": config.depth, "towers": config.depth - config.vlffn_start}[name]
            contestants[name] = Towers(config, layers)
            _train_towers(contestants[name], name, setup, tokenizer, seed, bf16)
        found[name] = {
            "title": TITLES[name],
            "training_cpu_seconds": time.process_time() - begun,
            "parameters": used_parameters(contestants[name]),
        }
    source = open_source(f"shapes:{setup.large_gallery}:heldout", config.image_size)
    gallery, _ = read_gallery(source, tokenizer, config.image_size, config.max_text_len)
    for name, model in contestants.items():
        found[name]["recall"] = measure_recall(model, gallery, setup)
    timings = measure_times(contestants, gallery, setup)
    for name, model in contestants.items():  # last: it trains them further
        found[name]["questions"] = answer_questions(model, name, setup, tokenizer, seed, bf16)
    result = {
        "suite": SUITE,
        "setup": asdict(setup),
        "model": asdict(config),
        "contestants": found,
        "timings": timings,
        "precision": "bf16" if bf16 else "fp32",
        "versions": bench.versions(),
        "commit": bench.commit(),
        "device": bench.device_name("cpu"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / f"{SUITE}.json", *([results] if results else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=1) + "\n")
    draw(result, out / f"{SUITE}.png")
    models = [(name, found["title"]) for name, found in result["contestants"].items()]
    bench.table("VLMo and what it is compared with", *rows_of(result), notes_of(result), models)
    note = "* computed from the largest N measured"
    bench.table("Seconds to rank N images for each of N texts", *times_of(result), note)
    print(f"{out / f'{SUITE}.json'}, {out / f'{SUITE}.png'}")


# ---------------------------------------------------------------------- training


def _train_towers(model: Towers, name: str, setup: Setup, tokenizer: Tokenizer, seed: int, bf16: bool) -> None:
    config, steps = model.config, sum(setup.steps)
    data = Loader(
        open_source(f"shapes:{setup.pictures}", config.image_size), tokenizer, batch_size=setup.batch_size,
        image_size=config.image_size, max_text_len=config.max_text_len, seed=seed,
    )  # fmt: skip
    stream: Iterator = iter(data)
    recipe = Recipe(steps=steps, lr=setup.lr, warmup=steps // 20, clip=1.0)
    _fit(model, lambda step: model.losses(next(stream), tokenizer, seed, step)["loss"], recipe, bf16, name)


def _fit(module: nn.Module, loss_of: Callable[[int], Tensor], recipe: Recipe, bf16: bool, title: str) -> None:
    """AdamW with the recipe's schedule and clipping, as the Trainer of VLMo's stages."""
    groups = [
        {"params": [p for p in module.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, recipe.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    module.train()
    for step in tqdm(range(recipe.steps), desc=title, unit="step"):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.lr_factor(step)
        optimizer.step()
    module.eval()


def _train_vlmo(out: Path, name: str, setup: Setup, seed: int, bf16: bool) -> VLMo:
    """By `vlmo pretrain`: all three stages, or the last alone for as many steps in all."""
    steps = dict(zip(STAGES, setup.steps)) if name == "vlmo" else {"vision-language": sum(setup.steps)}
    shutil.rmtree(out, ignore_errors=True)  # of an earlier comparison
    start = None
    for stage, number in steps.items():
        recipe = Recipe(
            steps=number, lr=setup.lr, warmup=number // 20, clip=1.0, precision="bf16" if bf16 else "fp32", seed=seed,
            save_every=number,
        )  # fmt: skip
        options = Run(
            stage, out / stage, f"shapes:{setup.pictures}", setup.config, start, batch_size=setup.batch_size,
            max_text_len=setup.max_text_len,
        )  # fmt: skip
        pretrain(options, recipe)
        start = out / stage
    return load_model(start, impl="reference").model  # in plain torch, as the others


def used_parameters(model: Contestant) -> int:
    """Parameters that encoding and matching use; experts of the other modality and heads of training are left out."""
    config = model.config
    ids = torch.full((2, config.max_text_len), 2)
    image, mask = torch.zeros(2, 3, config.image_size, config.image_size), torch.ones_like(ids, dtype=torch.bool)
    outputs = []
    if has_vectors(model):
        outputs += [model.image_vectors(image), model.text_vectors(ids, mask)]
    if has_fusion(model):
        outputs += [model.match(image, ids, mask)]
    for p in model.parameters():
        p.requires_grad_(True).grad = None
    sum(o.sum() for o in outputs).backward()
    used = sum(p.numel() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return used


def has_vectors(model: Contestant) -> bool:
    """Whether images and texts can be encoded apart."""
    return isinstance(model, Unified) or model.image is not None


def has_fusion(model: Contestant) -> bool:
    """Whether it can match a pair."""
    return isinstance(model, Unified) or model.fusion is not None


# ---------------------------------------------------------------------- retrieval


@torch.no_grad()
def vectors(model: Contestant, gallery: Gallery, size: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of the first `size` images and texts."""
    images = [model.image_vectors(to_float(part)) for part in gallery.pixels[:size].split(_PASSES)]
    pairs = zip(gallery.text_ids[:size].split(_PASSES), gallery.text_mask[:size].split(_PASSES))
    return torch.cat(images), torch.cat([model.text_vectors(ids, mask) for ids, mask in pairs])


@torch.no_grad()
def all_pairs(model: Contestant, gallery: Gallery, size: int) -> Tensor:
    """Log-odds [size, size] of every image (row) with every text: size * size passes."""
    pixels, scores = to_float(gallery.pixels[:size]), []
    for pairs in torch.arange(size * size).split(_PASSES):
        image, text = pairs // size, pairs % size
        scores.append(model.match(pixels[image], gallery.text_ids[text], gallery.text_mask[text]))
    return torch.cat(scores).view(size, size)


def measure_recall(model: Contestant, gallery: Gallery, setup: Setup) -> dict[str, float]:
    """Recall@1 both ways over `setup.gallery` pictures, by vectors or else by all pairs; by vectors also over all."""
    size = setup.gallery
    if not has_vectors(model):
        scores = all_pairs(model, gallery, size)
        return {"by": "all pairs", **score_recall(scores)}
    images, texts = vectors(model, gallery, len(gallery.pixels))
    few = recall(images[:size], texts[:size], torch.arange(size))
    many = recall(images, texts, gallery.picture_of_text)
    names = ("t2i_r1", "i2t_r1")
    return {"by": "vectors", **{n: few[n] for n in names}, **{f"{n}_large": many[n] for n in names}}


def score_recall(scores: Tensor) -> dict[str, float]:
    """Recall@1 of scores [images, texts] of which the diagonal is right; ties count as wrong."""
    own = scores.diagonal()
    return {
        "t2i_r1": ((scores >= own[None]).sum(0) == 1).double().mean().item(),
        "i2t_r1": ((scores >= own[:, None]).sum(1) == 1).double().mean().item(),
    }


def measure_times(contestants: dict[str, Contestant], gallery: Gallery, setup: Setup) -> list[dict]:
    """Seconds to rank N images for each of N texts and the other way round, nothing encoded before.

    Every contestant in turn, the least of some rounds. Where all pairs would take longer than `setup.longest`,
    the seconds follow from the largest N that was measured, and "measured" is false.
    """
    ways: dict[str, Callable[[int], object]] = {}
    for name, model in contestants.items():
        if has_vectors(model) and name != "vlmo_scratch":
            ways[f"{name}, vectors"] = lambda n, m=model: search(*reversed(vectors(m, gallery, n)), 10)
        if has_fusion(model) and name in ("fusion", "vlmo"):
            ways[f"{name}, all pairs"] = lambda n, m=model: all_pairs(m, gallery, n).topk(min(n, 10))
    lines: list[dict] = []
    last: dict[str, dict] = {}
    for size in setup.sizes:
        measured: dict[str, list[float]] = {}
        for turn in range(setup.rounds):
            for way, call in ways.items():
                quadratic = way.endswith("pairs")
                guess = last[way]["seconds"] * (size / last[way]["n"]) ** 2 if way in last and quadratic else 0.0
                if guess > setup.longest or (turn and guess > setup.longest / 3):
                    continue
                begun = time.perf_counter()
                call(size)
                measured.setdefault(way, []).append(time.perf_counter() - begun)
        for way in ways:
            passes = size * size if way.endswith("pairs") else 2 * size
            if way in measured:
                last[way] = {"n": size, "seconds": min(measured[way])}
                lines.append({"way": way, "n": size, "passes": passes, "seconds": min(measured[way]), "measured": True})
            else:
                seconds = last[way]["seconds"] * (size / last[way]["n"]) ** 2
                lines.append({"way": way, "n": size, "passes": passes, "seconds": seconds, "measured": False})
    return lines


# ---------------------------------------------------------------------- questions


def answer_questions(
    model: Contestant, name: str, setup: Setup, tokenizer: Tokenizer, seed: int, bf16: bool
) -> dict[str, float]:
    """Accuracy on questions about held-out pictures, after training on questions with a classifier on `joint`."""
    config = model.config
    torch.manual_seed(seed)
    with torch.no_grad():
        ids = torch.full((1, config.max_text_len), 2)
        width = model.joint(torch.zeros(1, 3, config.image_size, config.image_size), ids, ids > 0).shape[1]
    head = classifier(width, 2 * config.dim, len(shapes.ANSWERS))

    def batches(split: str, count: int) -> ExampleBatches:
        examples = ShapesQuestions(count, seed, config.image_size, split)
        return ExampleBatches(examples, tokenizer, config.image_size, config.max_text_len, setup.batch_size, seed)

    stream = iter(batches("train", setup.pictures))

    def loss(_: int) -> Tensor:
        batch = next(stream)
        logits = head(model.joint(batch.images[0], batch.text_ids, batch.text_mask))
        return F.cross_entropy(logits.float(), batch.target)

    steps = setup.question_steps
    recipe = Recipe(steps=steps, lr=setup.question_lr, warmup=steps // 10, clip=1.0)
    _fit(nn.ModuleList([model, head]), loss, recipe, bf16, f"{name}, questions")
    right, targets = [], []
    with torch.no_grad():
        for batch, _ in batches("heldout", setup.questions).once():
            logits = head(model.joint(batch.images[0], batch.text_ids, batch.text_mask))
            right.append(batch.target.gather(1, logits.argmax(1, keepdim=True)))
            targets.append(batch.target)
    majority = torch.cat(targets).mean(0).max().item()
    return {"accuracy": torch.cat(right).mean().item(), "majority": majority, "questions": len(torch.cat(right))}


# ---------------------------------------------------------------------- showing


def rows_of(result: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of all contestants."""
    setup, timings = result["setup"], result["timings"]
    large, few = setup["large_gallery"], setup["gallery"]
    largest = max(setup["sizes"])
    columns = [
        "model", "parameters", "training, s", f"to image, R@1 of {few}", f"to text, R@1 of {few}",
        f"both, of {large}", f"{largest} x {largest}, s", "questions",
    ]  # fmt: skip
    rows = []
    for name, found in result["contestants"].items():
        recalled = found["recall"]
        both = f"{recalled['t2i_r1_large']:.3f}, {recalled['i2t_r1_large']:.3f}" if "t2i_r1_large" in recalled else ""
        of = "vlmo" if name == "vlmo_scratch" else name
        ways = [t for t in timings if t["way"].startswith(f"{of},") and t["n"] == largest]
        cells = [f"{t['seconds']:.3g}" + ("" if t["measured"] else " *") for t in ways[:1]]
        rows.append([
            name, f"{found['parameters'] / 1e6:.2f} M", f"{found['training_cpu_seconds']:.0f}",
            f"{recalled['t2i_r1']:.3f}", f"{recalled['i2t_r1']:.3f}", both, "".join(cells),
            f"{found['questions']['accuracy']:.3f}",
        ])  # fmt: skip
    return columns, rows


def times_of(result: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of times."""
    sizes = result["setup"]["sizes"]
    ways = list(dict.fromkeys(t["way"] for t in result["timings"]))
    at = {(t["way"], t["n"]): t for t in result["timings"]}
    rows = [
        [way, *(f"{at[way, n]['seconds']:.3g}" + ("" if at[way, n]["measured"] else " *") for n in sizes)]
        for way in ways
    ]
    return ["seconds", *(f"{n} x {n}" for n in sizes)], rows


def notes_of(result: dict) -> str:
    """How it was measured, and what the least informed answer reaches; one paragraph."""
    setup = result["setup"]
    vision, language, both = setup["steps"]
    majority = next(iter(result["contestants"].values()))["questions"]["majority"]
    return (
        f"{vision + language + both} steps of {setup['batch_size']} for each ({vision} + {language} + {both} for the "
        f"three stages; seconds of CPU), {result['precision']}, then {setup['question_steps']} steps on questions. "
        f"Held-out meanings; chance is {1 / setup['gallery']:.3f} for recall, the commonest answer is right in "
        f"{majority:.3f}. The fusion encoder ranks by all pairs; its time is computed (*) where "
        "measuring would take too long."
    )


def draw(result: dict, path: Path) -> None:
    """Recall, time over N, and questions, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    found = result["contestants"]
    places = range(len(found))
    for offset, key, label in ((-0.2, "t2i_r1", "text to image"), (0.2, "i2t_r1", "image to text")):
        left.bar([p + offset for p in places], [f["recall"][key] for f in found.values()], 0.38, label=label)
    left.set(title=f"recall@1 of {result['setup']['gallery']} held-out pictures", ylim=(0, 1))
    left.legend()
    right.bar(places, [f["questions"]["accuracy"] for f in found.values()], 0.6)
    majority = next(iter(found.values()))["questions"]["majority"]
    right.axhline(majority, color="gray", linestyle="--", label="commonest answer")
    right.set(title="questions about held-out pictures", ylabel="accuracy", ylim=(0, 1))
    right.legend()
    for panel in (left, right):
        panel.set_xticks(list(places), list(found), rotation=20)
    for way in dict.fromkeys(t["way"] for t in result["timings"]):
        points = [t for t in result["timings"] if t["way"] == way]
        (line,) = middle.loglog([t["n"] for t in points], [t["seconds"] for t in points], label=way, linewidth=1)
        for measured in (True, False):
            some = [t for t in points if t["measured"] == measured]
            middle.plot(
                [t["n"] for t in some], [t["seconds"] for t in some], "o", color=line.get_color(),
                fillstyle="full" if measured else "none",
            )  # fmt: skip
    middle.set(title="seconds for N images x N texts (hollow: computed)", xlabel="N", ylabel="seconds")
    middle.legend()
    middle.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
