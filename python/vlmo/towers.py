"""What the paper argues against, from the layers of VLMo itself: separate encoders, and fusion without experts.

One number tells three architectures apart, how many of the layers see image and text together:

    none    a dual encoder trained by contrast alone (CLIP, Radford et al. 2021; ALIGN, Jia et al. 2021)
    all     a fusion encoder with one FFN for all tokens (ViLT, Kim et al. 2021)
    some    separate encoders under a fusion encoder, with all three losses (ALBEF, Li et al. 2021; without its
            momentum teacher, and with self-attention over both where ALBEF has cross-attention)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import counter
from .config import VLMoConfig
from .data import Batch
from .masking import mask_words
from .model import VLMo
from .objectives import WEIGHTS, contrastive_loss, sample_negatives
from .tokenizer import Tokenizer


@dataclass
class Encoded:
    """Image and text before the fusion layers, [B, w*w + 1, dim] and [B, max_text_len, dim], and where there are
    encoders their unit vectors [B, dim]."""

    image: Tensor
    text: Tensor
    image_vector: Tensor | None = None
    text_vector: Tensor | None = None


class Towers(nn.Module):
    """Two encoders of `config.depth - fusion_layers` layers under `fusion_layers` layers of fusion.

    Args:
        config: width, input sizes, and the number of layers an image or a text passes. Experts are not used: an
            encoder has the FFN of its modality alone, the fusion layers have one for all tokens.
        fusion_layers: 0 to config.depth.
    """

    def __init__(self, config: VLMoConfig, fusion_layers: int) -> None:
        super().__init__()
        if not 0 <= fusion_layers <= config.depth:
            raise ValueError(f"Towers: fusion_layers must lie in 0..depth={config.depth}, got {fusion_layers}.")
        self.config = config
        encoder_layers = config.depth - fusion_layers
        self.image = self.text = self.fusion = None
        if encoder_layers:
            encoder = replace(config, depth=encoder_layers, vlffn_start=encoder_layers, heads=("irtr",))
            self.image, self.text = VLMo(encoder), VLMo(encoder)
        if fusion_layers:
            self.fusion = VLMo(replace(config, depth=fusion_layers, vlffn_start=0, heads=("itm", "mlm")))

    # ------------------------------------------------------------------ passes

    def image_vectors(self, image: Tensor) -> Tensor:
        """Unit vectors [B, dim]."""
        return self.image.infer_image_ft(image).itc_feats

    def text_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, dim]."""
        return self.text.infer_text_ft(ids, mask).itc_feats

    def encode(self, image: Tensor, ids: Tensor, mask: Tensor) -> Encoded:
        """What the fusion layers begin with."""
        if self.image is None:
            return Encoded(self.fusion.embed_image(image), self.fusion.embed_text(ids))
        seen, read = self.image.infer_image_ft(image), self.text.infer_text_ft(ids, mask)
        return Encoded(seen.image_feats, read.text_feats, seen.itc_feats, read.itc_feats)

    def fuse(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, max_text_len + w*w + 1, dim] after fusion, text first."""
        model = self.fusion
        everything = F.pad(mask, (0, image.shape[1]), value=True)
        biases = model.position_biases(model.text_imag_relative_position_index)
        x = torch.cat([text, image], dim=1)
        return model.transformer.norm(model.transformer(x, everything, "vl", biases, 0, model.config.depth))

    def match(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-odds [B] that image and text belong together; with fusion layers only."""
        encoded = self.encode(image, ids, mask)
        logits = self.fusion.itm_score(self.fusion.pooler(self.fuse(encoded.image, encoded.text, mask)))
        return logits[:, 1] - logits[:, 0]

    def joint(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Features of a pair for a classifier. Without fusion layers: both vectors and their product, [B, 3 * dim];
        else the pooled first token, [B, dim]."""
        encoded = self.encode(image, ids, mask)
        if self.fusion is None:
            seen, read = encoded.image_vector, encoded.text_vector
            return torch.cat([seen, read, seen * read], dim=1)
        return self.fusion.pooler(self.fuse(encoded.image, encoded.text, mask))

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Batch, tokenizer: Tokenizer, seed: int, step: int) -> dict[str, Tensor]:
        """ITC where there are encoders, ITM and MLM where there is fusion, weighted as in VLMo; "loss" is the sum."""
        encoded, size, losses = self.encode(batch.image, batch.text_ids, batch.text_mask), len(batch), {}
        # Without encoders nobody knows which negatives are hard: every other sample is as likely.
        to_text = to_image = torch.zeros(size, size)
        if self.image is not None:
            losses["itc"], to_text, to_image = contrastive_loss(
                encoded.image_vector, encoded.text_vector, self.image.logit_scale
            )
        if self.fusion is not None:
            losses["itm"] = self._matching(encoded, batch, to_text.detach(), to_image.detach(), seed, step)
            losses["mlm"] = self._words(encoded.image, batch, tokenizer, seed, step)
        losses["loss"] = sum(WEIGHTS[name] * value for name, value in losses.items())
        return losses

    def _matching(
        self, encoded: Encoded, batch: Batch, to_text: Tensor, to_image: Tensor, seed: int, step: int
    ) -> Tensor:
        """Every right pair, every text with a wrong image, every image with a wrong text."""
        index, mask = batch.index, batch.text_mask
        images, texts = (
            sample_negatives(logits, index, index, counter.key(seed, step, f"negative {what}"))
            for logits, what in ((to_image, "image"), (to_text, "text"))
        )
        image = torch.cat([encoded.image, encoded.image[images], encoded.image])
        text = torch.cat([encoded.text, encoded.text, encoded.text[texts]])
        pooled = self.fusion.pooler(self.fuse(image, text, torch.cat([mask, mask, mask[texts]])))
        labels = torch.zeros(len(image), dtype=torch.int64)
        labels[: len(batch)] = 1
        return F.cross_entropy(self.fusion.itm_score(pooled).float(), labels)

    def _words(self, image: Tensor, batch: Batch, tokenizer: Tokenizer, seed: int, step: int) -> Tensor:
        hidden = mask_words(batch, tokenizer, seed, step)
        if self.text is None:
            text = self.fusion.embed_text(hidden.ids)
        else:
            text = self.text.infer_text_ft(hidden.ids, batch.text_mask).text_feats
        x = self.fuse(image, text, batch.text_mask)[hidden.sample, hidden.position]
        return F.cross_entropy(self.fusion.mlm_score(x).float(), hidden.label)
