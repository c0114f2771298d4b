"""BEiT-3 (torchscale)."""


WHAT = ""


def recognises(module) -> bool:
    return False
