"""Batches of images and texts: what the model and the trainer take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vlmo_kernels.demo_data import image_tensor

from .tokenizer import Tokenizer


@dataclass
class Batch:
    """B samples; None where they have no image or no text.

    image: float32 [B, 3, S, S] in [-1, 1] (mean 0.5, std 0.5). text_ids: int64 [B, max_text_len].
    text_mask: bool [B, max_text_len], true on tokens. index: int64 [B], the number of each sample in its data set,
    the same for every division over processes. word_starts: bool [B, max_text_len], see `Tokenizer.encode_batch`.
    """

    image: Tensor | None
    text_ids: Tensor | None
    text_mask: Tensor | None
    index: Tensor
    word_starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        values = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if v is None else v.to(device, non_blocking=non_blocking) for v in values))


def collate(
    images: Sequence[object] | None,
    captions: Sequence[str] | None,
    index: Sequence[int],
    tokenizer: Tokenizer | None,
    image_size: int,
    max_text_len: int,
) -> Batch:
    """PIL images and captions (either may be None) as a batch. `image_size` and `max_text_len` are the model's."""
    image = None if images is None else torch.stack([image_tensor(picture, image_size) for picture in images])
    ids = mask = starts = None
    if captions is not None:
        ids, mask, starts = tokenizer.encode_batch(captions, max_text_len)
    return Batch(image, ids, mask, torch.tensor(index, dtype=torch.int64), starts)
