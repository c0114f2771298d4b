"""`torch.nn.Module` drop-ins over the ops."""

from .mome_block import MoMEBlock, MoMEEncoder
from .routed_ffn import RoutedFFN
from .routed_linear import RoutedLinear
from .routed_norm import RoutedNorm
from .shared_attention import SharedAttention

__all__ = ["MoMEBlock", "MoMEEncoder", "RoutedFFN", "RoutedLinear", "RoutedNorm", "SharedAttention"]
