"""What the GPU tests share.

VLMO_TEST_DEVICE=cpu with TRITON_INTERPRET=1 runs the bodies of those that need no CUDA in Triton's interpreter, on
smaller inputs: tests/test_gpu_stages.py does so, lest the first minute on a GPU be lost to a slip.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch

import vlmo_kernels as vk
from vlmo_kernels.tuning import tables

DEVICE = os.environ.get("VLMO_TEST_DEVICE", "cuda")
SMALL = DEVICE == "cpu"
WIDTH, HEADS = (32, 2) if SMALL else (256, 4)


def make_layout(samples: int = 16, seed: int = 0) -> vk.ModalityLayout:
    """Pairs with texts of random length, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    samples, longest, image = (2, 5, 6) if SMALL else (samples, 40, 197)
    texts = torch.randint(0, longest, (samples,), generator=generator).tolist()
    texts[0] = 0
    return vk.ModalityLayout.from_lengths({"text": texts, "image": image}, device=DEVICE)


def make_block(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> vk.MoMEBlock:
    torch.manual_seed(seed)
    return vk.MoMEBlock(WIDTH, HEADS, layer_scale=1.0, impl="triton").to(DEVICE, dtype)


def rows_for(layout: vk.ModalityLayout, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.tokens, WIDTH, generator=generator).to(DEVICE, dtype)


def gradients(module, leaves, layout, x, dy) -> list[torch.Tensor]:
    """The output and the gradient of every leaf."""
    y = module(x, layout)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@contextlib.contextmanager
def through_descriptors(choices: dict[str, tuple]) -> Iterator[None]:
    """Forces configurations with TMA; proves nothing, and so fails, where no launch could take it on such a GPU."""
    from vlmo_kernels.kernels import gemm, gemm_grad, gemm_tma  # needs Triton, which collecting does not

    made = []

    def describe(*arguments):
        made.append(gemm_tma.describe(*arguments))
        return made[-1]

    with tables.forced(choices), contextlib.ExitStack() as stack:
        for module in (gemm, gemm_grad):
            stack.enter_context(mock.patch.object(module, "describe", describe))
        yield
    able = SMALL or torch.cuda.get_device_capability() >= (9, 0)
    assert any(found is not None for found in made) == able
