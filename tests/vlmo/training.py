"""A small training set-up the tests of this folder share: tiny model, generated pictures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from vlmo import CONFIGS, VLMo, shapes
from vlmo.data import Batch, Loader
from vlmo.objectives import Inputs, Pretraining, prepare
from vlmo.sources import open_source
from vlmo.stages import set_trainable, stage_config
from vlmo.tokenizer import Tokenizer


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(shapes.vocabulary_captions(), 1000)


CONFIG = replace(CONFIGS["tiny"], max_text_len=20, vocab_size=tokenizer().vocab_size)
USES = {"vision": "images", "language": "texts", "vision-language": "pairs"}


def loader(stage: str, batch_size: int, config=CONFIG, rank: int = 0, world_size: int = 1) -> Loader:
    source = open_source("shapes:400", config.image_size)
    return Loader(
        source, tokenizer(), batch_size=batch_size, image_size=config.image_size, max_text_len=config.max_text_len,
        use=USES[stage], rank=rank, world_size=world_size,
    )  # fmt: skip


def batch(size: int = 8, stage: str = "vision-language") -> Batch:
    return next(iter(loader(stage, size)))


def random_model(stage: str, dtype: torch.dtype = torch.float32, config=CONFIG, seed: int = 0) -> VLMo:
    """Every parameter random and of order 1, so that no part of the model is silent; ready for the stage."""
    torch.manual_seed(seed)
    model = VLMo(stage_config(config, stage))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    set_trainable(model, stage)
    return model.to(dtype)


def step_inputs(stage: str, dtype: torch.dtype = torch.float32, size: int = 8, step: int = 3) -> Inputs:
    given = batch(size, stage)
    if given.image is not None:
        given.image = given.image.to(dtype)
    return prepare(stage, given, stage_config(CONFIG, stage), tokenizer(), 7, step)


def objective(stage: str, dtype: torch.dtype = torch.float32, impl: str = "auto", seed: int = 0) -> Pretraining:
    module = Pretraining(random_model(stage, dtype, seed=seed), stage, impl=impl)
    if module.pixels is not None:
        torch.manual_seed(seed)
        for p in module.pixels.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return module.to(dtype).train()
