"""Bytes alive, floating-point operations and messages of code that runs on the meta device, by phase of the step."""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Peak:
    """Most bytes alive at once, and how many of these were the policy's."""

    total: float = 0
    policy: float = 0


@dataclass
class Messages:
    count: float = 0
    bytes: float = 0
    """Of what a rank has in the end: the sum of an all-reduce, the whole of an all-gather."""


@dataclass
class Record:
    peaks: dict[str, Peak] = field(default_factory=lambda: defaultdict(Peak))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    messages: dict[tuple[str, str], Messages] = field(default_factory=lambda: defaultdict(Messages))
    """By (phase, all-reduce or all-gather), within the tensor-parallel group."""
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Passes through a network, by phase."""
    kept: float = 0
    """The network's bytes that the forward pass leaves for the backward pass."""


COLLECTIVES = {"allreduce_": "all-reduce", "allgather_": "all-gather"}


class Tracker(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed, by the very code that is planned.

    Storages on the meta device are the network's; those on the CPU are the policy's, on a smaller latent, and count
    policy_scale times. Floating-point operations are those of matrix products.
    """

    def __init__(self, policy_scale: float):
        super().__init__()
        self.policy_scale, self.record, self.phase = policy_scale, Record(), "policy"
        self.network = self.policy = 0.0
        self.known: dict[int, tuple[weakref.ref, float, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._count_message(func, args)
            return out
        if func._overloadpacket in flop_registry and tree_leaves(out)[0].is_meta:
            self.count_flops(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out

    def count_flops(self, count: float) -> None:
        self.record.flops[self.phase] += count

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        self.record.calls[phase] += 1
        try:
            yield
        finally:
            self.phase = before

    def ignore(self, module: torch.nn.Module) -> None:
        """Weights are counted elsewhere."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(tensor.untyped_storage(), 0.0, True)

    def disown(self, tensor: Tensor) -> None:
        """Count a tensor no longer, though it lives: another one stands for it."""
        self._forget(tensor.untyped_storage()._cdata)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes() * (1.0 if tensor.is_meta else self.policy_scale)
        self._add(storage, size, tensor.is_meta)
        peak = self.record.peaks[self.phase]
        if self.network + self.policy > peak.total:
            peak.total, peak.policy = self.network + self.policy, self.policy

    def _add(self, storage: torch.UntypedStorage, size: float, network: bool) -> None:
        key = storage._cdata
        self.known[key] = (weakref.ref(storage, partial(self._freed, key)), size, network)
        self._change(size, network)

    def _freed(self, key: int, reference: weakref.ref) -> None:
        # The address may belong to a younger storage by now.
        if key in self.known and self.known[key][0] is reference:
            self._forget(key)

    def _forget(self, key: int) -> None:
        _, size, network = self.known.pop(key)
        self._change(-size, network)

    def _change(self, size: float, network: bool) -> None:
        if network:
            self.network += size
        else:
            self.policy += size

    def _count_message(self, func: Any, args: tuple) -> None:
        name = func._overloadpacket.__name__
        if name not in COLLECTIVES:
            raise NotImplementedError(f"The planner does not know the collective {name}. Add it to COLLECTIVES.")
        messages = self.record.messages[self.phase, COLLECTIVES[name]]
        messages.count += 1
        messages.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(args[0]))


@contextmanager
def fused_attention(tracker: Tracker) -> Iterator[None]:
    """Attention as the fused kernels do it: no S x S matrix is kept. (On the meta device torch would form one.)

    The function itself is replaced: modes of torch's function overrides are off inside a backward pass, where blocks are
    computed again.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return _Attention.apply(q, k, v, tracker)

    real, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


@contextmanager
def whole_attention() -> Iterator[None]:
    """Inside fused_attention: torch's own again, which the derivative's pass forms whole."""
    planned, F.scaled_dot_product_attention = F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = planned


class _Attention(torch.autograd.Function):
    """Queries (B,N,S,E), keys and values (B,N,R,E) -> (B,N,S,E), laid out (B,S,N,E) as the kernels return it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, tracker: Tracker) -> Tensor:  # noqa: ANN001 (torch's context)
        B, N, S, E = q.shape
        out = q.new_empty(B, S, N, E).transpose(1, 2)
        logsumexp = q.new_empty(B, N, S, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.tracker = tracker
        tracker.count_flops(4 * B * N * S * k.shape[2] * E)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        q, k = ctx.saved_tensors[:2]
        (B, N, S, E), R = q.shape, k.shape[2]
        # Five products where the forward pass has two; the gradient of the queries adds up in float32.
        ctx.tracker.count_flops(10 * B * N * S * R * E)
        sums = q.new_empty(B, S, N, E, dtype=torch.float32)
        gradients = tuple(q.new_empty(B, length, N, E).transpose(1, 2) for length in (S, R, R))
        del sums
        return (*gradients, None)
