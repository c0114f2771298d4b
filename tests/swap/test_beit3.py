"""The swapped BEiT-3 encoder against torchscale's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.common import torchscale_stub
from tests.common.numerics import assert_close_as_eager
from vlmo_kernels.swap import swap

torchscale_stub.install()

from torchscale.architecture.config import EncoderConfig  # noqa: E402
from torchscale.model.BEiT3 import BEiT3  # noqa: E402

MODES = ("image", "text", "text_padded", "both", "both_padded")
BATCH, TEXT, PATCHES = 3, 6, 5  # 4 patches and a class token


def model(seed: int = 0, **settings) -> BEiT3:
    torch.manual_seed(seed)
    defaults = dict(
        encoder_embed_dim=32, encoder_attention_heads=4, encoder_ffn_embed_dim=48, encoder_layers=2, multiway=True,
        vocab_size=50, img_size=8, patch_size=4, max_source_positions=32, no_output_layer=True,
    )  # fmt: skip
    made = BEiT3(EncoderConfig(**(defaults | settings)))
    with torch.no_grad():  # biases and norms start at constants, which hide mistakes
        for p in made.parameters():
            if p.dim() == 1 or p.shape[:2] == (1, 1):
                p.add_(0.3 * torch.randn_like(p))
    return made


def batch(mode: str, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(1)
    image, text = torch.randn(BATCH, 3, 8, 8), torch.randint(0, 50, (BATCH, TEXT))
    given: dict = {}
    if mode.startswith(("image", "both")):
        given["visual_tokens"] = image.to(dtype)
    if mode.startswith(("text", "both")):
        given["textual_tokens"] = text
    if mode.endswith("padded"):
        given["text_padding_position"] = torch.arange(TEXT) >= torch.tensor([TEXT, 3, 1])[:, None]
    return given


def valid(mode: str) -> torch.Tensor:
    """bool `[B, N]`, true for real tokens."""
    images = 0 if mode.startswith("text") else PATCHES
    texts = 0 if mode == "image" else TEXT
    real = torch.ones(BATCH, images + texts, dtype=torch.bool)
    if mode.endswith("padded"):
        real[:, images:] = torch.arange(TEXT) < torch.tensor([TEXT, 3, 1])[:, None]
    return real


class InFp64(TorchFunctionMode):
    """torchscale takes softmax and activation in fp32 whatever the dtype; the truth in fp64 does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0]
        if func is F.softmax:
            kwargs.pop("dtype", None)
        return func(*args, **kwargs)


def run(net: BEiT3, mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The valid rows of the output, and every parameter's gradient (zeros for None)."""
    dtype = next(net.parameters()).dtype
    net.zero_grad()
    out = net(**batch(mode, dtype))["encoder_out"][valid(mode)]
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(dtype))
    return out.detach(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()
    }


def truth(plain: BEiT3, mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the plain model makes of it in fp64."""
    with InFp64():
        return run(copy.deepcopy(plain).double(), mode)


def swapped(plain: nn.Module) -> nn.Module:
    ours = copy.deepcopy(plain)
    swap(ours)
    return ours


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[: 3 if ".layers." in name else 2])


def joined(grads: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return torch.cat([g.flatten() for name, g in grads.items() if layer_of(name) == part])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subln", [True, False])
def test_fp64_equals_the_plain_model(mode: str, subln: bool) -> None:
    plain = model(subln=subln)
    out, grads = run(swapped(plain.double()), mode)
    expected, expected_grads = truth(plain, mode)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subln", [True, False])
def test_fp32_is_as_exact_as_eager(mode: str, subln: bool) -> None:
    plain = model(subln=subln)
    out, grads = run(swapped(plain), mode)
    eager, eager_grads = run(plain, mode)
    expected, expected_grads = truth(plain, mode)
    assert_close_as_eager(out, expected, eager, "encoder_out")
    # By layer: two roundings of one bias of 32 numbers may well differ by 2x, of a layer's gradients not.
    # That no parameter is exchanged or forgotten is shown in fp64.
    for part in {layer_of(name) for name in grads}:
        assert_close_as_eager(*(joined(g, part) for g in (grads, expected_grads, eager_grads)), part)
