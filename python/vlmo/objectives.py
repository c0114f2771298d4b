"""The objectives of the three stages: what one step computes (paper section 3.3).

vision             masked image modelling ("mim"): the pixels of hidden patches
language           masked language modelling on texts alone ("mlm")
vision-language    image-text contrast ("itc"), image-text matching ("itm"), masked language modelling with the
                   image in view ("mlm", weight 0.25)

BEiT predicts visual tokens of a separately trained dVAE. Here the target is the pixels themselves, by L1, as in
SimMIM (Xie et al. 2021): no second network. They are not normalised patch by patch, which would take away the
colour of a plain patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import counter
from .config import VLMoConfig
from .data import Batch
from .devices import move
from .distributed import gather, gather_with_grad, global_mean, rank
from .masking import MaskedText, mask_patches, mask_words
from .model import VLMo
from .packed import Plan, encode, make_plan
from .tokenizer import Tokenizer

STAGES = ("vision", "language", "vision-language")
WEIGHTS = {"mim": 1.0, "itc": 1.0, "itm": 1.0, "mlm": 0.25}
# Samples of one step differ in what DropPath and dropout draw, also where they are of one picture.
_ROLES = ("text", "mlm", "pair", "image", "text vl", "image vl", "negative image", "negative text")


@dataclass(frozen=True)
class Inputs:
    """A batch made ready for one step: masked, planned, and on the device of the model.

    patches: int64 [B, K], hidden patches, in the vision stage. masked: the hidden words, in the others.
    """

    batch: Batch
    seed: int
    step: int
    plan: Plan
    masked: MaskedText | None = None
    patches: Tensor | None = None


def prepare(
    stage: str, batch: Batch, config: VLMoConfig, tokenizer: Tokenizer | None, seed: int, step: int,
    device: torch.device | str = "cpu",
) -> Inputs:  # fmt: skip
    """Mask and plan a batch on the host, then move everything to the device."""
    size, masked, patches = len(batch), None, None
    if stage == "vision":
        patches = mask_patches(batch.index, config.window**2, seed, step)
        # [CLS] stands before the patches.
        read = torch.arange(size).repeat_interleave(patches.shape[1]), patches.flatten() + 1
        plan, patches = make_plan(config, None, images=size, read=read), move(patches, device)
        batch = Batch(batch.image, None, None, batch.index)
    else:
        masked = mask_words(batch, tokenizer, seed, step)
        if stage == "language":
            plan = make_plan(config, batch.text_mask, read=(masked.sample, masked.position))
            batch = Batch(None, batch.text_ids, batch.text_mask, batch.index)
        else:
            each = torch.arange(size)
            # Embedded once: B clean texts, B masked texts, B images. Passed on: text alone, image and masked
            # text, image and text, image alone.
            plan = make_plan(
                config, batch.text_mask.repeat(3, 1), pairs=2 * size, images=size, copies=True,
                text_of=torch.cat([each, size + each, each]), image_of=each.repeat(3), num_texts=2 * size,
                read=(size + masked.sample, masked.position),
            )  # fmt: skip
        masked = masked.to(device)
    return Inputs(batch.to(device), seed, step, plan.to(device), masked, patches)


class PixelHead(nn.Module):
    """The vision stage's own parameters: [MASK] of a patch, and a linear map to pixels. Thrown away after it."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.decoder = nn.Linear(config.dim, config.in_channels * config.patch_size**2)
        nn.init.normal_(self.mask_token, std=config.init_std)
        nn.init.normal_(self.decoder.weight, std=config.init_std)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


class Pretraining(nn.Module):
    """A model and the objectives of one stage; `forward` gives the losses of one step.

    Args:
        model: trained in place.
        stage: one of STAGES.
        recompute: activation checkpointing, block by block.
        impl: "auto", "triton", "cpu" or "reference".
    """

    def __init__(self, model: VLMo, stage: str, recompute: bool = False, impl: str = "auto") -> None:
        super().__init__()
        if stage not in STAGES:
            raise ValueError(f"Pretraining: stage must be one of {STAGES}, got {stage!r}.")
        needed = {"vision": (), "language": ("mlm",), "vision-language": ("mlm", "itm", "itc")}[stage]
        missing = [head for head in needed if head not in model.config.heads]
        if missing:
            raise ValueError(
                f"Pretraining: config.heads must have {needed} in the {stage} stage, {missing} are missing."
            )
        if stage == "vision-language" and model.config.vlffn_start == model.config.depth:
            raise ValueError(
                "Pretraining: the vision-language stage needs vision-language experts, config.vlffn_start is the depth "
                f"{model.config.depth}. Hint: stage_config(CONFIGS[...], 'vision-language')."
            )
        self.model, self.stage, self.recompute, self.impl = model, stage, recompute, impl
        self.pixels = PixelHead(model.config) if stage == "vision" else None

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        """`loss`, its parts, and without gradient the accuracies: 0-dimensional, of this process's samples."""
        if self.stage == "vision":
            losses = self._vision(inputs)
        elif self.stage == "language":
            losses = self._language(inputs)
        else:
            losses = self._vision_language(inputs)
        weights = WEIGHTS if self.stage == "vision-language" else {"mim": 1.0, "mlm": 1.0}
        losses["loss"] = sum(weights[name] * value for name, value in losses.items() if name in weights)
        return losses

    # ------------------------------------------------------------------ stages

    def _vision(self, inputs: Inputs) -> dict[str, Tensor]:
        model, image, hidden = self.model, inputs.batch.image, inputs.patches
        size = model.config.patch_size
        hide = torch.zeros(len(hidden), model.config.window**2, dtype=torch.bool, device=hidden.device)
        x = model.embed_image(image, hide=hide.scatter_(1, hidden, True), mask_token=self.pixels.mask_token)
        x = self._encode(inputs, inputs.plan, None, x, inputs.batch.index, [("image", "image")])
        sample = torch.arange(len(hidden), device=hidden.device)[:, None]
        predicted = self.pixels(self._at(x, inputs.plan.rows(sample, hidden + 1).flatten()))
        target = F.unfold(image, size, stride=size).transpose(1, 2)[sample, hidden].flatten(0, 1)
        error = (_wide(predicted) - target).abs()
        return {"mim": global_mean(error.sum(), error.numel())}

    def _language(self, inputs: Inputs) -> dict[str, Tensor]:
        batch, masked = inputs.batch, inputs.masked
        text = self._embed_text(inputs, masked.ids, batch.index, "mlm")
        x = self._encode(inputs, inputs.plan, text, None, batch.index, [("mlm", "mlm")])
        return self._mlm(x, inputs.plan.rows(masked.sample, masked.position), masked)

    def _vision_language(self, inputs: Inputs) -> dict[str, Tensor]:
        model, batch, masked, plan = self.model, inputs.batch, inputs.masked, inputs.plan
        clean = self._embed_text(inputs, batch.text_ids, batch.index, "text")
        text = torch.cat([clean, self._embed_text(inputs, masked.ids, batch.index, "mlm")])
        image = model.embed_image(batch.image)
        roles = [("text", "text"), ("mlm", "mlm"), ("pair", "pair")]
        copies = [("", "text vl"), ("", "image vl"), ("image", "image")]
        x = self._encode(inputs, plan, text, image, batch.index, roles + copies)
        # A class token of every kind, through one final norm.
        size = len(batch)
        groups = (plan.text_cls(), plan.image_cls(), plan.text_vl_cls(), plan.image_vl_cls(), plan.pair_cls()[size:])
        cls_text, cls_image, vl_text, vl_image, cls_pair = self._at(x, torch.cat(groups)).split(size)

        losses = self._mlm(x, plan.rows(size + masked.sample, masked.position), masked)
        contrast, to_text, to_image = contrastive_loss(
            model.itc_image_proj(cls_image), model.itc_text_proj(cls_text), model.logit_scale
        )
        contrast_vl, _, _ = contrastive_loss(
            model.itc_vl_image_proj(vl_image), model.itc_vl_text_proj(vl_text), model.logit_vl_scale
        )
        losses["itc"] = (contrast + contrast_vl) / 2
        with torch.no_grad():
            own = torch.arange(size, device=to_text.device) + rank() * size
            losses["itc_accuracy"] = (to_text.argmax(1) == own).float().mean()
        return losses | self._matching(inputs, clean, image, cls_pair, to_text, to_image)

    # ------------------------------------------------------------------ objectives

    def _mlm(self, x: Tensor, rows: Tensor, masked: MaskedText) -> dict[str, Tensor]:
        logits = _wide(self.model.mlm_score(self._at(x, rows)))
        total = F.cross_entropy(logits, masked.label, reduction="sum")
        right = (logits.argmax(1) == masked.label).to(total.dtype).sum()
        loss, accuracy = global_mean(torch.stack([total, right]), masked.label.numel()).unbind()
        return {"mlm": loss, "mlm_accuracy": accuracy.detach()}

    def _matching(
        self, inputs: Inputs, text: Tensor, image: Tensor, cls_pair: Tensor, to_text: Tensor, to_image: Tensor
    ) -> dict[str, Tensor]:
        """One hard negative image for every text and one hard negative text for every image, of all processes."""
        model, batch = self.model, inputs.batch
        index, size = batch.index, len(batch)
        everyone = gather(index)
        if len(everyone) < 2:
            raise ValueError("Pretraining: a batch must have 2 samples or more, or nothing can be a negative; got 1.")
        image_key, text_key = (counter.key(inputs.seed, inputs.step, f"negative {m}") for m in ("image", "text"))
        other_image = sample_negatives(to_image, index, everyone, image_key)
        other_text = sample_negatives(to_text, index, everyone, text_key)
        images, ids, mask = gather(batch.image), gather(batch.text_ids), gather(batch.text_mask)
        text_mask = torch.cat([batch.text_mask, mask[other_text]])
        nothing = index.new_empty(0)
        plan = make_plan(model.config, text_mask, pairs=2 * size, read=(nothing, nothing))
        text = torch.cat([text, self._embed_text(inputs, ids[other_text], index, "negative text")])
        image = torch.cat([model.embed_image(images[other_image]), image])
        negatives = [("negative image", "negative image"), ("negative text", "negative text")]
        x = self._encode(inputs, plan, text, image, index, negatives)
        features = torch.cat([cls_pair, self._at(x, plan.pair_cls())])
        logits = _wide(model.itm_score(model.pooler(features[:, None])))
        labels = torch.zeros(3 * size, dtype=torch.int64, device=logits.device)
        labels[:size] = 1
        with torch.no_grad():
            accuracy = (logits.argmax(1) == labels).float().mean()
        return {"itm": F.cross_entropy(logits, labels), "itm_accuracy": accuracy}

    # ------------------------------------------------------------------ parts

    def _at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows of the packed buffer through the final norm, which the other rows do not need."""
        return self.model.transformer.norm(x.index_select(0, rows))

    def _draws(self, inputs: Inputs, purpose: str, index: Tensor, role: str, *counters: Tensor) -> Tensor:
        samples = (index * len(_ROLES) + _ROLES.index(role)).view(-1, *(1,) * len(counters))
        return counter.uniform(counter.key(inputs.seed, inputs.step, purpose), samples, *counters)

    def _embed_text(self, inputs: Inputs, ids: Tensor, index: Tensor, role: str) -> Tensor:
        embeddings = self.model.text_embeddings
        rate, scale = embeddings.dropout.p, None
        if self.training and rate > 0.0:
            column = torch.arange(ids.shape[1] * self.model.config.dim, device=ids.device)
            draws = self._draws(inputs, "dropout", index, role, column)
            scale = ((draws >= rate).float() / (1.0 - rate)).view(*ids.shape, -1)
        return self.model.embed_text(ids, dropout_scale=scale)

    def _encode(
        self, inputs: Inputs, plan: Plan, text: Tensor | None, image: Tensor | None, index: Tensor,
        roles: list[tuple[str, str]],
    ) -> Tensor:  # fmt: skip
        """roles: of the samples of every kind, below and from `vlffn_start` on; "" where they are not there."""
        drops = None
        if self.training and self.model.config.drop_path > 0.0:
            layer = torch.arange(self.model.config.depth, device=index.device)[:, None]
            branch = torch.arange(3, device=index.device)
            drops = tuple(
                torch.cat([self._draws(inputs, "drop path", index, r[top], layer, branch) for r in roles if r[top]])
                for top in (0, 1)
            )
        return encode(self.model, plan, text, image, drops=drops, recompute=self.recompute, impl=self.impl)


def _wide(t: Tensor) -> Tensor:
    """fp32 at least: what losses are computed in, whatever autocast made of the features."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image-text contrast over the batch of all processes (paper section 3.3; CLIP).

    image, text: [B, dim], unit vectors, the i-th of each belong together. logit_scale: logarithm of the inverse
    temperature. Returns the mean of both directions' losses for this process's samples, and their logits
    fp32 [B, world * B], image to text and text to image.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = _wide(image), _wide(text)
        scale = _wide(logit_scale).exp()
        to_text = scale * image @ gather_with_grad(text).T
        to_image = scale * text @ gather_with_grad(image).T
    own = torch.arange(len(image), device=image.device) + rank() * len(image)
    return (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2, to_text, to_image


@torch.no_grad()
def sample_negatives(logits: Tensor, index: Tensor, candidates: Tensor, key: int) -> Tensor:
    """For every row one candidate that is not itself, with probability softmax(logits); no host synchronisation.

    logits: [B, N]. index, candidates: int64 [B] and [N], sample numbers of rows and columns. key: of the draw.
    Gumbel noise (the largest of logit + noise is such a sample) follows from the two sample numbers, so the
    order of the candidates does not matter. Returns int64 [B], columns.
    """
    draws = counter.uniform(key, index[:, None], candidates[None]) + 2.0**-25
    noise = -torch.log(-torch.log(draws))
    # As published, 1e-5 keeps every candidate possible.
    scores = (logits.float().softmax(1) + 1e-5).log() + noise
    return scores.masked_fill(index[:, None] == candidates[None], float("-inf")).argmax(1)
