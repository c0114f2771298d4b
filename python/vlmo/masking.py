"""What the masked objectives hide: whole words of a text, patches of an image. Drawn on the host, by counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import counter
from .data import Batch
from .devices import move
from .tokenizer import Tokenizer

WORD_RATE = 0.15
PATCH_RATE = 0.4


@dataclass(frozen=True)
class MaskedText:
    """ids: int64 [B, L], with tokens hidden. sample, position, label: int64 [M], where, and what stood there."""

    ids: Tensor
    sample: Tensor
    position: Tensor
    label: Tensor

    def to(self, device: torch.device | str) -> MaskedText:
        return MaskedText(*(move(t, device) for t in (self.ids, self.sample, self.position, self.label)))


def mask_words(batch: Batch, tokenizer: Tokenizer, seed: int, step: int, rate: float = WORD_RATE) -> MaskedText:
    """Whole-word masking (paper section 3.3; BERT): of the hidden tokens 80 % become [MASK], 10 % any token, 10 % stay.

    Words are taken in random order as long as at most `rate` of the sample's tokens are hidden, one word at
    least. [CLS], [SEP] and [PAD] are never hidden.
    """
    ids, starts, index = batch.text_ids, batch.word_starts, batch.index[:, None]
    length = ids.shape[1]
    inner = batch.text_mask & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
    word = (starts & inner).cumsum(1) * inner  # from 1; 0 is no word
    column = torch.arange(length + 1)[None]
    sizes = torch.zeros(len(ids), length + 1, dtype=torch.int64).scatter_add_(1, word, inner.long())
    sizes[:, 0] = 0
    draws = counter.uniform(counter.key(seed, step, "word"), index, column)
    order = draws.masked_fill(sizes == 0, 2.0).argsort(1)
    hidden_so_far = sizes.gather(1, order).cumsum(1)
    budget = (rate * inner.sum(1, keepdim=True)).round()
    taken = (hidden_so_far <= budget) | (column == 0)
    chosen = torch.zeros(taken.shape, dtype=torch.bool).scatter_(1, order, taken)
    hidden = chosen.gather(1, word) & inner

    column = column[:, :length]
    fate = counter.uniform(counter.key(seed, step, "mask"), index, column)
    other = (counter.uniform(counter.key(seed, step, "token"), index, column) * tokenizer.vocab_size).long()
    masked = torch.where(fate < 0.8, tokenizer.mask_id, torch.where(fate < 0.9, other, ids))
    sample, position = hidden.nonzero().unbind(1)
    return MaskedText(torch.where(hidden, masked, ids), sample, position, ids[sample, position])


def mask_patches(index: Tensor, patches: int, seed: int, step: int, rate: float = PATCH_RATE) -> Tensor:
    """int64 [B, round(rate * patches)]: hidden patches of every image, each set of them equally likely.

    BEiT (Bao et al. 2021) hides 40 % as well, in blocks; SimMIM (Xie et al. 2021) found single ones as good.
    """
    draws = counter.uniform(counter.key(seed, step, "patch"), index[:, None], torch.arange(patches)[None])
    return draws.argsort(1)[:, : max(1, round(rate * patches))]
