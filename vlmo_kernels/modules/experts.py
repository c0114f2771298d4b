"""Which expert of a module serves which modality, where the caller has not said it."""

from __future__ import annotations

from vlmo_kernels.layout import Experts, ModalityLayout


def experts_by_name(names: tuple[str, ...], experts: Experts | None, layout: ModalityLayout) -> Experts | None:
    """`experts`, or without them every modality's namesake; None, for by order, where a modality has none."""
    if experts is None and set(layout.modalities) <= set(names):
        return {modality: names.index(modality) for modality in layout.modalities}
    return experts
