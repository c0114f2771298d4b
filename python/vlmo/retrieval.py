"""Retrieval: embeddings by the dual encoder, recall, re-ranking by the fusion encoder (paper section 3.4)."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .data import Report, decode, read_records
from .model import VLMo
from .sources import Source
from .tokenizer import Tokenizer

RANKS = (1, 5, 10)
_CHUNK = 1024  # rows of similarities at a time


@dataclass
class Gallery:
    """Images and texts to retrieve from each other, in memory.

    pixels: uint8 [I, 3, S, S]. text_ids, text_mask: [T, L], int64 and bool. picture_of_text: int64 [T], the row of
    `pixels` that text belongs to. names: of the images. captions: the texts.
    """

    pixels: Tensor
    text_ids: Tensor
    text_mask: Tensor
    picture_of_text: Tensor
    names: list[str]
    captions: list[str]


@dataclass
class Embeddings:
    """Unit vectors, fp32: images [I, D] and texts [T, D] (either may have no rows), and what they are of."""

    images: Tensor
    texts: Tensor
    picture_of_text: Tensor
    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """A .safetensors or .npz file."""
        path = Path(path)
        tensors = {"images": self.images, "texts": self.texts, "picture_of_text": self.picture_of_text}
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, path, {"names": json.dumps(self.names), "captions": json.dumps(self.captions)})
        elif path.suffix == ".npz":
            import numpy as np

            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(path, **arrays, names=np.array(self.names, str), captions=np.array(self.captions, str))
        else:
            raise ValueError(f"Embeddings.save: the file must be .safetensors or .npz, got '{path}'.")

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """What `save` wrote; nothing in the file is executed."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Embeddings.load: the file must exist, got '{path}'.")
        if path.suffix == ".npz":
            import numpy as np

            try:
                with np.load(path, allow_pickle=False) as arrays:
                    tensors = [torch.from_numpy(arrays[name]) for name in ("images", "texts", "picture_of_text")]
                    return cls(*tensors, arrays["names"].tolist(), arrays["captions"].tolist())
            except (KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(_not_embeddings(path, error)) from error
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(name) for name in ("images", "texts", "picture_of_text")]
                texts = file.metadata()
            return cls(*tensors, json.loads(texts["names"]), json.loads(texts["captions"]))
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(_not_embeddings(path, error)) from error


def _not_embeddings(path: Path, error: Exception) -> str:
    return f"Embeddings.load: the file must be of `vlmo embed`, '{path}' is not: {error}."


def read_gallery(
    source: Source, tokenizer: Tokenizer, image_size: int, max_text_len: int, texts: bool = True
) -> tuple[Gallery, Report]:
    """All good samples of a source in order; an image of several captions once. texts=False: the images alone."""
    report = Report()
    pixels, names, captions, owner = [], [], [], []
    rows: dict[int, int] = {}
    for record in read_records(source, range(source.num_shards), report):
        known = record.picture in rows
        use = "images" if not texts else "texts" if known else "pairs"
        sample = None if known and not texts else decode(record, use, image_size, report)
        if sample is None:
            continue
        if not known:
            rows[record.picture] = len(pixels)
            pixels.append(sample[1].add(1).mul(127.5).round().to(torch.uint8))
            names.append(record.name)
        if texts:
            captions.append(record.caption)
            owner.append(rows[record.picture])
    if not pixels:
        raise ValueError(f"retrieval: the source must hold a good sample: {'; '.join(report.lines())}.")
    before = tokenizer.num_truncated
    ids, mask, _ = tokenizer.encode_batch(captions, max_text_len)
    report.truncated_captions = tokenizer.num_truncated - before
    return Gallery(torch.stack(pixels), ids, mask, torch.tensor(owner, dtype=torch.int64), names, captions), report


def to_float(pixels: Tensor) -> Tensor:
    """uint8 to the model's [-1, 1], fp32."""
    return pixels.float().div(127.5).sub(1.0)


@torch.no_grad()
def embed_images(model: VLMo, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """uint8 [I, 3, S, S] to unit vectors fp32 [I, dim] on the CPU: image expert only."""
    parts = [
        model.infer_image_ft(to_float(chunk.to(_device(model)))).itc_feats.float().cpu()
        for chunk in pixels.split(batch_size)
        if len(chunk)
    ]
    return torch.cat([torch.empty(0, model.config.dim), *parts])


@torch.no_grad()
def embed_texts(model: VLMo, text_ids: Tensor, text_mask: Tensor, batch_size: int = 256) -> Tensor:
    """Ids [T, L] to unit vectors fp32 [T, dim] on the CPU: text expert only."""
    device = _device(model)
    parts = [
        model.infer_text_ft(ids.to(device), mask.to(device)).itc_feats.float().cpu()
        for ids, mask in zip(text_ids.split(batch_size), text_mask.split(batch_size))
        if len(ids)
    ]
    return torch.cat([torch.empty(0, model.config.dim), *parts])


def embed(model: VLMo, gallery: Gallery, batch_size: int = 64) -> Embeddings:
    """Every image and every text of a gallery once: I + T passes for I * T similarities."""
    return Embeddings(
        embed_images(model, gallery.pixels, batch_size),
        embed_texts(model, gallery.text_ids, gallery.text_mask, batch_size),
        gallery.picture_of_text,
        gallery.names,
        gallery.captions,
    )


def search(queries: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores fp32 and rows int64, both [Q, k], of the k best of `index` [N, D] for every query [Q, D], best first.

    k is cut to N. The similarities are computed in pieces of 1024 x N.
    """
    if queries.ndim != 2 or index.ndim != 2 or queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"search: queries and index must be [Q, D] and [N, D], got {list(queries.shape)} and {list(index.shape)}."
        )
    k = min(k, len(index))
    found = [(chunk @ index.T).topk(k, dim=1) for chunk in queries.split(_CHUNK)]
    if not found:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def recall(images: Tensor, texts: Tensor, picture_of_text: Tensor) -> dict[str, float]:
    """t2i_r1, _r5, _r10, i2t_r1, _r5, _r10, each in [0, 1].

    images: [I, D]. texts: [T, D]. picture_of_text: int64 [T]. Text to image: the share of texts whose image is among
    the k most similar. Image to text: the share of images (with a text) of which a text is among the k most similar.
    A wrong candidate that is exactly as similar counts as more similar, so a model that maps everything to one
    vector has recall 0, not 1; so does one that gives NaN.
    """
    if len(texts) == 0 or len(images) == 0:
        raise ValueError(f"recall: there must be images and texts, got {len(images)} and {len(texts)}.")
    ranks = []
    for texts_part, right in zip(texts.split(_CHUNK), picture_of_text.split(_CHUNK)):
        scores = texts_part @ images.T
        own = scores.gather(1, right[:, None])
        ranks.append((~(scores < own)).sum(1) - 1)  # NaN is less than nothing, so it counts as wrong
    result = {f"t2i_r{k}": _share(torch.cat(ranks) < k) for k in RANKS}
    ranks = []
    for start in range(0, len(images), _CHUNK):
        scores = images[start : start + _CHUNK] @ texts.T
        own = picture_of_text[None] == torch.arange(start, start + len(scores))[:, None]
        best = scores.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
        ranks.append((~(scores < best) & ~own).sum(1)[own.any(1)])
    return result | {f"i2t_r{k}": _share(torch.cat(ranks) < k) for k in RANKS}


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


@torch.no_grad()
def match_scores(model: VLMo, gallery: Gallery, images: Tensor, texts: Tensor, batch_size: int = 64) -> Tensor:
    """Log-odds fp32 [P] that image `images[p]` and text `texts[p]` (rows of the gallery) match: P fusion passes."""
    if "itm" not in model.config.heads:
        raise ValueError(
            f"match_scores: config.heads must have 'itm', it is {model.config.heads}. Hint: re-ranking needs the "
            "fusion encoder and its matching head, as pre-training leaves them."
        )
    device, scores = _device(model), []
    for i, t in zip(images.split(batch_size), texts.split(batch_size)):
        if len(i) == 0:
            continue
        out = model.infer(
            to_float(gallery.pixels[i].to(device)), gallery.text_ids[t].to(device), gallery.text_mask[t].to(device)
        )
        logits = model.itm_score(out.cls_feats).float().cpu()
        scores.append(logits[:, 1] - logits[:, 0])
    return torch.cat([torch.empty(0), *scores])


def rerank(
    model: VLMo, gallery: Gallery, embeddings: Embeddings, k: int = 16, batch_size: int = 64
) -> dict[str, float]:
    """Recall as `recall`, after the fusion encoder has put the k best of every query in a new order.

    The k best come from the dual encoder, so (I + T) * k fusion passes instead of I * T. k must be at least 10.
    """
    if k < max(RANKS):
        raise ValueError(f"rerank: k must be at least {max(RANKS)}, got {k}. Hint: recall@{max(RANKS)} is reported.")
    queries = torch.arange(len(embeddings.texts))
    found = search(embeddings.texts, embeddings.images, k)[1]
    found = _reordered(model, gallery, found, found.flatten(), queries.repeat_interleave(found.shape[1]), batch_size)
    right = found == gallery.picture_of_text[:, None]
    result = {f"t2i_r{n}": _share(right[:, :n].any(1)) for n in RANKS}
    has_text = torch.zeros(len(embeddings.images), dtype=torch.bool).index_fill(0, gallery.picture_of_text, True)
    queries = has_text.nonzero().flatten()
    found = search(embeddings.images[queries], embeddings.texts, k)[1]
    found = _reordered(model, gallery, found, queries.repeat_interleave(found.shape[1]), found.flatten(), batch_size)
    right = gallery.picture_of_text[found] == queries[:, None]
    return result | {f"i2t_r{n}": _share(right[:, :n].any(1)) for n in RANKS}


def _reordered(model: VLMo, gallery: Gallery, found: Tensor, images: Tensor, texts: Tensor, batch_size: int) -> Tensor:
    scores = match_scores(model, gallery, images, texts, batch_size).view(found.shape)
    return found.gather(1, scores.argsort(dim=1, descending=True, stable=True))


def _device(model: VLMo) -> torch.device:
    return model.transformer.cls_token.device
