"""One packed pass against the separate passes, and DropPath from the counter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.common.numerics import assert_close_as_eager
from vlmo import CONFIGS, VLMo
from vlmo.packed import encode, make_plan

CONFIG = replace(CONFIGS["tiny"], max_text_len=6)
ABSOLUTE = replace(CONFIG, relative_position_bias=False, layer_scale_init=None)
LENGTHS = torch.tensor([6, 2, 1, 4])  # full, [CLS] and one more, [CLS] alone


def model_of(config, dtype: torch.dtype, seed: int = 0) -> VLMo:
    torch.manual_seed(seed)
    model = VLMo(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.to(dtype)


def inputs(config, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = len(LENGTHS)
    image = torch.randn(size, 3, config.image_size, config.image_size, generator=generator).to(dtype)
    ids = torch.randint(1, config.vocab_size, (size, config.max_text_len), generator=generator)
    masked = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, 1, ids)
    return image, ids, masked, torch.arange(config.max_text_len) < LENGTHS[:, None]


def separate(model: VLMo) -> dict[str, Tensor]:
    image, ids, masked, mask = inputs(model.config, model.pooler.dense.weight.dtype)
    text, visual = model.infer_text(ids, mask), model.infer_image(image)
    mlm, itm = model.infer(image, masked, mask), model.infer(image, ids, mask)
    return {
        "text": text.itc_feats,
        "text vl": text.itc_vl_feats,
        "image": visual.itc_feats,
        "image vl": visual.itc_vl_feats,
        "mlm": model.mlm_score(mlm.text_feats[mask]),
        "itm": model.itm_score(itm.cls_feats),
    }


def packed(model: VLMo, impl: str, recompute: bool = False, read: bool = False) -> dict[str, Tensor]:
    """The same six results from one pass: every text and image embedded once; with `read`, only what is read."""
    image, ids, masked, mask = inputs(model.config, model.pooler.dense.weight.dtype)
    n = len(ids)
    each = torch.arange(n)
    sample, position = mask.nonzero().unbind(1)
    plan = make_plan(
        model.config, mask.repeat(3, 1), pairs=2 * n, images=n, copies=True,
        text_of=torch.cat([each, n + each, each]), image_of=each.repeat(3), num_texts=2 * n,
        read=(n + sample, position) if read else None,
    )  # fmt: skip
    text = model.embed_text(torch.cat([ids, masked]))
    x = encode(model, plan, text, model.embed_image(image), recompute=recompute, impl=impl)
    norm = model.transformer.norm
    pooled = model.pooler(norm(x[plan.pair_cls()[n:]])[:, None])
    return {
        "text": model.itc_text_proj(norm(x[plan.text_cls()])),
        "text vl": model.itc_vl_text_proj(norm(x[plan.text_vl_cls()])),
        "image": model.itc_image_proj(norm(x[plan.image_cls()])),
        "image vl": model.itc_vl_image_proj(norm(x[plan.image_vl_cls()])),
        "mlm": model.mlm_score(norm(x[plan.rows(n + sample, position)])),
        "itm": model.itm_score(pooled),
    }


def results(run: Callable[[VLMo], dict[str, Tensor]], config, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Outputs, and the gradient of every parameter of a weighted sum of them."""
    model = model_of(config, dtype, seed)
    outputs = run(model)
    generator = torch.Generator().manual_seed(2)
    weights = {k: torch.randn(v.shape, generator=generator, dtype=torch.float64) for k, v in outputs.items()}
    sum((v * weights[k].to(dtype)).sum() for k, v in outputs.items()).backward()
    return outputs | {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def kind(name: str) -> str:
    """What is judged together: rounding through four layers is chance in any single vector."""
    return "gradients" if name.startswith("d ") else "outputs"


@pytest.mark.parametrize(
    "config, impl, recompute, read",
    [(CONFIG, "reference", False, False), (CONFIG, "cpu", True, True), (ABSOLUTE, "cpu", False, True)],
    ids=["reference", "cpu-recompute-read", "cpu-absolute-read"],
)
def test_one_pass_is_the_separate_passes(config, impl: str, recompute: bool, read: bool) -> None:
    pools: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
    for seed in range(2):
        expected = results(separate, config, torch.float64, seed)
        eager = results(separate, config, torch.float32, seed)
        actual = results(lambda model: packed(model, impl, recompute, read), config, torch.float32, seed)
        assert expected.keys() == actual.keys() and sum(name.startswith("d ") for name in actual) > 100
        for name, want in expected.items():
            # One magnitude for all that is pooled.
            scale = 2.0 ** -round(math.log2(max(float(want.detach().square().mean().sqrt()), 1e-30)))
            pools[kind(name)].append(((actual[name], want, eager[name]), scale))
    for name, pool in pools.items():
        three = (torch.cat([(t[i] * scale).flatten() for t, scale in pool]) for i in range(3))
        assert_close_as_eager(*three, name)


def test_kinds_of_batches() -> None:
    """Images alone, texts alone and pairs alone, without the plan of a mixture."""
    model = model_of(CONFIG, torch.float64)
    image, ids, _, mask = inputs(CONFIG, torch.float64)
    norm = model.transformer.norm

    plan = make_plan(CONFIG, None, images=len(image))
    got = norm(encode(model, plan, None, model.embed_image(image), impl="reference"))
    torch.testing.assert_close(got.view(len(image), -1, CONFIG.dim), model.infer_image(image).image_feats)

    plan = make_plan(CONFIG, mask)
    got = plan.top.unpack(norm(encode(model, plan, model.embed_text(ids), None, impl="reference")))
    torch.testing.assert_close(got[mask], model.infer_text(ids, mask).text_feats[mask])

    plan = make_plan(CONFIG, mask, pairs=len(ids))
    x = norm(encode(model, plan, model.embed_text(ids), model.embed_image(image), impl="reference"))
    got, want = plan.top.unpack(x), model.infer(image, ids, mask)
    torch.testing.assert_close(got[:, : CONFIG.max_text_len][mask], want.text_feats[mask])
    torch.testing.assert_close(got[:, CONFIG.max_text_len :], want.image_feats)
