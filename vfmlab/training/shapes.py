"""Tensors without values, and operators on them: shapes, types, which storage is whose, and FLOPs.

torch's `FakeTensorMode` does the same and far more, slowly. Here it is asked once for an operator and the
shapes of its arguments; after that the answer is read from a table, as in the next stage of the same
networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, shape_wrapper

SIMPLE = (int, float, bool, complex)  # 1, 1.0 and True are equal as keys, but not as arguments
Meta = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]  # size, stride, offset, type


class Shape(Tensor):
    """A tensor on the CPU without values. `storage` stands for its memory: views of one tensor share it."""

    meta: Meta
    storage_: torch.UntypedStorage

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Meta, storage: torch.UntypedStorage) -> Shape:
        size, stride, offset, dtype = meta
        self = torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, storage_offset=offset,
                                                   dtype=dtype, device="cpu")
        self.meta, self.storage_ = meta, storage
        return self

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.storage_

    def __repr__(self, **_: Any) -> str:
        return f"Shape{self.meta}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor without values, outside of Shapes()")


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


class Shapes(TorchDispatchMode):
    """Inside, operators give :class:`Shape` tensors and `flops` grows by what they would cost.

    A multiply-add counts as two. What depends on values, such as `.item()`, raises torch's own error.
    """

    # For the whole process, because phases and presets repeat each other's shapes.
    answers: ClassVar[dict[Any, tuple[Any, int]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch's wrapper would cost as much as the lookup

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tensors = kwargs or {}, []
        key: list[Any] = [func]
        _describe(args, key, tensors)
        if kwargs:
            _describe([part for pair in kwargs.items() for part in pair], key, tensors)
        key = tuple(key)
        if key not in self.answers:
            self.answers[key] = _ask(func, args, kwargs, tensors)
        made, flops = self.answers[key]
        if made is PARTS:
            with self:
                return func.decompose(*args, **kwargs)
        self.flops += flops
        return _give(made, tensors)


@functools.cache
def _asked() -> FakeTensorMode:
    """torch's own, without its table; made when it is needed, because it imports the compiler."""
    mode = FakeTensorMode()
    mode.cache_enabled = False
    return mode


PARTS = object()  # the answer for operators that are made of others


def _describe(value: Any, key: list[Any], tensors: list[Any]) -> None:
    """What of an argument decides the result's shape, and the tensors in it, in order."""
    if isinstance(value, Tensor):
        key.append(value.meta if type(value) is Shape else _meta(value))
        tensors.append(value)
    elif isinstance(value, (list, tuple)):
        key.append(len(value))
        for part in value:
            _describe(part, key, tensors)
    elif isinstance(value, SIMPLE):
        key += (type(value), value)
    else:
        key.append(value)


def _meta(tensor: Tensor) -> Meta:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def _ask(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, int]:
    """The answer of torch's fake tensors: how to make the results, and the FLOPs."""
    if func._overloadpacket not in FORMULAS and func._can_decompose():
        return PARTS, 0
    fakes = {id(tensor): _fake(tensor) for tensor in tensors}
    with _asked():
        given = tree_map(lambda value: fakes.get(id(value), value), (args, kwargs))
        out = func(*given[0], **given[1])
    formula = FORMULAS.get(func._overloadpacket)
    flops = 0 if formula is None else formula(*given[0], **given[1], out_val=out)
    of = [fakes[id(tensor)] for tensor in tensors]
    for tensor, fake in zip(tensors, of, strict=True):
        if _places(tensor) != _places(fake):
            raise NotImplementedError(f"{func} changes its argument of {_meta(tensor)} to {_meta(fake)}")
    return _remember(out, of), flops


def _places(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor are; the stride of a single row says nothing."""
    strides = [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]
    return tuple(tensor.shape), strides, tensor.storage_offset(), tensor.dtype


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor alike, in a storage of its own."""
    size, stride, offset, dtype = _meta(tensor)
    last = 0 if 0 in size else sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    meta = torch.empty(offset + last + 1, dtype=dtype, device="meta").as_strided(size, stride, offset)
    return FakeTensor(_asked(), meta, torch.device("cpu"))


def _remember(out: Any, given: list[Tensor]) -> Any:
    """How to make a result: ("same", i): argument i, ("view", i, meta) of it, or ("new", meta, bytes)."""
    if isinstance(out, (list, tuple)):
        return [_remember(one, given) for one in out]
    if not isinstance(out, Tensor):
        return ("value", out)
    for i, one in enumerate(given):
        if out is one:
            return ("same", i)
    storage = out.untyped_storage()
    for i, one in enumerate(given):
        if one.untyped_storage()._cdata == storage._cdata:
            return ("view", i, _meta(out))
    return ("new", _meta(out), storage.nbytes())


def _give(made: Any, tensors: list[Tensor]) -> Any:
    if isinstance(made, list):
        return [_give(one, tensors) for one in made]
    kind, first, *more = made
    if kind == "new":
        return Shape(first, torch.UntypedStorage(more[0], device="meta"))
    if kind == "view":
        return Shape(more[0], tensors[first].untyped_storage())
    return tensors[first] if kind == "same" else first
