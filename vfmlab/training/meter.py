"""Running code on fake tensors: shapes without storage, FLOPs by part, and the bytes that autograd stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from vfmlab import config
from vfmlab.nn.frozen import Frozen
from vfmlab.seeding import StepRandom


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, modules are built on the meta device, and torchvision's and torchmetrics' pretrained networks
    without their
    weights: there are no values to load, so reading the files would only cost time and a connection."""
    from torchvision.models import WeightsEnum

    get, load = WeightsEnum.get_state_dict, nn.Module.load_state_dict
    WeightsEnum.get_state_dict = lambda *args, **options: {}
    nn.Module.load_state_dict = lambda *args, **options: None
    try:
        with torch.device("meta"):
            yield
    finally:
        WeightsEnum.get_state_dict, nn.Module.load_state_dict = get, load


def weightless(section: Any) -> Any:
    """A config in which no VFM looks for weights and no loss ends: all at work, nothing downloaded."""
    if isinstance(section, dict):
        return {key: weightless(value) for key, value in section.items()}
    if not isinstance(section, config.Section):
        return section
    changes = {name: weightless(value) for name, value in section}
    if isinstance(section, config.VFM):
        changes["weights"] = "random"
    if isinstance(section, config.LossConfig):
        changes["until"] = None
    return section.model_copy(update=changes)


def conv_backward_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    """FLOPs of a convolution's backward pass: the forward's, once for the input's and once for the weight's
    gradient.

    torch's own formula takes the weight's gradient of a grouped convolution for a dense one, hundreds of
    times too much.
    """
    places = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * places * math.prod(weight) * sum(wanted[:2])


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry, torch.ops.aten.convolution_backward: shape_wrapper(conv_backward_flops)}


class Counter(TorchDispatchMode):
    """Inside, `flops` grows by what operators cost by torch's formulas; a multiply-add counts as two.

    torch's own counter follows modules by hooks, which refuse gradients at a leaf inside a forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, formula = kwargs or {}, FORMULAS.get(func._overloadpacket)
        if formula is None and func.namespace != "prim" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.flops += 0 if formula is None else formula(*args, **kwargs, out_val=out)
        return out


class Meter:
    """FLOPs by part, and the bytes that autograd stores, of code that runs on fake tensors."""

    def __init__(self):
        self.flops: dict[str, int] = {}
        self.calls: dict[str, int] = {}  # of watched methods, by part
        self._stored: dict[int, Tensor] = {}
        self._own: set[int] = set()
        self._inside = False

    @contextmanager
    def fake(self, *modules: nn.Module | None) -> Iterator[None]:
        """Inside, `modules` and what they hold as `Frozen` have fake tensors on the CPU, not meta tensors."""
        replaced: dict[int, Tensor] = {}  # parameters and modules may be shared
        with (FakeTensorMode(allow_non_fake_inputs=True), Counter() as self._counter,
              saved_tensors_hooks(self._pack, lambda tensor: tensor)):
            for child in everything(*modules):
                for table in (child._parameters, child._buffers):
                    for name, old in table.items():
                        if old is None or not old.is_meta:
                            continue
                        if id(old) not in replaced:
                            new = torch.empty(old.shape, dtype=old.dtype)
                            new = (
                                nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                            )
                            replaced[id(old)] = new
                        table[name] = replaced[id(old)]
                self._own |= {id(p.untyped_storage()) for p in child.parameters(recurse=False)}
            yield

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Calls of this method of `owner` count as `part`."""
        inner: Callable = getattr(owner, method)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls[part] = self.calls.get(part, 0) + 1
            with self.part(part):
                return inner(*args, **options)

        setattr(owner, method, counted)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """FLOPs inside count as `name`; inside another part they stay that one's."""
        if self._inside:
            yield
            return
        self._inside, before = True, self._counter.flops
        try:
            yield
        finally:
            self._inside = False
        self.flops[name] = self.flops.get(name, 0) + self._counter.flops - before

    def _pack(self, tensor: Tensor) -> Tensor:
        # A storage counts once however many views of it are stored; the reference keeps its id from being
        # reused.
        if not isinstance(tensor, nn.Parameter):
            self._stored.setdefault(id(tensor.untyped_storage()), tensor)
        return tensor

    @property
    def activations(self) -> int:
        """Bytes stored for the backward pass, parameters not counted."""
        return sum(t.untyped_storage().nbytes() for key, t in self._stored.items() if key not in self._own)


def everything(*modules: nn.Module | None) -> list[nn.Module]:
    """All modules in `modules`, and in what these hold as :class:`Frozen`, each once."""
    every: dict[int, nn.Module] = {}
    waiting = [module for module in modules if module is not None]
    while waiting:
        for child in waiting.pop().modules():
            if id(child) not in every:
                every[id(child)] = child
                waiting += child.parts.values() if isinstance(child, Frozen) else []
    return list(every.values())


class Undrawn(StepRandom):
    """Random numbers without values; decisions for the whole batch take the last choice."""

    def __init__(self) -> None:
        super().__init__(0, 0, 1)

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(self.total, *shape)

    def rand(self, *shape: int) -> Tensor:
        return torch.empty(self.total, *shape)

    def number(self) -> float:
        return 1 - 1e-9
