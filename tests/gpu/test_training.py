"""vlmo's packed encoder on a GPU: as close to fp64 as the separate passes in eager torch, and it never waits."""

from __future__ import annotations

import torch

from tests.common.numerics import assert_close_as_eager
from vlmo import CONFIGS, VLMo
from vlmo.packed import encode, make_plan

CONFIG = CONFIGS["tiny"]


def model_on(device: str, dtype: torch.dtype) -> VLMo:
    torch.manual_seed(0)
    model = VLMo(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.to(device, dtype)


def inputs(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    image = torch.randn(4, 3, CONFIG.image_size, CONFIG.image_size)
    ids = torch.randint(1, CONFIG.vocab_size, (4, CONFIG.max_text_len))
    mask = torch.arange(CONFIG.max_text_len) < torch.tensor([6, 2, 1, 4])[:, None]
    return image.to(device, dtype), ids.to(device), mask.to(device)


def separate(device: str, dtype: torch.dtype) -> torch.Tensor:
    model, (image, ids, mask) = model_on(device, dtype), inputs(device, dtype)
    text, visual, pair = model.infer_text(ids, mask), model.infer_image(image), model.infer(image, ids, mask)
    features = (text.itc_feats, text.itc_vl_feats, visual.itc_feats, visual.itc_vl_feats, pair.cls_feats)
    return torch.cat(features)


def packed(model: VLMo, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    each = torch.arange(4, device=ids.device)
    plan = make_plan(
        CONFIG, mask.repeat(2, 1), pairs=4, images=4, copies=True,
        text_of=each.repeat(2), image_of=each.repeat(2), num_texts=4,
    )  # fmt: skip
    x = encode(model, plan, model.embed_text(ids), model.embed_image(image))

    def at(rows: torch.Tensor) -> torch.Tensor:
        return model.transformer.norm(x[rows])

    return torch.cat(
        [
            model.itc_text_proj(at(plan.text_cls())),
            model.itc_vl_text_proj(at(plan.text_vl_cls())),
            model.itc_image_proj(at(plan.image_cls())),
            model.itc_vl_image_proj(at(plan.image_vl_cls())),
            model.pooler(at(plan.pair_cls())[:, None]),
        ]
    )


def test_one_pass_is_the_separate_passes() -> None:
    ours = packed(model_on("cuda", torch.float32), *inputs("cuda", torch.float32))
    assert_close_as_eager(ours, separate("cpu", torch.float64), separate("cuda", torch.float32))


def test_planning_and_a_step_do_not_wait_for_the_device() -> None:
    model, given = model_on("cuda", torch.float32), inputs("cuda", torch.float32)
    packed(model, *given).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed(model, *given).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
