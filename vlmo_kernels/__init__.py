"""Fused kernels for transformers whose feed-forward weights are chosen by a token's modality.

Importing needs torch alone: no GPU, no Triton, no compiler.
"""

from .layout import ModalityLayout
from .ops import (
    MoMEBlockParams,
    RelativePositionBias,
    mome_block,
    routed_ffn,
    routed_linear,
    routed_norm,
    shared_attention,
)
from .runtime.dispatch import Explanation, explain

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "MoMEBlockParams",
    "ModalityLayout",
    "RelativePositionBias",
    "explain",
    "mome_block",
    "routed_ffn",
    "routed_linear",
    "routed_norm",
    "shared_attention",
]
