"""The `vlmo_kernels` operator namespace."""

from __future__ import annotations

import torch

_library = torch.library.Library("vlmo_kernels", "DEF")


def define(schema: str) -> None:
    """Define `vlmo_kernels::<schema>`. Every op is functional: it writes to no argument."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
