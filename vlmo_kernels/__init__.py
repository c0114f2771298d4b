"""Fused kernels for transformers whose feed-forward weights are chosen by a token's modality.

Importing needs torch alone: no GPU, no Triton, no compiler.
"""

from .layout import ModalityLayout
from .modules import MoMEBlock, MoMEEncoder, RoutedFFN, RoutedLinear, RoutedNorm, SharedAttention
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
from .runtime.frozen import frozen_weights
from .swap import SwapReport, swap

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "MoMEBlock",
    "MoMEBlockParams",
    "MoMEEncoder",
    "ModalityLayout",
    "RelativePositionBias",
    "RoutedFFN",
    "RoutedLinear",
    "RoutedNorm",
    "SharedAttention",
    "SwapReport",
    "explain",
    "frozen_weights",
    "mome_block",
    "routed_ffn",
    "routed_linear",
    "routed_norm",
    "shared_attention",
    "swap",
]
