"""What a computation holds at its highest moment, found without doing it: fake tensors, counted while they live.

A model of many layers is traced with three and with four. Its peak is not a straight line in the layers, for it may move from
one place (the head) to another (the end of the backward pass); but between two marks (layer after layer, forward and
backward) it is, so each stretch is carried on by itself and the highest is the peak. Knows torch modules made of layers; does
not know PPO, nor what any memory is called in a ledger.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from rlhf_nb_utils.models import layers_of

FEW = (3, 4)  # layers that are traced: a first, a last, and one or two between them
Bytes = dict[str, float]  # kind -> bytes
# MemTracker's names -> ours
KINDS = {
    "Parameter": "weights", "Buffer": "weights", "Gradient": "gradients", "Activation": "activations", "Temp": "activations",
    "Optstate": "activations", "Other": "activations",
}  # fmt: skip


class Timeline(MemTracker):
    """A MemTracker that keeps the highest snapshot between two marks, and tells logits from other activations.

    ``head``: shape (V, d) of the LM head. Logits are whatever is made with V columns. A view is not made: the head lies
    transposed in its own product, and by its shape could not be told from the logits of d tokens.
    """

    def __init__(self, head: tuple[int, int] | None = None):
        super().__init__()
        self.head, self.stretch, self.logits, self.cache = head, "before", 0, 0
        self.highest: dict[str, Bytes] = {}

    def once_more(self, cache: int | None = None) -> None:
        """Before the modules are called again. If of what lies there ``cache`` bytes are a KV cache, all is counted anew."""
        self.stretch = "before"
        self.reset_mod_stats()
        if cache is not None:
            self.cache, self.highest = cache, {}

    def mark(self, stretch: str) -> None:
        """From here on it is called that."""
        self.stretch = stretch

    def _update_peak_stats(self, *_) -> None:
        """MemTracker's own peaks, module by module, take half of its time and are read by nobody here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and self._is_logits(function, tensor):
                self._count(tensor)
        now = dict.fromkeys((*KINDS.values(), "logits", "KV cache"), 0.0)
        for place in self.get_tracker_snapshot("current").values():
            for kind, size in place.items():
                if getattr(kind, "value", kind) in KINDS:
                    now[KINDS[kind.value]] += size
        now["logits"], now["KV cache"] = self.logits, self.cache
        now["activations"] -= self.logits + self.cache
        if sum(now.values()) > sum(self.highest.get(self.stretch, {"": -1.0}).values()):
            self.highest[self.stretch] = now
        return out

    def _is_logits(self, function, tensor: torch.Tensor) -> bool:
        if self.head is None or function.is_view or not tensor.is_floating_point():
            return False
        return tensor.ndim in (2, 3) and tensor.shape[-1] == self.head[0]

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not getattr(storage, "_counted", False) and tensor._base is None:
            storage._counted, size = True, storage.nbytes()
            self.logits += size
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.logits -= size


def peak(build: Callable[[int], nn.Module], run: Callable[[nn.Module, Timeline], None], layers: int, head=None) -> Bytes:
    """Bytes of each kind at the highest moment of ``run(build(layers), timeline)``, modules included.

    ``build(n)`` makes the module with n layers; both are called in fake mode, where sizes are all there is.
    """
    if layers <= FEW[1]:
        return _highest(_stretches(build, run, layers, head))
    few, more = (_stretches(build, run, n, head) for n in FEW)
    if few.keys() != more.keys():
        raise RuntimeError(f"the traces pass other stretches: {sorted(few)} and {sorted(more)}")
    steps = (layers - FEW[0]) / (FEW[1] - FEW[0])
    return _highest({at: {k: few[at][k] + steps * (more[at][k] - few[at][k]) for k in few[at]} for at in few})


def _highest(stretches: dict[str, Bytes]) -> Bytes:
    return max(stretches.values(), key=lambda kinds: sum(kinds.values()))


def _stretches(build, run, layers: int, head) -> dict[str, Bytes]:
    with FakeTensorMode():
        module, timeline = build(layers), Timeline(head)
        timeline.track_external(module)
        for p in module.parameters():
            if not p.requires_grad:  # MemTracker would hang its hooks on it, and fail
                timeline._param_to_grad_hook_handles[p] = (_NoHandle, _NoHandle)
        with contextlib.ExitStack() as stack:
            for handle in _marks(layers_of(module), timeline):
                stack.callback(handle.remove)
            with timeline:
                run(module, timeline)
        return timeline.highest


class _NoHandle:
    """In place of the handle of a hook."""

    @staticmethod
    def remove() -> None:
        pass


def _marks(layers: Sequence[nn.Module], timeline: Timeline) -> list:
    """Hooks that say where a trace is: before the layers, in the first, one between, or the last, behind them; and back again."""
    handles, last = [], len(layers) - 1
    for index, layer in enumerate(layers):
        where = "first" if index == 0 else "last" if index == last else "inner"

        def enter(_, inputs, where=where) -> None:
            timeline.mark(f"forward, {where}")
            if where == "first" and inputs and inputs[0].requires_grad:
                inputs[0].register_hook(lambda _: timeline.mark("backward, before"))

        def leave(_, __, output, where=where) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if state.requires_grad:
                state.register_hook(lambda _: timeline.mark(f"backward, {where}"))
            if where == "last":
                timeline.mark("behind")

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    return handles
