"""What `swap` did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from . import instance


@dataclass
class SwapReport:
    """What was replaced, what was not and why.

    Attributes:
        replaced: path to "family, depth" of every module that runs on the kernels now.
        left: path to the reason for every module that was recognised and left alone.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every replaced module its own forward back. Parameters were never touched."""
        while self._modules:
            instance.undo(self._modules.pop())

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"swapped {count} module{'s' * (count != 1)}, left {len(self.left)} alone"]
        lines += [f"  {path}: {what}" for path, what in self.replaced.items()]
        lines += [f"  {path}: left alone, {why}" for path, why in self.left.items()]
        return "\n".join(lines)
