"""The public operators: checks, schemas, derivatives, and the choice of an implementation."""

from .mome_block import MoMEBlockParams, mome_block
from .routed_ffn import routed_ffn
from .routed_linear import routed_linear
from .routed_norm import routed_norm
from .shared_attention import RelativePositionBias, shared_attention

__all__ = [
    "MoMEBlockParams",
    "RelativePositionBias",
    "mome_block",
    "routed_ffn",
    "routed_linear",
    "routed_norm",
    "shared_attention",
]
