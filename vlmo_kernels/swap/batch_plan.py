"""The plan of a padded batch, built once however many blocks ask for it."""

from __future__ import annotations

import weakref

import torch

from vlmo_kernels.layout import ModalityLayout

# Keyed by the mask's identity, checked by weak reference and version: an edited or another mask plans anew.
_of_mask: dict[tuple, tuple[weakref.ref, int, ModalityLayout]] = {}
_without_mask: dict[tuple, ModalityLayout] = {}
_KEPT = 16


def split_layout(
    batch: int,
    length: int,
    split: int,
    mask: torch.Tensor | None,
    device: torch.device,
    modalities: tuple[str, str],
) -> ModalityLayout:
    """`ModalityLayout.from_split`, memoised in eager mode.

    Compiled code does not look at the memo (it would be compiled again for every batch): there the plan is
    an op; in training graphs the compiler merges equal calls, in inference graphs every call stays.

    Args:
        batch, length: of the padded batch `[B, N]`.
        split: number of leading tokens of the first modality.
        mask: bool or 0/1 `[B, N]`, true for real tokens, or None.
        device: of the batch.
        modalities: two names.
    """
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"swap: the mask must be [{batch}, {length}], got {list(mask.shape)}")

    def build() -> ModalityLayout:
        layout = ModalityLayout.from_split(
            batch, length, split, None if mask is None else mask.bool(), modalities=modalities, device=device
        )
        return layout

    if torch.compiler.is_compiling() or (mask is not None and mask.is_inference()):
        return build()
    if mask is None:
        key = (batch, length, split, device, modalities)
        if key not in _without_mask:
            if len(_without_mask) >= _KEPT:
                _without_mask.pop(next(iter(_without_mask)))
            with torch.inference_mode(False):
                _without_mask[key] = build()
        return _without_mask[key]
    key = (id(mask), batch, length, split, modalities)
    known = _of_mask.get(key)
    if known is not None and known[0]() is mask and known[1] == mask._version:
        return known[2]
    with torch.inference_mode(False):
        layout = build()
    _of_mask[key] = (weakref.ref(mask, lambda _: _of_mask.pop(key, None)), mask._version, layout)
    return layout
