"""The mixture-of-modality-experts transformer of VLMo (paper section 3.2).

In plain torch, padded; `Block.forward_packed` is the same layer on packed rows, by the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_kernels import ModalityLayout, routed_ffn, routed_linear, routed_norm, shared_attention

from .config import ATTENTION, VLMoConfig

NORM_EPS = 1e-6
BERT_NORM_EPS = 1e-12
_NORMS = {"text": "norm2_text", "image": "norm2_imag", "vl": "norm2_vl"}
_MLPS = {"text": "mlp_text", "image": "mlp_imag", "vl": "mlp_vl"}


class DropPath(nn.Module):
    """Drop a residual branch of whole samples (dim 0), and scale up those kept. A no-op in eval mode."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * (keep / keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Mlp(nn.Module):
    """One expert: Linear, exact GELU, Linear. [..., dim] to [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Bidirectional self-attention shared by all modalities. Queries and values have a bias, keys none.

    `attention` selects how it is computed: "published" writes the score matrix in fp32 (fp64 for fp64 input);
    "sdpa" calls F.scaled_dot_product_attention, which wants bias and mask in the dtype of the queries. Both
    scale the queries before the product.
    """

    def __init__(self, dim: int, num_heads: int, attention: str = "published") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attention = attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, relative_position_bias: Tensor | None = None
    ) -> Tensor:
        """x: [B, N, dim]. mask: [B, N], bool or number, true where a key is valid; every sample needs a valid
        key, or its rows are NaN. relative_position_bias: [heads, N, N]. Returns [B, N, dim].
        """
        if self.attention not in ATTENTION:
            raise ValueError(f"Attention: attention must be one of {ATTENTION}, got {self.attention!r}.")
        batch, length, dim = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = q * self.scale
        padding = None if mask is None else mask.bool().logical_not()[:, None, None, :]
        attend = self._published if self.attention == "published" else self._sdpa
        out = attend(q, k, v, padding, relative_position_bias)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))

    def _published(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        # Under autocast a product of fp32 tensors would silently run in 16 bits again.
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            scores = q.to(dtype) @ k.to(dtype).transpose(-2, -1)
            if bias is not None:
                scores = scores + bias
            if padding is not None:
                scores = scores.masked_fill(padding, float("-inf"))
            probabilities = scores.softmax(dim=-1).to(v.dtype)
        return probabilities @ v

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None) -> Tensor:
        attn_mask = None
        if bias is not None:
            attn_mask = bias.to(q.dtype)[None]
            if padding is not None:
                attn_mask = attn_mask.masked_fill(padding, float("-inf"))
        elif padding is not None:
            attn_mask = ~padding
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=1.0)


class Block(nn.Module):
    """One MoME layer: shared self-attention, then the FFN expert of the modality.

    Attributes others may read: `max_text_len`, where a fusion sequence [text, image] splits; `mlp_vl` and
    `norm2_vl`, None below the first layer with a vision-language expert; `gamma_1` and `gamma_2`, the number
    1 without LayerScale. gamma_2 is shared by all experts of the layer.
    """

    def __init__(self, config: VLMoConfig, layer: int) -> None:
        super().__init__()
        dim = config.dim
        self.max_text_len = config.max_text_len
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, config.num_heads, config.attention)
        self.drop_path = DropPath(config.drop_path * layer / max(config.depth - 1, 1))
        self.norm2_text = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2_imag = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp_text = Mlp(dim, config.ffn_dim)
        self.mlp_imag = Mlp(dim, config.ffn_dim)
        with_vl = layer >= config.vlffn_start
        self.mlp_vl = Mlp(dim, config.ffn_dim) if with_vl else None
        self.norm2_vl = nn.LayerNorm(dim, eps=NORM_EPS) if with_vl else None
        if config.layer_scale_init is None:
            self.gamma_1 = self.gamma_2 = 1.0
        else:
            self.gamma_1 = nn.Parameter(torch.full((dim,), config.layer_scale_init))
            self.gamma_2 = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        modality_type: str | None = None,
        relative_position_bias: Tensor | None = None,
    ) -> Tensor:
        """x: [B, N, dim]. mask: [B, N], true where a key is valid, or None. modality_type: "image", "text" or
        "vl" (None is "vl", as published). relative_position_bias: [heads, N, N] or None. Returns [B, N, dim].
        """
        attended = self.attn(self.norm1(x), mask, relative_position_bias)
        x = x + self.drop_path(self.gamma_1 * attended)
        if modality_type == "image":
            return self._ffn(x, self.norm2_imag, self.mlp_imag)
        if modality_type == "text":
            return self._ffn(x, self.norm2_text, self.mlp_text)
        if modality_type not in ("vl", None):
            raise ValueError(f"Block: modality_type must be 'image', 'text' or 'vl', got {modality_type!r}.")
        if self.mlp_vl is not None:
            return self._ffn(x, self.norm2_vl, self.mlp_vl)
        if x.shape[1] <= self.max_text_len:
            raise ValueError(
                f"Block: a 'vl' sequence must be longer than max_text_len={self.max_text_len}, "
                f"got {x.shape[1]} tokens. Hint: pad the text to max_text_len and put the image behind it."
            )
        # Each half draws its own DropPath: one may be kept where the other is dropped.
        text = self._ffn(x[:, : self.max_text_len], self.norm2_text, self.mlp_text)
        image = self._ffn(x[:, self.max_text_len :], self.norm2_imag, self.mlp_imag)
        return torch.cat([text, image], dim=1)

    def forward_packed(
        self,
        x: Tensor,
        layout: ModalityLayout,
        experts: Mapping[str, str],
        relative_position_bias: Tensor | None = None,
        attention_scale: Tensor | None = None,
        ffn_scale: Tensor | None = None,
        read: tuple[Tensor, ModalityLayout] | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """The layer on packed rows of any mixture of samples.

        x: [T, dim], rows of `layout`. experts: modality or group to "text", "image" or "vl". read: int64 [R] rows
        and the layout of these alone, where nobody reads the others' output: they serve as keys and values only.
        attention_scale, ffn_scale: fp32 [T] (with `read` [R]), DropPath's factors of the two branches; this
        module's own DropPath is not used. impl: "auto", "triton", "cpu" or "reference". Returns [T, dim] or [R, dim].
        """
        attn, dim = self.attn, x.shape[1]
        names = tuple(dict.fromkeys(experts.values()))
        norms = [getattr(self, _NORMS[name]) for name in names]
        mlps = [getattr(self, _MLPS[name]) for name in names]
        route = {group: names.index(name) for group, name in experts.items()}
        gammas = [gamma if isinstance(gamma, Tensor) else None for gamma in (self.gamma_1, self.gamma_2)]

        h = routed_norm(x, [self.norm1.weight], [self.norm1.bias], layout, eps=NORM_EPS, impl=impl)
        qkv_bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
        qkv = routed_linear(h, [attn.qkv.weight], [qkv_bias], layout, impl=impl)
        qkv = qkv.view(-1, 3, attn.num_heads, dim // attn.num_heads)
        o = shared_attention(qkv, None, None, layout, bias=relative_position_bias, impl=impl).view(-1, dim)
        if read is not None:
            rows, layout = read
            o, x = o.index_select(0, rows), x.index_select(0, rows)
        x = routed_linear(
            o, [attn.proj.weight], [attn.proj.bias], layout, gamma=gammas[:1], residual=x,
            row_scale=attention_scale, impl=impl,
        )  # fmt: skip
        h = routed_norm(
            x, [norm.weight for norm in norms], [norm.bias for norm in norms], layout, route, eps=NORM_EPS, impl=impl
        )
        return routed_ffn(
            h, [mlp.fc1.weight for mlp in mlps], [mlp.fc1.bias for mlp in mlps], [mlp.fc2.weight for mlp in mlps],
            [mlp.fc2.bias for mlp in mlps], layout, route, gamma=gammas[1:] * len(mlps), residual=x,
            row_scale=ffn_scale, impl=impl,
        )  # fmt: skip

    def _ffn(self, x: Tensor, norm: nn.LayerNorm, mlp: Mlp) -> Tensor:
        return x + self.drop_path(self.gamma_2 * mlp(norm(x)))


class TextEmbeddings(nn.Module):
    """BERT's embeddings under BERT's names: token ids [B, L] to [B, L, dim].

    With a bias table the positions are not added; the parameter stays, because checkpoints carry it.
    """

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.absolute_positions = not config.relative_position_bias
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_text_len, config.dim)
        self.token_type_embeddings = nn.Embedding(2, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=BERT_NORM_EPS)
        self.dropout = nn.Dropout(config.drop_path)

    def forward(self, text_ids: Tensor, dropout_scale: Tensor | None = None) -> Tensor:
        """dropout_scale: factors [B, L, dim] that take the place of this module's dropout."""
        x = self.word_embeddings(text_ids) + self.token_type_embeddings(torch.zeros_like(text_ids))
        if self.absolute_positions:
            x = x + self.position_embeddings(torch.arange(text_ids.shape[1], device=text_ids.device))
        x = self.LayerNorm(x)
        return self.dropout(x) if dropout_scale is None else x * dropout_scale


class PatchEmbed(nn.Module):
    """Square patches to tokens: [B, channels, S, S] to [B, w*w, dim], row by row."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        expected = (self.proj.in_channels, self.image_size, self.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"PatchEmbed: image must be [B, {expected[0]}, {expected[1]}, {expected[2]}], "
                f"got {list(image.shape)}. Hint: build the model with another image_size for other images."
            )
        return self.proj(image).flatten(2).transpose(1, 2)


class MultiwayTransformer(nn.Module):
    """Patch embedding, [CLS], blocks and the final norm shared by all modalities."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        dim = config.dim
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, config.in_channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.relative_position_bias:
            self.pos_embed = None
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.num_image_tokens, dim))
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.depth)])
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def visual_embed(
        self, image: Tensor, hide: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """[B, channels, S, S] to image tokens with [CLS] first, [B, w*w + 1, dim].

        hide: bool [B, w*w], patches whose embedding `mask_token` [dim] takes the place of (BEiT).
        """
        patches = self.patch_embed(image)
        if hide is not None:
            patches = torch.where(hide[..., None], mask_token.to(patches.dtype), patches)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        modality_type: str,
        relative_position_biases: Sequence[Tensor | None],
        start: int,
        stop: int,
    ) -> Tensor:
        """Hidden states through blocks `start` to `stop - 1`, without the final norm.

        x: [B, N, dim]. mask and modality_type: as in `Block.forward`. relative_position_biases: one
        [heads, N, N] or None for every layer of the model. Returns [B, N, dim].
        """
        for block, bias in zip(self.blocks[start:stop], relative_position_biases[start:stop], strict=True):
            x = block(x, mask=mask, modality_type=modality_type, relative_position_bias=bias)
        return x
