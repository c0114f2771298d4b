"""VLMo (arXiv 2111.02358): one transformer as dual encoder and as fusion encoder, with its heads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ATTENTION, CONFIGS, VLMoConfig
from .heads import ITCHead, ITMHead, MLMHead, Pooler
from .position import (
    image_position_index,
    layer_position_biases,
    num_relative_positions,
    text_image_position_index,
    text_position_index,
)
from .transformer import MultiwayTransformer, TextEmbeddings


class VLMoOutput(NamedTuple):
    """What a pass returns; None where the pass has no such thing.

    A named tuple, because FSDP and torch.compile look for tensors inside tuples.

    text_feats: [B, L, dim] and image_feats: [B, w*w + 1, dim], after the final norm.
    cls_feats: [B, dim], pooled first token; fusion only.
    itc_feats: [B, dim], unit length, projected [CLS] of the modality expert; text or image alone.
    itc_vl_feats: [B, dim], unit length, the same with the vision-language expert in the top layers.
    """

    text_feats: Tensor | None = None
    image_feats: Tensor | None = None
    cls_feats: Tensor | None = None
    itc_feats: Tensor | None = None
    itc_vl_feats: Tensor | None = None


class VLMo(nn.Module):
    """The model of the paper with the parameter names and shapes of the published checkpoints.

    Texts are int64 ids [B, max_text_len] with [CLS] first, and a mask [B, max_text_len], bool or number, true
    where a token is valid (None: all are). Images are [B, channels, image_size, image_size] in the dtype of
    the weights, or any under autocast. Heads not in `config.heads` are not there.
    """

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        if not isinstance(config, VLMoConfig):
            raise TypeError(
                f"VLMo: config must be a VLMoConfig, got {type(config).__name__}. Hint: build('base')."
            )
        dim = config.dim
        self.config = config
        self.transformer = MultiwayTransformer(config)
        if config.relative_position_bias:
            rows = num_relative_positions(config.window, config.text_only_len)
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros(rows, config.num_heads * config.depth)
            )
        else:
            self.relative_position_bias_table = None
        self.text_embeddings = TextEmbeddings(config)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, dim)
        self.pooler = Pooler(dim)
        if "mlm" in config.heads:
            self.mlm_score = MLMHead(dim, config.vocab_size)
        if "itm" in config.heads:
            self.itm_score = ITMHead(dim)
        if "itc" in config.heads or "irtr" in config.heads:
            self.itc_text_proj = ITCHead(dim)
            self.itc_image_proj = ITCHead(dim)
            self.logit_scale = nn.Parameter(torch.zeros(()))
        if "itc" in config.heads:
            self.itc_vl_text_proj = ITCHead(dim)
            self.itc_vl_image_proj = ITCHead(dim)
            self.logit_vl_scale = nn.Parameter(torch.zeros(()))
        self.reset_position_indices()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter and buffer in place, so also after `to_empty` of a model on meta."""
        config = self.config
        self.reset_position_indices()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=config.init_std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=config.init_std)
                elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                    module.reset_parameters()
                elif isinstance(module, MLMHead):
                    nn.init.zeros_(module.bias)
            for module in self.transformer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=config.init_std)
            nn.init.trunc_normal_(self.transformer.cls_token, std=config.init_std)
            if self.transformer.pos_embed is not None:
                nn.init.trunc_normal_(self.transformer.pos_embed, std=config.init_std)
            if self.relative_position_bias_table is not None:
                nn.init.zeros_(self.relative_position_bias_table)
            for block in self.transformer.blocks:
                nn.init.zeros_(block.attn.q_bias)
                nn.init.zeros_(block.attn.v_bias)
                if config.layer_scale_init is not None:
                    nn.init.constant_(block.gamma_1, config.layer_scale_init)
                    nn.init.constant_(block.gamma_2, config.layer_scale_init)
            for name in ("logit_scale", "logit_vl_scale"):
                if hasattr(self, name):
                    nn.init.constant_(getattr(self, name), math.log(1 / 0.07))

    def reset_position_indices(self) -> None:
        """Compute the index buffers again, on the device of the bias table (`to_empty` leaves garbage)."""
        image = text = text_image = None
        if self.relative_position_bias_table is not None:
            config = self.config
            window, text_len, text_only_len = config.window, config.max_text_len, config.text_only_len
            device = self.relative_position_bias_table.device
            image = image_position_index(window, device)
            text = text_position_index(window, text_len, text_only_len, device)
            text_image = text_image_position_index(window, text_len, text_only_len, device)
        # Not in the state dict: they follow from the configuration.
        self.register_buffer("relative_position_index", image, persistent=False)
        self.register_buffer("text_relative_position_index", text, persistent=False)
        self.register_buffer("text_imag_relative_position_index", text_image, persistent=False)

    def set_attention(self, attention: str) -> None:
        """Choose "published" or "sdpa" for every layer."""
        if attention not in ATTENTION:
            raise ValueError(f"VLMo.set_attention: attention must be one of {ATTENTION}, got {attention!r}.")
        for block in self.transformer.blocks:
            block.attn.attention = attention

    def position_biases(self, index: Tensor | None) -> tuple[Tensor | None, ...]:
        """One bias [heads, N, N] a layer for one of the index buffers; Nones without a bias table."""
        if self.relative_position_bias_table is None:
            return (None,) * self.config.depth
        return layer_position_biases(self.relative_position_bias_table, index, self.config.depth)

    def embed_text(self, text_ids: Tensor, dropout_scale: Tensor | None = None) -> Tensor:
        """Token ids [B, max_text_len] to the encoder's text input [B, max_text_len, dim].

        dropout_scale: factors of that shape in place of the embeddings' own dropout.
        """
        return self.text_embeddings(text_ids, dropout_scale) + self.token_type_embeddings(torch.zeros_like(text_ids))

    def embed_image(
        self,
        image: Tensor,
        image_token_type: int = 1,
        hide: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Images to the encoder's image input [B, w*w + 1, dim]. Token type 2 is NLVR2's second image.

        hide: bool [B, w*w], patches whose embedding `mask_token` [dim] takes the place of.
        """
        if not 1 <= image_token_type < self.config.num_token_types:
            raise ValueError(
                f"VLMo: image_token_type must lie in 1..{self.config.num_token_types - 1}, "
                f"got {image_token_type}. Hint: NLVR2 needs num_token_types=3."
            )
        x = self.transformer.visual_embed(image, hide, mask_token)
        types = torch.full(x.shape[:2], image_token_type, dtype=torch.int64, device=x.device)
        return x + self.token_type_embeddings(types)

    def infer(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor | None = None, image_token_type: int = 1
    ) -> VLMoOutput:
        """Fusion encoder (paper section 3.2): [text, image] through all layers. text, image and cls feats."""
        self._check_text("infer", text_ids, text_mask)
        text = self.embed_text(text_ids)
        visual = self.embed_image(image, image_token_type)
        if text.shape[0] != visual.shape[0]:
            raise ValueError(
                f"VLMo.infer: image and text_ids must have one batch size, "
                f"got {visual.shape[0]} and {text.shape[0]}."
            )
        mask = None
        if text_mask is not None:
            mask = F.pad(text_mask.bool(), (0, visual.shape[1]), value=True)
        biases = self.position_biases(self.text_imag_relative_position_index)
        x = self.transformer(torch.cat([text, visual], dim=1), mask, "vl", biases, 0, self.config.depth)
        x = self.transformer.norm(x)
        text_len = text.shape[1]
        return VLMoOutput(text_feats=x[:, :text_len], image_feats=x[:, text_len:], cls_feats=self.pooler(x))

    def forward(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor | None = None, image_token_type: int = 1
    ) -> VLMoOutput:
        """The same as `infer`."""
        return self.infer(image, text_ids, text_mask, image_token_type)

    def infer_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> VLMoOutput:
        """Text encoder for contrastive pre-training (paper section 3.3): text, itc and itc_vl feats.

        From vlffn_start on the layers run twice from the same hidden state: with the text expert, and with
        the vision-language expert.
        """
        self._check_head("infer_text", ("itc",))
        hidden, hidden_vl = self._text_hidden("infer_text", text_ids, text_mask, with_vl=True)
        return VLMoOutput(
            text_feats=hidden,
            itc_feats=self.itc_text_proj(hidden[:, 0]),
            itc_vl_feats=self.itc_vl_text_proj(hidden_vl[:, 0]),
        )

    def infer_text_ft(self, text_ids: Tensor, text_mask: Tensor | None = None) -> VLMoOutput:
        """Text encoder for retrieval (paper section 3.4), text expert only: text and itc feats."""
        self._check_head("infer_text_ft", ("itc", "irtr"))
        hidden, _ = self._text_hidden("infer_text_ft", text_ids, text_mask, with_vl=False)
        return VLMoOutput(text_feats=hidden, itc_feats=self.itc_text_proj(hidden[:, 0]))

    def infer_text_mlm(self, text_ids: Tensor, text_mask: Tensor | None = None) -> VLMoOutput:
        """Text encoder of the language stage (paper section 3.3), text expert only: text feats."""
        hidden, _ = self._text_hidden("infer_text_mlm", text_ids, text_mask, with_vl=False)
        return VLMoOutput(text_feats=hidden)

    def infer_image(self, image: Tensor, image_token_type: int = 1) -> VLMoOutput:
        """Image encoder for contrastive pre-training (paper section 3.3): image, itc and itc_vl feats.

        From vlffn_start on the layers run twice, as in `infer_text`.
        """
        self._check_head("infer_image", ("itc",))
        hidden, hidden_vl = self._image_hidden(image, image_token_type, with_vl=True)
        return VLMoOutput(
            image_feats=hidden,
            itc_feats=self.itc_image_proj(hidden[:, 0]),
            itc_vl_feats=self.itc_vl_image_proj(hidden_vl[:, 0]),
        )

    def infer_image_ft(self, image: Tensor, image_token_type: int = 1) -> VLMoOutput:
        """Image encoder for retrieval (paper section 3.4), image expert only: image and itc feats."""
        self._check_head("infer_image_ft", ("itc", "irtr"))
        hidden, _ = self._image_hidden(image, image_token_type, with_vl=False)
        return VLMoOutput(image_feats=hidden, itc_feats=self.itc_image_proj(hidden[:, 0]))

    def _text_hidden(
        self, method: str, text_ids: Tensor, text_mask: Tensor | None, with_vl: bool
    ) -> tuple[Tensor, Tensor | None]:
        self._check_text(method, text_ids, text_mask)
        biases = self.position_biases(self.text_relative_position_index)
        return self._single(self.embed_text(text_ids), text_mask, "text", biases, with_vl)

    def _image_hidden(
        self, image: Tensor, image_token_type: int, with_vl: bool
    ) -> tuple[Tensor, Tensor | None]:
        biases = self.position_biases(self.relative_position_index)
        return self._single(self.embed_image(image, image_token_type), None, "image", biases, with_vl)

    def _single(
        self,
        x: Tensor,
        mask: Tensor | None,
        modality_type: str,
        biases: tuple[Tensor | None, ...],
        with_vl: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One modality through all layers, `with_vl` again through the top layers as "vl"; both normed."""
        start, depth = self.config.vlffn_start, self.config.depth
        branch = self.transformer(x, mask, modality_type, biases, 0, start)
        hidden = self.transformer.norm(self.transformer(branch, mask, modality_type, biases, start, depth))
        if not with_vl:
            return hidden, None
        return hidden, self.transformer.norm(self.transformer(branch, mask, "vl", biases, start, depth))

    def _check_text(self, method: str, text_ids: Tensor, text_mask: Tensor | None) -> None:
        length = self.config.max_text_len
        if text_ids.ndim != 2 or text_ids.shape[1] != length:
            raise ValueError(
                f"VLMo.{method}: text_ids must be [B, max_text_len={length}], got {list(text_ids.shape)}. "
                "Hint: pad or cut the texts, or build the model with another max_text_len."
            )
        if text_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"VLMo.{method}: text_ids must be int64 or int32, got {text_ids.dtype}.")
        if text_mask is not None and text_mask.shape != text_ids.shape:
            raise ValueError(
                f"VLMo.{method}: text_mask must have the shape of text_ids {list(text_ids.shape)}, "
                f"got {list(text_mask.shape)}."
            )

    def _check_head(self, method: str, names: tuple[str, ...]) -> None:
        if not any(name in self.config.heads for name in names):
            raise ValueError(
                f"VLMo.{method}: config.heads must have one of {names}, it is {self.config.heads}. "
                "Hint: infer_text_ft and infer_image_ft also take 'irtr', infer_text_mlm needs no head."
            )


def build(config: str | VLMoConfig) -> VLMo:
    """A freshly initialised model from a configuration or a name in CONFIGS."""
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"build: the name must be one of {sorted(CONFIGS)}, got {config!r}.")
        config = CONFIGS[config]
    return VLMo(config)


def vlmo_base(image_size: int = 224, max_text_len: int = 40) -> VLMo:
    """VLMo-Base, 202.4 M parameters. For anything else: build(dataclasses.replace(CONFIGS["base"], ...))."""
    return VLMo(replace(CONFIGS["base"], image_size=image_size, max_text_len=max_text_len))


def vlmo_base_plus(image_size: int = 224, max_text_len: int = 40) -> VLMo:
    """VLMo-Base+, 185.0 M parameters, absolute positions."""
    return VLMo(replace(CONFIGS["base_plus"], image_size=image_size, max_text_len=max_text_len))


def vlmo_large(image_size: int = 224, max_text_len: int = 40) -> VLMo:
    """VLMo-Large, 599.1 M parameters."""
    return VLMo(replace(CONFIGS["large"], image_size=image_size, max_text_len=max_text_len))


def vlmo_tiny() -> VLMo:
    """A model for tests, of milliseconds."""
    return VLMo(CONFIGS["tiny"])
