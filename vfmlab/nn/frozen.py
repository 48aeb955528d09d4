"""Parts that a module uses and does not own: a frozen VFM, an earlier stage, another optimiser's networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import nn


class Frozen(nn.Module):
    """Named modules that only `.to()` reaches. Register it as a submodule of the module that uses them.

        self.frozen = Frozen(vfm=vfm)
        self.frozen["vfm"].features(images)

    `parameters()`, `buffers()`, `state_dict()`, `train()`, `requires_grad_()`, averages and gradient
    reduction of the owner leave the parts as they are, and a deep copy of the owner shares them. A part given
    as None is left out.
    """

    def __init__(self, **parts: nn.Module | None):
        super().__init__()
        self.parts: dict[str, nn.Module] = {name: part for name, part in parts.items() if part is not None}

    def __getitem__(self, name: str) -> nn.Module:
        return self.parts[name]

    def __setitem__(self, name: str, part: nn.Module) -> None:
        self.parts[name] = part

    def freeze(self, name: str, part: nn.Module) -> None:
        """Hold a part that nobody trains: without gradients, in eval mode."""
        self.parts[name] = part.requires_grad_(False).eval()

    def __len__(self) -> int:
        return len(self.parts)

    def get(self, name: str) -> nn.Module | None:
        return self.parts.get(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for part in self.parts.values():
            part._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Frozen:
        return Frozen(**self.parts)
