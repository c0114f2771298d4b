"""VLMo: unified vision-language pre-training with mixture-of-modality-experts (arXiv 2111.02358)."""

from .checkpoint import CheckpointReport, load_checkpoint
from .config import CONFIGS, VLMoConfig
from .model import VLMo, VLMoOutput, build, vlmo_base, vlmo_base_plus, vlmo_large, vlmo_tiny

__all__ = [
    "CONFIGS",
    "CheckpointReport",
    "VLMo",
    "VLMoConfig",
    "VLMoOutput",
    "build",
    "load_checkpoint",
    "vlmo_base",
    "vlmo_base_plus",
    "vlmo_large",
    "vlmo_tiny",
]
