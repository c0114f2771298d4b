"""The model's part of `vlmo-kernels demo`: one set of weights, four ways to run it, eight photographs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import vlmo_kernels
from vlmo_kernels import demo_data

from .checkpoint import load_checkpoint
from .config import CONFIGS, VLMoConfig
from .model import VLMo

CONTESTANTS = {
    "published": "score matrix in fp32, padded, as published",
    "sdpa": "torch's fused attention, padded",
    "compile": "torch.compile of sdpa, block by block",
    "ours": "vlmo_kernels.swap",
}


@dataclass
class Inputs:
    """A batch, and what to show of it.

    image: [B, 3, S, S] fp32. text_ids, text_mask: int64 [B, max_text_len]. captions: B texts. photos: B pictures
    (PIL). vocab_size: pieces the tokenizer knows.
    """

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor
    captions: list[str]
    photos: list[Any]
    vocab_size: int


def config_for(name: str, vocab_size: int) -> VLMoConfig:
    """A named size without DropPath, with a vocabulary of `vocab_size` pieces."""
    if name not in CONFIGS:
        raise ValueError(f"demo: config must be one of {', '.join(CONFIGS)}, got {name!r}.")
    return replace(CONFIGS[name], drop_path=0.0, vocab_size=vocab_size)


def load_inputs(config_name: str, vocab: str | None = None, device: str = "cpu") -> Inputs:
    """The photographs and captions that ship with the project, as inputs of a named size.

    vocab: a WordPiece vocabulary file; by default one is trained on the captions.
    """
    config = config_for(config_name, 1)
    pairs = demo_data.load_photos()
    captions = [caption for _, caption in pairs]
    if vocab is None:
        tokenizer = demo_data.train_wordpiece(captions, 600)
    else:
        tokenizer = demo_data.load_vocab(vocab)
    ids, mask = demo_data.encode(tokenizer, captions, config.max_text_len)
    image = torch.stack([demo_data.image_tensor(photo, config.image_size) for photo, _ in pairs])
    return Inputs(
        image.to(device),
        ids.to(device),
        mask.to(device),
        captions,
        [photo for photo, _ in pairs],
        tokenizer.get_vocab_size(),
    )


def build_model(
    config_name: str,
    vocab_size: int,
    checkpoint: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VLMo:
    """The model in eval mode, with random weights or a checkpoint's (whose vocabulary has its usual size)."""
    if checkpoint is not None:
        vocab_size = max(vocab_size, CONFIGS[config_name].vocab_size)
    with torch.device("meta"):
        model = VLMo(config_for(config_name, vocab_size))
    model = model.to_empty(device=device)
    model.reset_position_indices()
    _randomise(model)
    if checkpoint is not None:
        report = load_checkpoint(model, checkpoint, strict=False)
        if report.missing and any(name.startswith("transformer.") for name in report.missing):
            raise ValueError(
                f"demo: the checkpoint must hold the whole transformer, it lacks {len(report.missing)} parameters, "
                f"{report.missing[0]} among them. Hint: --config must be the checkpoint's size."
            )
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def _randomise(model: VLMo, seed: int = 0) -> None:
    """Weights of which none is neutral: with zero biases or a LayerScale of 0.1 errors would not be seen."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) and name == "weight" or name.startswith("gamma_"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif name == "relative_position_bias_table":
                p.normal_(std=0.5, generator=generator)
            else:
                p.normal_(std=0.02, generator=generator)


def shared_copy(model: VLMo) -> VLMo:
    """A model of its own on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_contestants(model: VLMo) -> dict[str, VLMo]:
    """The four contestants on the parameters of `model`, which itself is the published one."""
    models = {name: model if name == "published" else shared_copy(model) for name in CONTESTANTS}
    models["published"].set_attention("published")
    models["sdpa"].set_attention("sdpa")
    models["compile"].set_attention("sdpa")
    # Blocks of one kind share one compiled graph; compiling the loop over them as a whole takes minutes.
    for block in models["compile"].transformer.blocks:
        block.compile()
    vlmo_kernels.swap(models["ours"])
    return models


def fusion_call(model: VLMo, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Any]:
    """One fusion pass over the batch."""
    image = inputs.image.to(dtype)
    return lambda: model.infer(image, inputs.text_ids, inputs.text_mask)


def first_samples(inputs: Inputs, samples: list[int]) -> Inputs:
    """The same batch with these samples only."""
    return replace(
        inputs,
        image=inputs.image[samples],
        text_ids=inputs.text_ids[samples],
        text_mask=inputs.text_mask[samples],
        captions=[inputs.captions[i] for i in samples],
        photos=[inputs.photos[i] for i in samples],
    )


def valid_values(output: Any, inputs: Inputs) -> list[Tensor]:
    """For every sample its valid features, [valid tokens + 1, dim]: text, image, pooled."""
    return [
        torch.cat(
            [output.text_feats[b][inputs.text_mask[b].bool()], output.image_feats[b], output.cls_feats[b : b + 1]]
        )
        for b in range(len(inputs.captions))
    ]


def loss_for_training(model: VLMo, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A training forward pass to one number; every parameter of the transformer takes part."""
    call = fusion_call(model, inputs, dtype)

    def loss() -> Tensor:
        out = call()
        return out.image_feats.float().square().mean() + out.cls_feats.float().square().mean()

    return loss
