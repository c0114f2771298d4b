"""The experts of a module: their names, and which of them serves which modality where the caller has not said it."""

from __future__ import annotations

from torch import nn

from vlmo_kernels.layout import Experts, ModalityLayout


def check_names(module: str, names: tuple[str, ...], argument: str = "names") -> tuple[str, ...]:
    """Names that submodules can have, each once; as a tuple.

    Raises:
        TypeError: `names` is one string, or holds something else than strings.
        ValueError: none, an empty one, one twice, or one that modules use themselves.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{module}: `{argument}` must be a tuple of strings, got {names!r}. Hint: ('text',)")
    wrong = [n for n in names if not n or "." in n or names.count(n) > 1 or hasattr(nn.Module(), n)]
    if wrong or not names:
        raise ValueError(
            f"{module}: `{argument}` must be different, not empty, without dots and no attributes of a module, "
            f"got {tuple(names)}"
        )
    return tuple(names)


def experts_by_name(
    module: str, names: tuple[str, ...], experts: Experts | None, layout: ModalityLayout
) -> Experts | None:
    """`experts`, or without them every modality's namesake; None, for by order, where no modality has one.

    Raises:
        ValueError: some modalities have a namesake and others have not.
    """
    known = [modality for modality in layout.modalities if modality in names]
    if experts is not None or not known or len(names) == 1:
        return experts
    if len(known) < len(layout.modalities):
        raise ValueError(
            f"{module}: its experts {names} must have a namesake for each of the layout's modalities "
            f"{layout.modalities}, or for none of them. Hint: `experts` says whose is whose"
        )
    return {modality: names.index(modality) for modality in known}
