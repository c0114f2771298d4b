"""The batches of the suites: data, not code."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from vlmo_kernels.layout import ModalityLayout


@dataclass(frozen=True)
class Case:
    """A batch of VLMo-shaped samples.

    Attributes:
        name: as in the results.
        dim, heads, hidden: widths of the model.
        text, image: valid tokens of every sample.
        text_length, image_length: what texts and images are padded to.
    """

    name: str
    dim: int
    heads: int
    hidden: int
    text: tuple[int, ...]
    image: tuple[int, ...]
    text_length: int
    image_length: int

    @property
    def length(self) -> int:
        return self.text_length + self.image_length

    @property
    def batch(self) -> int:
        return len(self.text)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of every sample."""
        return [t + i for t, i in zip(self.text, self.image, strict=True)]

    @property
    def tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(self.lengths)

    def layout(self, device: str) -> ModalityLayout:
        """The plan, with positions as the padded model counts them."""
        starts = {"text": 0, "image": self.text_length}
        layout = ModalityLayout.from_lengths(
            {"text": list(self.text), "image": list(self.image)}, starts=starts, device=device
        )
        return layout

    def mask(self, device: str) -> torch.Tensor:
        """Bool `[B, N]`, true for real tokens."""
        lengths = torch.tensor([self.text, self.image]).t()
        text = torch.arange(self.text_length) < lengths[:, :1]
        image = torch.arange(self.image_length) < lengths[:, 1:]
        return torch.cat([text, image], dim=1).to(device)


def _texts(count: int, low: int, high: int) -> tuple[int, ...]:
    draw = random.Random(0)
    return tuple(draw.randint(low, high) for _ in range(count))


_PAIRS = 16
_MIXED_TEXTS = _texts(18, 12, 40)
CASES = {
    case.name: case
    for case in (
        # A text of 12 to 40 tokens padded to 40, an image of 197 tokens.
        Case("vlmo_base_pairs16", 768, 12, 3072, _texts(_PAIRS, 12, 40), (197,) * _PAIRS, 40, 197),
        # A third images, a third texts, a third pairs, all padded to 237.
        Case(
            "vlmo_base_mixed18",
            768,
            12,
            3072,
            (0,) * 6 + _MIXED_TEXTS[6:],
            (197,) * 6 + (0,) * 6 + (197,) * 6,
            40,
            197,
        ),  # fmt: skip
        # What fills a large GPU.
        Case("vlmo_base_pairs64", 768, 12, 3072, _texts(64, 12, 40), (197,) * 64, 40, 197),
        Case("vlmo_large_pairs64", 1024, 16, 4096, _texts(64, 12, 40), (197,) * 64, 40, 197),
        Case(
            "vlmo_base_mixed96",
            768,
            12,
            3072,
            (0,) * 32 + _texts(64, 12, 40),
            (197,) * 32 + (0,) * 32 + (197,) * 32,
            40,
            197,
        ),  # fmt: skip
        Case("smoke", 64, 4, 256, (3, 7, 1, 8), (17, 17, 17, 17), 8, 17),
    )
}
DEFAULT = ("vlmo_base_pairs16", "vlmo_base_mixed18")
DEFAULT_GPU = ("vlmo_base_pairs64", "vlmo_base_mixed96", "vlmo_large_pairs64")


@dataclass
class Batch:
    """Tensors of a case. `rows` is packed row to flat padded token."""

    case: Case
    layout: ModalityLayout
    mask: torch.Tensor
    rows: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    bias: torch.Tensor

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        """`[B, N, ...]` to the packed order."""
        return padded.flatten(0, 1)[self.rows]

    def padded(self, packed: torch.Tensor) -> torch.Tensor:
        """Packed to `[B, N, ...]`, zero where there is padding."""
        out = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        out[self.rows] = packed
        return out.view(*self.mask.shape, *packed.shape[1:])


def make_batch(case: Case, device: str, dtype: torch.dtype) -> Batch:
    """Random tensors; the same ones on every machine for one dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    layout = case.layout(device)
    rows = layout.sample_of_row.long() * case.length + layout.positions.long()
    # The bias is looked up in a table that all layers share, so no contestant pays for that here.
    bias = draw(case.heads, case.length, case.length)
    return Batch(
        case, layout, case.mask(device), rows, draw(layout.tokens, case.dim), draw(layout.tokens, case.dim), bias
    )
