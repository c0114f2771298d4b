"""VLMo-Base itself, swapped, in fp32: every pass, output and gradient, by the numerics rule."""

from __future__ import annotations

import copy
import re
from collections import defaultdict

import pytest
import torch
from torch import nn

import vlmo
import vlmo_kernels
from tests.common.agreement import to_magnitude_one
from tests.common.eager import _SoftmaxProduct
from tests.common.numerics import assert_close_as_eager
from vlmo.model import VLMo
from vlmo.transformer import Attention

LENGTHS = (40, 9, 22)


@pytest.fixture(scope="module")
def published() -> VLMo:
    torch.manual_seed(0)
    model = vlmo.build(vlmo.CONFIGS["base"]).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # as the constructor leaves them, most of these hide mistakes
            if "gamma" in name:
                p.uniform_(0.5, 1.5)
            elif p.dim() == 1 or name == "relative_position_bias_table":
                p.add_(0.1 * torch.randn_like(p))
    return model


def _batch(config) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    size = (len(LENGTHS), 3, config.image_size, config.image_size)
    ids = torch.randint(1, config.vocab_size, (len(LENGTHS), config.max_text_len), generator=generator)
    mask = torch.arange(config.max_text_len) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(size, generator=generator), ids, mask


def _results(model: nn.Module, name: str, batch) -> dict[str, torch.Tensor]:
    """Features of valid positions, and gradients pooled over the layers."""
    image, ids, mask = batch
    image = image.to(next(model.parameters()).dtype)
    out = getattr(model, name)(*{"infer": (image, ids, mask), "infer_text": (ids, mask), "infer_image": (image,)}[name])
    valid = {"text_feats": mask}
    features = {k: v[valid[k]] if k in valid else v for k, v in out._asdict().items() if torch.is_tensor(v)}
    generator = torch.Generator().manual_seed(2)
    loss = sum((f * torch.randn(f.shape, generator=generator).to(f.dtype)).sum() for f in features.values())
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {k: v.detach() for k, v in features.items()} | {f"d {k}": g for k, g in zip(parameters, grads, strict=True)}


def _attend(self, q, k, v, padding, bias):
    """The published attention with the derivative of those who keep no score matrix: the fair measure in fp32."""
    scores = q @ k.transpose(-2, -1) + bias
    return _SoftmaxProduct.apply(scores if padding is None else scores.masked_fill(padding, float("-inf")), v)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infer", "infer_text", "infer_image"])
def test_swapped_base_equals_the_published_model_to_fp32_rounding(
    published: VLMo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = _batch(published.config)
    expected = _results(copy.deepcopy(published).double(), name, batch)
    swapped = copy.deepcopy(published)
    vlmo_kernels.swap(swapped)
    actual = _results(swapped, name, batch)
    monkeypatch.setattr(Attention, "_published", _attend)
    eager = _results(published, name, batch)
    pools: dict[str, list[list[torch.Tensor]]] = defaultdict(list)
    for key, right in expected.items():
        if not right.any():
            assert not actual[key].any(), f"{key}: a parameter that takes no part must get zeros"
            continue
        factor = to_magnitude_one(right)
        pools[re.sub(r"\.\d+\.", ".", key)].append([(t * factor).flatten() for t in (actual[key], right, eager[key])])
    assert "d relative_position_bias_table" in pools
    for key, pool in pools.items():
        assert_close_as_eager(*(torch.cat(parts) for parts in zip(*pool, strict=True)), f"{name} {key}")
