"""Eight photographs with captions for the demo, and what turns them into model inputs.

`captions.json` names the author, source and licence of every photograph. Pillow and tokenizers are imported
only where they are used, so importing this module needs torch alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

__all__ = ["encode", "image_tensor", "load_photos", "load_vocab", "photo_records", "train_wordpiece"]

_HERE = Path(__file__).parent
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_INSTALL = "Hint: pip install 'vlmo_kernels[demo]'."


def photo_records() -> list[dict[str, str]]:
    """The rows of `captions.json`: file, caption, title, author, source, licence, changes."""
    return json.loads((_HERE / "captions.json").read_text(encoding="utf-8"))


def load_photos() -> list[tuple[Image, str]]:
    """The photographs (RGB) with their captions, shortest caption first."""
    image_module = _pillow("load_photos")
    photos = []
    for record in photo_records():
        with image_module.open(_HERE / "photos" / record["file"]) as img:
            photos.append((img.convert("RGB"), record["caption"]))
    return photos


def image_tensor(img: Image, size: int) -> torch.Tensor:
    """`[3, size, size]` float32 in [-1, 1]: the shorter side resized to `size`, the centre cropped."""
    image_module = _pillow("image_tensor")
    if not isinstance(img, image_module.Image):
        raise TypeError(f"demo_data.image_tensor: img must be a PIL image, given {type(img).__name__}.")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"demo_data.image_tensor: size must be an int, given {type(size).__name__}.")
    if size < 1:
        raise ValueError(f"demo_data.image_tensor: size must be positive, given {size}.")
    img = img.convert("RGB")
    scale = size / min(img.size)
    width, height = (max(size, round(side * scale)) for side in img.size)
    img = img.resize((width, height), image_module.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    img = img.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(img.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).to(torch.float32).div(255.0).sub(0.5).div(0.5).contiguous()


def train_wordpiece(captions: Sequence[str], vocab_size: int) -> Tokenizer:
    """A lower-case BERT WordPiece tokenizer trained on `captions`, of at most `vocab_size` pieces.

    Every letter of the captions gets a piece, so nothing in them becomes `[UNK]`; ids of `[PAD]`, `[UNK]`,
    `[CLS]`, `[SEP]`, `[MASK]` are 0 to 4. The pairs are merged here because the trainer of tokenizers breaks
    ties at random: the same captions must give the same ids, or two runs of the demo are not the same run.
    """
    tokenizers = _tokenizers("train_wordpiece")
    captions = _captions("train_wordpiece", captions)
    split = _bert(tokenizers, tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    counts = Counter(
        word
        for caption in captions
        for word, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(caption))
    )
    spelled = {word: [word[0], *("##" + letter for letter in word[1:])] for word in counts}
    pieces = [*_SPECIAL, *sorted({piece for spelling in spelled.values() for piece in spelling})]
    if len(pieces) > vocab_size:
        raise ValueError(
            f"demo_data.train_wordpiece: vocab_size must hold the special tokens and every letter, "
            f"{len(pieces)} here, given {vocab_size}. Hint: a larger vocab_size."
        )
    known = set(pieces)
    while len(pieces) < vocab_size:
        pairs = Counter()
        for word, spelling in spelled.items():
            for pair in pairwise(spelling):
                pairs[pair] += counts[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = left + right.removeprefix("##")
        if merged not in known:
            known.add(merged)
            pieces.append(merged)
        spelled = {word: _merge(spelling, left, right, merged) for word, spelling in spelled.items()}
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return _bert(tokenizers, tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))


def load_vocab(path: str | Path) -> Tokenizer:
    """A lower-case BERT WordPiece tokenizer from a vocabulary file, one piece a line (BERT's `vocab.txt`)."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"demo_data.load_vocab: the vocabulary file must exist, given '{path}'. "
            "Hint: a BERT vocab.txt, or none to train one on the captions."
        )
    if not path.is_file():
        raise ValueError(f"demo_data.load_vocab: the vocabulary must be a file, given '{path}'.")
    try:
        pieces = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"demo_data.load_vocab: the file must be UTF-8 text, '{path}' is not.") from error
    vocab = {piece.strip(): index for index, piece in enumerate(pieces) if piece.strip()}
    missing = [token for token in _SPECIAL if token not in vocab]
    if missing:
        raise ValueError(
            f"demo_data.load_vocab: the vocabulary must hold {', '.join(_SPECIAL)}, '{path}' lacks "
            f"{', '.join(missing)}. Hint: one piece a line, as in BERT's vocab.txt."
        )
    tokenizers = _tokenizers("load_vocab")
    return _bert(tokenizers, tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))


def encode(tokenizer: Tokenizer, captions: Sequence[str], max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)`, both `[B, max_len]` int64: `[CLS] caption [SEP]`, cut to `max_len`, filled with `[PAD]`.

    `mask` is 1 on tokens and 0 on padding. The padding is what published models are run with, hence no
    shortening to the longest caption.
    """
    captions = _captions("encode", captions)
    if isinstance(max_len, bool) or not isinstance(max_len, int):
        raise TypeError(f"demo_data.encode: max_len must be an int, given {type(max_len).__name__}.")
    if max_len < 3:
        raise ValueError(
            f"demo_data.encode: max_len must have room for [CLS], a piece and [SEP], given {max_len}."
        )
    special = {token: tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")}
    missing = [token for token, index in special.items() if index is None]
    if missing:
        raise ValueError(f"demo_data.encode: the tokenizer must know {', '.join(missing)}.")
    ids = torch.full((len(captions), max_len), special["[PAD]"], dtype=torch.int64)
    mask = torch.zeros(len(captions), max_len, dtype=torch.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(captions, add_special_tokens=False)):
        tokens = [special["[CLS]"], *encoding.ids[: max_len - 2], special["[SEP]"]]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def _bert(tokenizers, model) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def _merge(spelling: list[str], left: str, right: str, merged: str) -> list[str]:
    out: list[str] = []
    for piece in spelling:
        if out and out[-1] == left and piece == right:
            out[-1] = merged
        else:
            out.append(piece)
    return out


def _captions(function: str, captions: Sequence[str]) -> list[str]:
    if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"demo_data.{function}: captions must be a sequence of strings.")
    if not captions:
        raise ValueError(f"demo_data.{function}: captions must not be empty.")
    return list(captions)


def _pillow(function: str):
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(f"demo_data.{function}: Pillow must be installed. {_INSTALL}") from error
    return Image


def _tokenizers(function: str):
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"demo_data.{function}: tokenizers must be installed. {_INSTALL}") from error
    return tokenizers
