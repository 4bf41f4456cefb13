"""Where a model's weights come from, read piece by piece: nobody needs to hold a whole model to load a part of it."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

View = Any
"""A tensor, or a slice of a file that is read where it is indexed: view[rows] or view[rows, columns]."""


class WeightSource(Protocol):
    """Named weights. `origin` says where from, for messages."""

    origin: str

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def view(self, name: str) -> View: ...


class TensorWeights:
    """Weights that are in memory."""

    def __init__(self, tensors: dict[str, Tensor], origin: str):
        self.tensors, self.origin = tensors, origin

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def view(self, name: str) -> Tensor:
        return self.tensors[name]


class OverlaidWeights:
    """Weights of `top`, and where it has none, of `below`."""

    def __init__(self, top: WeightSource, below: WeightSource):
        self.top, self.below, self.origin = top, below, f"{top.origin} over {below.origin}"
        self.names = set(top.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.below.shapes() | self.top.shapes()

    def view(self, name: str) -> View:
        return (self.top if name in self.names else self.below).view(name)


class RenamedWeights:
    """Weights of `source` under other names: {new name: name in the source}."""

    def __init__(self, source: WeightSource, names: dict[str, str]):
        self.source, self.names, self.origin = source, names, source.origin

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = self.source.shapes()
        return {new: found[name] for new, name in self.names.items() if name in found}

    def view(self, name: str) -> View:
        return self.source.view(self.names[name])


class ScaledWeights:
    """Weights of `source`, those whose name ends in `suffix` times `factor` (fp32)."""

    def __init__(self, source: WeightSource, suffix: str, factor: float):
        self.source, self.suffix, self.factor, self.origin = source, suffix, factor, source.origin

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.shapes()

    def view(self, name: str) -> View:
        view = self.source.view(name)
        return ScaledView(view, self.factor) if name.endswith(self.suffix) else view


class RowView:
    """Rows [start, stop) of a view, each of them changed by `change`, which takes and returns any number of whole rows."""

    def __init__(self, inner: View, start: int, stop: int, change: Callable[[Tensor], Tensor] = lambda rows: rows):
        self.inner, self.start, self.stop, self.change = inner, start, stop, change
        self.shape = (stop - start, *self[:1].shape[1:])

    def __getitem__(self, index: Any) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        first, last, _ = rows.indices(self.stop - self.start)
        part = self.change(self.inner[self.start + first : self.start + last])
        return part if columns == slice(None) else part[:, columns]


def shape_of(view: View) -> tuple[int, ...]:
    return tuple(view.shape if hasattr(view, "shape") else view.get_shape())


class ScaledView:
    def __init__(self, view: View, factor: float):
        self.inner, self.factor, self.shape = view, factor, shape_of(view)

    def __getitem__(self, index: Any) -> Tensor:
        return self.inner[index].float() * self.factor


def check_fits(model: nn.Module, source: WeightSource) -> None:
    """Raise ValueError naming what is missing, unknown or of another shape. Weights that nothing reads may be missing.

    model: whole, also on the meta device.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = misfits(wanted, source.shapes(), optional=model.unread)
    if problems:
        raise ValueError(f"{source.origin} does not fit the model: {problems}.")


def check_trained(model: nn.Module, source: WeightSource) -> None:
    """Raise ValueError where the source does not hold exactly what `model` trains. Weights that nothing reads may be there."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: shape for name, shape in source.shapes().items() if name not in model.unread}
    problems = misfits(wanted, found)
    if problems:
        raise ValueError(f"{source.origin} does not hold what this run trains: {problems}.")


def misfits(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], optional: Collection[str] = ()
) -> str:
    """What is missing, unknown or of another shape, in words; empty where everything fits."""
    missing = {name for name in wanted if name not in found and name not in optional}
    unknown = set(found) - set(wanted)
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"unknown: {some(unknown)}"] if unknown else []
    problems += [
        f"{name} is {shape} instead of {wanted[name]}"
        for name, shape in found.items()
        if name in wanted and shape != wanted[name]
    ][:8]
    return "; ".join(problems)


def some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


@torch.no_grad()
def fill(model: nn.Module, source: WeightSource) -> None:
    """Give a whole model on the meta device its weights, fp32 on the CPU."""
    check_fits(model, source)
    found = set(source.shapes())
    for owner, attribute, name, parameter in owned_parameters(model):
        value = source.view(name)[:].float() if name in found else torch.zeros(parameter.shape)
        setattr(owner, attribute, nn.Parameter(value.clone(), parameter.requires_grad))


def owned_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """(module, attribute, whole name, parameter) of all parameters. The parameters may be replaced on the way."""
    for prefix, module in list(model.named_modules()):
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            yield module, attribute, f"{prefix}.{attribute}" if prefix else attribute, parameter
