"""What people run today, on the parameters of the module under test: padded blocks, masked experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from vlmo_kernels.modules import MoMEBlock


def attend_published(q, k, v, mask, bias, scale: float) -> torch.Tensor:
    """Attention of `[B, H, N, Dh]` with the score matrix in fp32, as VLMo published it; fp64 stays fp64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q * scale).to(dtype) @ k.to(dtype).transpose(-2, -1) + bias
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def attend_sdpa(q, k, v, mask, bias, scale: float) -> torch.Tensor:
    """The same through torch's fused attention, which wants bias and mask as one tensor."""
    added = torch.where(mask[:, None, None, :], bias.to(q.dtype), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)


def attend_xformers(q, k, v, mask, bias, scale: float) -> torch.Tensor:
    """The same through xformers. Its packed form (`BlockDiagonalMask`) takes no bias: bias and mask are one tensor."""
    from xformers.ops import memory_efficient_attention

    # The kernel asks for rows that begin at multiples of 16 bytes: the tensor is written wider than it is handed over.
    length = mask.shape[1]
    wide = F.pad(bias.to(q.dtype), (0, -length % 8))
    mask = F.pad(mask, (0, -length % 8))
    added = torch.where(mask[:, None, None, :], wide, float("-inf"))[..., :length]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=added, scale=scale).transpose(1, 2)


def attend_flex(qkv, bias, positions, block_mask) -> torch.Tensor:
    """FlexAttention over a packed `[T, 3, H, Dh]`: the mask keeps samples apart, the bias is gathered by position."""

    def score(s, b, h, i, j):
        return s + bias[h, positions[i], positions[j]]

    q, k, v = qkv.permute(1, 2, 0, 3)[:, None].unbind(0)
    return flex_attention(q, k, v, score_mod=score, block_mask=block_mask)[0].transpose(0, 1)


class PaddedBlock(nn.Module):
    """A `MoMEBlock` as published: `[B, N, D]` with padding, text first, then the image.

    Args:
        block: whose parameters are used; two experts, text and image.
        text_length: tokens of the padded text.
        attend: `attend_published` or `attend_sdpa`.
    """

    def __init__(self, block: MoMEBlock, text_length: int, attend) -> None:
        super().__init__()
        self.block, self.text_length, self.attend = block, text_length, attend

    def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        block, attn = self.block, self.block.attn
        batch, length, dim = x.shape
        h = block.norm1.shared(x)
        qkv = attn.qkv(h).view(batch, length, 3, attn.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        o = self.attend(q, k, v, mask, bias, (dim // attn.heads) ** -0.5)
        x = x + block.gamma_1 * attn.proj(o.transpose(1, 2).reshape(batch, length, dim))
        halves = []
        for name, part in (("text", x[:, : self.text_length]), ("image", x[:, self.text_length :])):
            mlp, norm = getattr(block.ffn, name), getattr(block.norm2, name)
            halves.append(part + block.gamma_2 * mlp.fc2(F.gelu(mlp.fc1(norm(part)))))
        return torch.cat(halves, dim=1)


def ffn(x, w1, b1, w2, b2, gamma, residual) -> torch.Tensor:
    """One expert with its epilogue."""
    return residual + gamma * F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def ffn_cublaslt(x, residual, sizes, weights, gamma) -> torch.Tensor:
    """A loop over experts with bias and GELU in cuBLASLt's own epilogue (on a GPU that GELU is the tanh form)."""
    parts = []
    for rows, r, (w1, b1, w2, b2) in zip(x.split(sizes), residual.split(sizes), weights, strict=True):
        h = torch._addmm_activation(b1, rows, w1.t(), use_gelu=True)
        parts.append(r + gamma * F.linear(h, w2, b2))
    return torch.cat(parts)


def ffn_masked(x, residual, masks, weights, gamma) -> torch.Tensor:
    """Experts by boolean masks and index_put, as most multimodal code has it."""
    out = torch.zeros_like(residual)
    for mask, w in zip(masks, weights, strict=True):
        out[mask] = ffn(x[mask], *w, gamma, residual[mask])
    return out


def ffn_split(x, residual, sizes, weights, gamma) -> torch.Tensor:
    """Rows grouped already: a loop over experts."""
    parts = zip(x.split(sizes), residual.split(sizes), weights, strict=True)
    return torch.cat([ffn(rows, *w, gamma, r) for rows, r, w in parts])


def ffn_grouped(x, residual, offsets, rows_expert, w1, b1, w2, b2, gamma) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` on stacked weights `[E, K, N]`; biases are gathered by row."""
    h = F.gelu(F.grouped_mm(x, w1, offs=offsets) + b1[rows_expert])
    return residual + gamma * (F.grouped_mm(h, w2, offs=offsets) + b2[rows_expert])
