"""Stochastic depth, as a factor per packed row."""

from __future__ import annotations

import torch

from vlmo_kernels.layout import ModalityLayout


def drop_path_scale(layout: ModalityLayout, rate: float, training: bool) -> torch.Tensor | None:
    """Factor of every packed row: 0 for dropped branches, `1 / (1 - rate)` for kept ones (Huang et al. 2016).

    Drawn per sample and modality, as VLMo does in its feed-forward branch.

    Args:
        layout: the plan of the batch.
        rate: probability of dropping a branch.
        training: without it nothing is dropped.

    Returns:
        fp32 `[T]`, or None if nothing can be dropped.
    """
    if not training or rate == 0.0:
        return None
    modalities = len(layout.modalities)
    keep = torch.rand(layout.batch * modalities, device=layout.device) >= rate
    return _factor(keep, rate)[layout.sample_of_row.clamp(min=0).long() * modalities + modality_of_row(layout)]


def sample_drop_path_scale(layout: ModalityLayout, rate: float, training: bool) -> torch.Tensor | None:
    """Like `drop_path_scale`, drawn once per sample: for branches that all modalities share."""
    if not training or rate == 0.0:
        return None
    keep = torch.rand(layout.batch, device=layout.device) >= rate
    return _factor(keep, rate)[layout.sample_of_row.clamp(min=0).long()]


def _factor(keep: torch.Tensor, rate: float) -> torch.Tensor:
    # At rate 1 nothing is kept, and 1 / 0 must not turn those zeros into NaN.
    return keep.float() / (1.0 - rate if rate < 1.0 else 1.0)


def modality_of_row(layout: ModalityLayout) -> torch.Tensor:
    """int64 `[T]`, the modality of every packed row (the last one for dead rows)."""
    row = torch.arange(layout.tokens, device=layout.device, dtype=torch.int32)
    ends = layout.group_offsets[2::2].contiguous()
    return torch.searchsorted(ends, row, right=True).clamp(max=len(layout.modalities) - 1)
