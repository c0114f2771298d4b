"""From a file or a folder to a model that is ready for use."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import vlmo_kernels

from .checkpoint import load_checkpoint, read_state
from .config import CONFIGS, VLMoConfig
from .downstream import VLMoForNLVR2, VLMoForVQA
from .model import VLMo
from .position import num_extra_rows
from .snapshots import load_config, write_atomically
from .tokenizer import Tokenizer

IMPLS = ("auto", "reference")
_HEADS = ("mlm_score.", "itm_score.", "itc_", "logit_")  # of pre-training; classifiers have no use for them
_CLASSIFIER = {"vqa": "vqa_classifier.", "nlvr2": "nlvr2_classifier."}
_KEYS = {"mlm": "mlm_score.bias", "itm": "itm_score.fc.bias", "itc": "itc_vl_text_proj.fc.weight"}


@dataclass
class Loaded:
    """model: in eval mode. classes: of a VQA or NLVR2 model. notes: what was adapted or is new, for the user."""

    model: VLMo
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    notes: list[str]


def load_model(
    path: str | Path,
    *,
    task: str = "retrieval",
    classes: tuple[str, ...] | None = None,
    vocab: str | Path | None = None,
    image_size: int | None = None,
    max_text_len: int | None = None,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Loaded:
    """A model for "retrieval", "vqa" or "nlvr2".

    path: a folder that `vlmo pretrain` or `vlmo finetune` left, or a checkpoint file, the published ones included
    (their size and heads are told from the parameters; `vocab` must be given). classes: what a new VQA or NLVR2
    classifier is to choose from; None: the model must have been fine-tuned, and brings its own. image_size,
    max_text_len: if not what the model was trained with; positions are interpolated. impl: "auto" lets
    `vlmo_kernels.swap` compute the blocks, "reference" is plain torch.
    """
    path = Path(path)
    if impl not in IMPLS:
        raise ValueError(f"load_model: impl must be one of {IMPLS}, got {impl!r}.")
    if not path.exists():
        raise FileNotFoundError(f"load_model: the model must exist, got '{path}'.")
    if path.is_dir():
        config, _ = load_config(path)
        state = read_state(path / "model.safetensors")
        vocab = vocab or path / "vocab.txt"
    else:
        state = read_state(path)
        config = config_of(state)
    if vocab is None:
        raise ValueError("load_model: with a checkpoint file there must be its vocabulary. Hint: --vocab vocab.txt.")
    tokenizer = Tokenizer.load(vocab)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"load_model: the vocabulary must be the model's, of at most {config.vocab_size} pieces, "
            f"'{vocab}' has {tokenizer.vocab_size}."
        )
    config = replace(
        config, image_size=image_size or config.image_size, max_text_len=max_text_len or config.max_text_len
    )
    if classes is None and task in _CLASSIFIER:
        classes = _saved_classes(path, task, state)
    model = _build(config, task, classes or ())
    report = load_checkpoint(model, state, strict=False)
    new = [name for name in report.missing if name.startswith(_CLASSIFIER.get(task, "\0"))]
    missing = [name for name in report.missing if name not in new]
    foreign = [n for n in report.unexpected if not n.startswith((*_HEADS, *_CLASSIFIER.values()))]
    if missing or foreign:
        raise ValueError(
            f"load_model: a checkpoint for {task} must hold the whole model; "
            f"missing: {', '.join(missing[:4]) or 'none'}; foreign: {', '.join(foreign[:4]) or 'none'}. "
            "Hint: the vision-language stage's, or a fine-tuned one."
        )
    notes = [f"converted {name}" for name in report.converted]
    notes += [f"new: {_CLASSIFIER[task]}* ({len(classes)} classes)"] if new else []
    model = model.to(device).eval()
    if impl == "auto":
        vlmo_kernels.swap(model)
    return Loaded(model, tokenizer, tuple(classes or ()), notes)


def save_beside(out: Path, task: str, loaded: Loaded) -> None:
    """What `load_model` needs beside the parameters and configuration of a fine-tuned model: vocab.txt, and of a
    classifier classes.json."""
    loaded.tokenizer.save(out / "vocab.txt")
    if loaded.classes:
        write_atomically(out / "classes.json", json.dumps({"task": task, "classes": loaded.classes}, indent=1))


def _build(config: VLMoConfig, task: str, classes: tuple[str, ...]) -> VLMo:
    if task == "vqa":
        return VLMoForVQA(replace(config, heads=()), len(classes))
    if task == "nlvr2":
        return VLMoForNLVR2(replace(config, heads=(), num_token_types=3))
    if task != "retrieval":
        raise ValueError(f"load_model: task must be retrieval, vqa or nlvr2, got {task!r}.")
    if not {"itc", "irtr"} & set(config.heads):
        raise ValueError(
            f"load_model: a model for retrieval must have the head 'itc' or 'irtr', it has {config.heads or 'none'}. "
            "Hint: the vision-language stage's model, or one fine-tuned for retrieval."
        )
    return VLMo(config)


def _saved_classes(path: Path, task: str, state: dict[str, Tensor]) -> tuple[str, ...]:
    if not any(key.startswith(_CLASSIFIER[task]) for key in state):
        raise ValueError(
            f"load_model: for {task} the model must be fine-tuned, '{path}' is not. Hint: vlmo finetune --task {task}."
        )
    file = path / "classes.json"
    if not file.is_file():
        if task == "nlvr2":
            return ("False", "True")
        raise ValueError(
            f"load_model: the answers of a VQA model must be in classes.json beside it, '{path}' has none. "
            'Hint: {"task": "vqa", "classes": [...]} in the order of the classifier.'
        )
    return tuple(json.loads(file.read_text(encoding="utf-8"))["classes"])


def config_of(state: dict[str, Tensor]) -> VLMoConfig:
    """The configuration of a published checkpoint, told from names and shapes of its parameters."""
    try:
        dim = state["transformer.cls_token"].shape[-1]
        patch = state["transformer.patch_embed.proj.weight"].shape[-1]
        vocab_size = len(state["text_embeddings.word_embeddings.weight"])
        positions = len(state["text_embeddings.position_embeddings.weight"])
        types = len(state["token_type_embeddings.weight"])
    except KeyError as error:
        raise ValueError(f"load_model: a checkpoint of VLMo must have {error}. Hint: is it one?") from error
    depth = len({key.split(".")[2] for key in state if key.startswith("transformer.blocks.")})
    base = next((c for c in CONFIGS.values() if (c.dim, c.depth) == (dim, depth)), None)
    if base is None:
        raise ValueError(f"load_model: no published size has width {dim} and {depth} layers. Hint: give its folder.")
    if "relative_position_bias_table" in state:
        rows = len(state["relative_position_bias_table"]) - num_extra_rows(base.text_only_len)
        window = (round(rows**0.5) + 1) // 2
    else:
        window = round((state["transformer.pos_embed"].shape[1] - 1) ** 0.5)
    heads = tuple(head for head, key in _KEYS.items() if key in state)
    if "itc" not in heads and "itc_text_proj.fc.weight" in state:
        heads += ("irtr",)
    return replace(
        base,
        image_size=window * patch,
        patch_size=patch,
        vocab_size=vocab_size,
        max_text_len=positions,
        num_token_types=types,
        heads=heads,
    )
