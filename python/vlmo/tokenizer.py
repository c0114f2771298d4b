"""BERT WordPiece for VLMo: from a user's vocab.txt, or trained here on captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmo_kernels import demo_data

from .snapshots import write_atomically

if TYPE_CHECKING:
    import tokenizers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Tokenizer:
    """Lower-case BERT WordPiece. Make one by `Tokenizer.load` or `Tokenizer.train`.

    pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens. vocab_size: pieces, special ones included.
    num_truncated: texts that `encode_batch` had to cut so far.
    """

    def __init__(self, wordpiece: tokenizers.Tokenizer) -> None:
        self._wordpiece = wordpiece
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(wordpiece.token_to_id, SPECIAL)
        pieces = wordpiece.get_vocab()
        self.vocab_size = max(pieces.values()) + 1
        self._begins_word = torch.ones(self.vocab_size, dtype=torch.bool)
        self._begins_word[[index for piece, index in pieces.items() if piece.startswith("##")]] = False
        self._begins_word[[self.pad_id, self.cls_id, self.sep_id]] = False
        self.num_truncated = 0

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """From a vocabulary file, one piece a line, as BERT's vocab.txt (ids are line numbers)."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"Tokenizer: the vocabulary must exist, got '{path}'. Hint: --vocab vocab.txt.")
        return cls(demo_data.load_vocab(path))

    @classmethod
    def train(cls, captions: Sequence[str], vocab_size: int) -> Tokenizer:
        """From captions; the same captions give the same ids. Every letter of them gets a piece."""
        return cls(demo_data.train_wordpiece(captions, vocab_size))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary, for `load`."""
        pieces = self._wordpiece.get_vocab()
        write_atomically(Path(path), "".join(piece + "\n" for piece in sorted(pieces, key=pieces.get)))

    def encode_batch(self, texts: Sequence[str], max_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids int64, mask bool, word_starts bool), each [B, max_len]: [CLS] pieces [SEP], then [PAD].

        mask: true on everything but [PAD]. word_starts: true where a word begins; a word goes on while it is false,
        up to the next true or [SEP]. It is false on [CLS], [SEP] and [PAD]. Longer texts lose their last pieces and
        are counted in `num_truncated`. No text may be empty of pieces here; `vlmo.data` drops such captions.
        """
        if isinstance(texts, str):
            raise TypeError("Tokenizer.encode_batch: texts must be a sequence of strings, got one string.")
        if max_len < 3:
            raise ValueError(f"Tokenizer.encode_batch: max_len must be at least 3 ([CLS] and [SEP]), got {max_len}.")
        ids = torch.full((len(texts), max_len), self.pad_id, dtype=torch.int64)
        lengths = torch.empty(len(texts), dtype=torch.int64)
        for row, encoding in enumerate(self._wordpiece.encode_batch(list(texts), add_special_tokens=False)):
            pieces = encoding.ids
            self.num_truncated += len(pieces) > max_len - 2
            tokens = [self.cls_id, *pieces[: max_len - 2], self.sep_id]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            lengths[row] = len(tokens)
        return ids, torch.arange(max_len) < lengths[:, None], self._begins_word[ids]

    def decode(self, ids: Tensor) -> str:
        """One row of ids as text, without the special tokens."""
        return self._wordpiece.decode(ids.tolist())
