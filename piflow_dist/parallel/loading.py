"""Give a model on the meta device this rank's share of its weights: never more than that and one tensor in memory."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from piflow_dist.models.weights import View, WeightSource, owned_parameters
from piflow_dist.parallel.topology import Topology, partition_dim


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Let glibc's malloc give every freed tensor back to the system at once.

    It learns to keep blocks of up to 32 MiB in a heap that then fragments: up to 1.7 times what is in use, seen while loading.
    Afterwards the thresholds are those that it would have learnt, because returning memory costs training time.
    """
    libc, megabyte = ctypes.CDLL(None), 1 << 20
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, megabyte // 4)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 * megabyte)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * megabyte)


@torch.no_grad()
@freed_memory_returned()
def load_sharded(model: nn.Module, source: WeightSource, topology: Topology, dtype: torch.dtype, config: dict) -> None:
    """Parameters of `model` (meta device, already split over the tensor-parallel group) -> ZeRO-3 shards from `source`.

    Every rank reads its own elements; nothing is sent. config: DeepSpeed's.
    """
    import deepspeed

    found, first = set(source.shapes()), None
    for owner, attribute, name, parameter in owned_parameters(model):
        whole = nn.Parameter(
            torch.empty(parameter.shape, dtype=dtype, device=topology.device), requires_grad=parameter.requires_grad
        )
        for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, mark):
                setattr(whole, mark, getattr(parameter, mark))
        setattr(owner, attribute, whole)
        if first is None:
            first, group = whole, topology.dp_group
            holder = nn.ParameterList([whole])  # DeepSpeed shards modules, and further parameters by their first
            deepspeed.zero.Init(holder, data_parallel_group=group, config_dict_or_path=config, mpu=topology.mpu)
        else:
            first.convert_to_zero_parameters([whole])
        whole.ds_tensor.zero_()
        if name in found:
            part = read_part(source.view(name), whole, topology)
            whole.ds_tensor[: len(part)].copy_(part)


@torch.no_grad()
@freed_memory_returned()
def load_slices(model: nn.Module, source: WeightSource, topology: Topology, dtype: torch.dtype) -> None:
    """Parameters of `model` (meta device, already split over the tensor-parallel group) -> this rank's slices from `source`.

    For models that are only evaluated: data-parallel ranks hold them whole. Every rank reads its own slices; nothing is sent.
    """
    found = set(source.shapes())
    for owner, attribute, name, parameter in owned_parameters(model):
        value = torch.zeros(parameter.shape, dtype=dtype, device=topology.device)
        if name in found:
            value.copy_(read_slice(source.view(name), parameter, topology))
        setattr(owner, attribute, nn.Parameter(value, requires_grad=False))


def read_slice(view: View, parameter: nn.Parameter, topology: Topology) -> Tensor:
    """The tensor-parallel rank's slice of a parameter, which has the slice's shape."""
    dim = partition_dim(parameter)
    if dim is None:
        return view[:]
    size = parameter.shape[dim]
    part = slice(topology.tp_rank * size, (topology.tp_rank + 1) * size)
    return view[part] if dim == 0 else view[:, part]


def read_part(view: View, parameter: nn.Parameter, topology: Topology) -> Tensor:
    """The elements of this rank, flat: a data-parallel rank's range of the tensor-parallel rank's slice."""
    shape, dim, size = tuple(parameter.ds_shape), partition_dim(parameter), parameter.partition_numel()
    begin, end = topology.dp_rank * size, min((topology.dp_rank + 1) * size, parameter.ds_numel)
    if begin >= end:
        return torch.empty(0)
    width = parameter.ds_numel // shape[0]
    first, last = begin // width, -(-end // width)
    rows = slice(first, last)
    if dim == 0:
        offset = topology.tp_rank * shape[0]
        rows = slice(offset + first, offset + last)
    columns = slice(topology.tp_rank * shape[1], (topology.tp_rank + 1) * shape[1]) if dim == 1 else None
    piece = view[rows] if columns is None else view[rows, columns]
    return piece.flatten()[begin - first * width : end - first * width]
