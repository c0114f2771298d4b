"""VLMo's heads, under the published parameter names (paper section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import BERT_NORM_EPS


class Pooler(nn.Module):
    """tanh(dense(first token)): [B, N, dim] to [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class MLMTransform(nn.Module):
    """BERT's transform before the decoder: [..., dim] to [..., dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=BERT_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """Masked language modelling: [..., dim] to logits [..., vocab]. Not tied to the word embeddings."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = MLMTransform(dim)
        self.decoder = nn.Linear(dim, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x)) + self.bias


class ITMHead(nn.Module):
    """Image-text matching: pooled [B, dim] to logits [B, 2]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ITCHead(nn.Module):
    """Projection into the contrastive space: [B, dim] to unit vectors [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.fc(x), dim=-1)
