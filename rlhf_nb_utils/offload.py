"""AdamW whose states live on the host: full-parameter training where they would not fit beside the weights.

A bf16 weight takes 2 bytes on the device, and its gradient 2 more while it is there; the fp32 master and both moments, 12
bytes, stay on the host, where the step is computed. While the backward pass runs, each finished gradient is copied out on a
second stream; the new weights come back bucket by bucket. A weight that is fp32 on the CPU is its own master, and nothing
is copied. Knows torch, and host memory that is pinned (`pinned`); nothing of this course.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from rlhf_nb_utils import pinned

BUCKET = 2**24  # weights that are updated, and copied back, at a time: 32 MiB of bf16
PIECE = 2**20  # weights whose gradients are fp32 at a time: 4 MiB, which stay in the processor's cache
LEAVING = 2**26  # bytes of streamed gradients that a device may still hold while they are copied out
CLIP_EPS = 1e-6  # clip_grad_norm_'s, so that the same gradients give the same step


class _Which:
    """Tells a gradient from another one, or from itself changed in place. An address would not do: it is used again."""

    def __init__(self, grad: Tensor):
        self.grad, self.version = weakref.ref(grad), grad._version

    def still(self, grad: Tensor) -> bool:
        return self.grad() is grad and self.version == grad._version


class _Bucket:
    """Some weights of one group, device and dtype, which lie apart from their fp32 master.

    ``flat`` holds master and moments: fp32, on the host. Through ``staging``, in the weights' dtype, gradients come in and new
    weights leave. ``sums`` (fp32) is there while micro-batches are added up on the host.
    """

    def __init__(self, group: int, params: list[Tensor], names: tuple[str, ...], staging: Tensor):
        sizes = [p.numel() for p in params]
        self.group, self.params, self.size, self.staging = group, params, sum(sizes), staging.zero_()
        self.flat = {name: torch.zeros(self.size, device="cpu") for name in (*names, "master")}
        self.arrived: dict[int, _Which] = {}  # whose gradient is in ``staging``, and which one
        self.sums: Tensor | None = None
        self.summed: set[int] = set()
        self.done: torch.cuda.Event | None = None  # of the copy of the new weights
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._at = {id(p): slice(end - size, end) for p, size, end in zip(params, sizes, ends)}

    def view(self, flat: Tensor, p: Tensor) -> Tensor:
        """The part of a flat tensor that is ``p``'s, in its shape."""
        return flat[self._at[id(p)]].view(p.shape)

    def runs(self, params: list[Tensor], steps: list[int]) -> list[tuple[int, int, int]]:
        """(start, end, step) of what lies together of ``params``, in their order, and has taken equally many steps."""
        found: list[tuple[int, int, int]] = []
        for at, step in zip((self._at[id(p)] for p in params), steps):
            if found and found[-1][1:] == (at.start, step):
                found[-1] = (found[-1][0], at.stop, step)
            else:
                found.append((at.start, at.stop, step))
        return found

    def add_up(self) -> None:
        """Move what arrived to the sums."""
        if self.sums is None:
            self.sums = torch.zeros(self.size, device="cpu")
        for p in self.params:
            if id(p) in self.arrived:
                self.view(self.sums, p).add_(self.view(self.staging, p))
        self.summed |= self.arrived.keys()
        self.arrived = {}

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        """Whose gradients there are, and their sums (None: they are in ``staging``); then there are none."""
        params, sums = [p for p in self.params if id(p) in self.arrived or id(p) in self.summed], self.sums
        self.arrived, self.sums, self.summed = {}, None, set()
        return params, sums


class CPUOffloadAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2; as in torch, the decay too is times lr), fp32 master and moments on the host.

    Arguments (but for ``foreach``, ``fused``, ``capturable`` and ``differentiable``: how a step is computed is settled here),
    parameter groups, schedulers and state dicts are those of ``torch.optim.AdamW``; besides:

    max_grad_norm: the global norm to which `step` clips the gradients of all groups together, or None.
    stream_gradients: free each gradient on the device once it is copied out, instead of at `zero_grad`. Micro-batches are then
        added up on the host, in fp32.

    All micro-batches of a step but the last belong inside ``with optimizer.accumulate():``, or sums would be copied that are not
    complete. ``grad_norm`` is the norm that the last `step` found, before clipping.

    A parameter's state is torch's own (``step``, ``exp_avg``, ``exp_avg_sq``) and, where the weight is not its own master,
    ``master``; plain AdamW loads it and goes on. Sparse gradients and closures are not supported.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        stream_gradients: bool = False,
    ):
        for name, value, valid in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0),
        ):
            if not valid:
                raise ValueError(f"{name} cannot be {value}")
        self.max_grad_norm, self.stream_gradients, self.grad_norm = max_grad_norm, stream_gradients, math.nan
        self._accumulating, self._worker = False, None
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._versions: dict[int, int] = {}  # of each weight, as this optimizer left it
        self._squares: dict[int, Tensor] = {}  # of each gradient that arrived from a device, summed there
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pending: dict[_Bucket, Future] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._scratch = torch.empty(PIECE, device="cpu")  # a piece's gradients in fp32
        # Every key of AdamW's groups: loading a dict that lacks one, AdamW would fill in Adam's own default.
        choices = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
        fixed = {"foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True}
        super().__init__(params, choices | fixed)

    # --- what a training loop calls -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around the backward pass of every micro-batch but the last: there is more to come."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False
            self._release(0)  # they need not lie there during the next forward pass

    def attach(self, model: nn.Module) -> CPUOffloadAdamW:
        """From now on `step` returns while the host still computes, and each layer's next forward pass waits for its weights.

        So do ``state_dict`` of the model and `weight_of`; whatever else reads weights must call `synchronize` first. Buckets
        are updated in the order of the parameters, which should be that of the forward pass. Returns the optimizer.
        """
        self._worker = self._worker or ThreadPoolExecutor(1, "offload")
        this = weakref.ref(self)  # the model may outlive the optimizer, whose states are large

        def wait(module: nn.Module, *_) -> None:
            if (optimizer := this()) is not None:
                optimizer._wait_for_weights(module)

        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(wait)
                module.register_state_dict_pre_hook(wait)
                module.awaits = [*getattr(module, "awaits", []), wait]
        return self

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update from the gradients there are. A parameter without one stays as it is, its moments included.

        Raises FloatingPointError, before any weight moves, if the gradient's norm is not finite.
        """
        if closure is not None:
            raise ValueError("CPUOffloadAdamW calls no closure: compute the gradients before the step")
        self.synchronize()
        self._collect()
        scale = self._clip()
        for group in self.param_groups:
            own = [p for g, p in self._own() if g is group]
            self._update(group, own, [p.grad for p in own], [self._state(p, group) for p in own], scale)
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))  # nothing may still read the weights that will be written
        for bucket in self._buckets:
            self._send(bucket, scale)
        self._squares.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that are on the host included."""
        super().zero_grad(set_to_none)
        for bucket in self._buckets:
            bucket.take()
        self._squares.clear()

    def synchronize(self) -> None:
        """Wait until the host is done with the last step. A device's current stream then waits for the copies of its weights."""
        self._wait_for(list(self._pending))

    def _wait_for(self, buckets: list[_Bucket]) -> None:
        """Until the host is done with these buckets, and their device knows that it has to wait for the copies."""
        for bucket in buckets:
            if (future := self._pending.pop(bucket, None)) is not None:
                future.result()
                if bucket.done is not None:
                    torch.cuda.current_stream(bucket.params[0].device).wait_event(bucket.done)

    def _wait_for_weights(self, module: nn.Module) -> None:
        if self._pending:
            found = (self._bucket_of.get(id(p)) for p in module.parameters(recurse=False))
            self._wait_for([bucket for bucket in found if bucket is not None])

    # --- parameters and states ----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        kinds: dict[tuple, list[Tensor]] = {}
        for p in self.param_groups[-1]["params"]:
            if _has_master(p):
                kinds.setdefault((p.device, p.dtype), []).append(p)
        for (device, dtype), params in kinds.items():
            if device.type == "cuda" and device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            parts = _parts(params, BUCKET)
            # Pinned where a device will read it; without CUDA nothing can pin memory.
            rooms = pinned.room([sum(p.numel() for p in part) for part in parts], dtype, pin=device.type == "cuda")
            for part, staging in zip(parts, rooms):
                self._add_bucket(_Bucket(len(self.param_groups) - 1, part, self._moments(self.param_groups[-1]), staging))

    def _add_bucket(self, bucket: _Bucket) -> None:
        this = weakref.ref(self)  # a hook outlives an optimizer that nobody holds any more
        self._buckets.append(bucket)
        for p in bucket.params:
            self._bucket_of[id(p)] = bucket
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: (optimizer := this()) and optimizer._on_gradient(p))

    def state_dict(self) -> dict:
        self.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take a state dict of this class or of plain AdamW. States stay on the host, in fp32, whatever the weights are.

        A ``master`` counts only where it rounds to the weight that is there; else the weight is the master.
        """
        self.synchronize()
        super().load_state_dict(state_dict | {"state": {}})  # the groups alone: torch would cast the states to the weights
        weights = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, p) in enumerate(weights):
            self.state.pop(p, None)
            if index in state_dict["state"]:
                own = self._state(p, group)
                for key in own.keys() & state_dict["state"][index].keys():
                    own[key].copy_(torch.as_tensor(state_dict["state"][index][key]))
                self._versions.pop(id(p), None)

    @staticmethod
    def _moments(group: dict) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))

    def _state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """The state of ``p``, made when it is first needed. If somebody else wrote the weight, it is the master from now on."""
        state, bucket = self.state[p], self._bucket_of.get(id(p))
        if not state:
            state["step"] = torch.zeros(())
            for name in self._moments(group):
                state[name] = torch.zeros_like(p) if bucket is None else bucket.view(bucket.flat[name], p).zero_()
            if bucket is not None:
                state["master"] = bucket.view(bucket.flat["master"], p)
        if bucket is not None and self._versions.get(id(p)) != p._version:
            weight = p.detach().cpu()
            if not torch.equal(state["master"].to(p.dtype), weight):
                state["master"].copy_(weight)
            self._versions[id(p)] = p._version
        return state

    def _own(self) -> Iterator[tuple[dict, Tensor]]:
        """(group, parameter) where a weight is its own master and has a gradient."""
        for group in self.param_groups:
            yield from ((group, p) for p in group["params"] if id(p) not in self._bucket_of and p.grad is not None)

    # --- gradients come in --------------------------------------------------------------------------------------------

    def _on_gradient(self, p: Tensor) -> None:
        if p.grad is None:
            raise RuntimeError("another CPUOffloadAdamW took this parameter's gradient: delete that one, then gc.collect()")
        if self.stream_gradients or not self._accumulating:
            self._fetch(p)

    @torch.no_grad()
    def _fetch(self, p: Tensor) -> None:
        """Start to copy a gradient into the staging buffer."""
        bucket = self._bucket_of[id(p)]
        self._wait_for([bucket])
        if self.stream_gradients and id(p) in bucket.arrived:  # one micro-batch more
            self._arrive(bucket)
            bucket.add_up()
        grad, here = p.grad, bucket.view(bucket.staging, p)
        if p.is_cuda:
            stream = self._streams[p.device]
            stream.wait_stream(torch.cuda.current_stream(p.device))
            with torch.cuda.stream(stream):
                self._squares[id(p)] = _square(grad)
                here.copy_(grad, non_blocking=True)
                if self.stream_gradients:
                    self._let_go(grad, stream.record_event())
        else:
            here.copy_(grad)
        bucket.arrived[id(p)] = _Which(grad)
        if self.stream_gradients:
            p.grad = None

    def _let_go(self, grad: Tensor, copied: torch.cuda.Event) -> None:
        """Hold a gradient until it is ``copied``, for its memory is not free before; and not too many of them.

        The host runs ahead of the device. Were it not to wait here, it would ask for the memory of the next gradients while
        all the earlier ones still lie there, and streaming would save nothing at the peak.
        """
        self._leaving.append((grad, copied))
        while self._leaving and self._leaving[0][1].query():
            self._leaving.popleft()
        self._release(LEAVING)

    def _release(self, most: int) -> None:
        """Wait for the oldest copies out until the gradients that are held take no more than ``most`` bytes."""
        while sum(gradient.nbytes for gradient, _ in self._leaving) > most:
            _, copied = self._leaving.popleft()
            copied.synchronize()

    def _collect(self) -> None:
        """Fetch what no hook saw (gradients set by hand, or changed since), then wait for all of it: the norm needs it."""
        for bucket in self._buckets:
            for p in bucket.params:
                if p.grad is None and not self.stream_gradients:
                    bucket.arrived.pop(id(p), None)  # taken back after the backward pass
                elif p.grad is not None and not (id(p) in bucket.arrived and bucket.arrived[id(p)].still(p.grad)):
                    self._fetch(p)
        for bucket in self._buckets:
            self._arrive(bucket)
            if bucket.sums is not None:
                bucket.add_up()
        self._leaving.clear()

    def _arrive(self, bucket: _Bucket) -> None:
        """Wait for the copies into a bucket."""
        if (stream := self._streams.get(bucket.params[0].device)) is not None:
            stream.synchronize()

    def _clip(self) -> Tensor | None:
        """What all gradients are divided by, fp32 scalar: (norm + CLIP_EPS) / max_grad_norm; None where that is at most 1."""
        squares = [_square(p.grad) for _, p in self._own()]
        for bucket in self._buckets:
            if bucket.sums is not None:
                squares.append(_square(bucket.sums))
                continue
            for p in (p for p in bucket.params if id(p) in bucket.arrived):
                square = self._squares.get(id(p))
                squares.append(_square(bucket.view(bucket.staging, p)) if square is None else square)
        places: dict[torch.device, list[Tensor]] = {}
        for square in squares:
            places.setdefault(square.device, []).append(square)
        self.grad_norm = math.sqrt(sum(torch.stack(some).sum().item() for some in places.values()))  # a wait for each device
        if not math.isfinite(self.grad_norm):
            raise FloatingPointError(f"gradient norm {self.grad_norm}: no weight was changed")
        if self.max_grad_norm is None or self.grad_norm + CLIP_EPS <= self.max_grad_norm:
            return None
        return torch.tensor((self.grad_norm + CLIP_EPS) / self.max_grad_norm)

    # --- weights go out -----------------------------------------------------------------------------------------------

    def _send(self, bucket: _Bucket, scale: Tensor | None) -> None:
        """Update a bucket now, or leave it to the worker. Its gradients are taken: the next ones may come, and `_fetch` waits."""
        params, sums = bucket.take()
        if not params:
            return
        group = dict(self.param_groups[bucket.group])  # as it is now: a scheduler may change it before the worker comes to it
        if self._worker is not None:
            self._pending[bucket] = self._worker.submit(self._finish, bucket, params, sums, scale, group)
            return
        self._finish(bucket, params, sums, scale, group)
        if bucket.done is not None:
            torch.cuda.current_stream(params[0].device).wait_event(bucket.done)

    @torch.no_grad()
    def _finish(self, bucket: _Bucket, params: list[Tensor], sums: Tensor | None, scale: Tensor | None, group: dict) -> None:
        """The host's part, and the weights on their way."""
        self._compute(bucket, params, sums, scale, group)
        stream = self._streams.get(params[0].device)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for p in params:
                p.copy_(bucket.view(bucket.staging, p), non_blocking=p.is_cuda)
                self._versions[id(p)] = p._version
            bucket.done = None if stream is None else stream.record_event()

    def _compute(self, bucket: _Bucket, params: list[Tensor], sums: Tensor | None, scale: Tensor | None, group: dict) -> None:
        """From the gradients in ``staging`` (or their sums) to the new weights in ``staging``."""
        states = [self._state(p, group) for p in params]
        for start, end, step in bucket.runs(params, [int(state["step"]) for state in states]):
            for piece in (slice(at, min(at + PIECE, end)) for at in range(start, end, PIECE)):
                own = {name: flat[piece] for name, flat in bucket.flat.items()} | {"step": torch.tensor(float(step))}
                gradient = self._scratch[: piece.stop - piece.start].copy_(bucket.staging[piece]) if sums is None else sums[piece]
                self._update(group, [own["master"]], [gradient], [own], scale)
                bucket.staging[piece].copy_(own["master"])
        for state in states:
            state["step"] += 1

    def _update(self, group: dict, masters: list[Tensor], gradients: list[Tensor], states: list[dict], scale) -> None:
        """torch's fused AdamW on host tensors, which divides the gradients by ``scale`` in the same pass."""
        if not masters:
            return
        moments = [[state[name] for state in states] for name in self._moments(group)]
        beta1, beta2 = group["betas"]
        adamw(
            masters, gradients, *moments, *([] if group["amsgrad"] else [[]]), [state["step"] for state in states],
            fused=True, grad_scale=scale, found_inf=None if scale is None else torch.zeros(()), amsgrad=group["amsgrad"],
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip


def _has_master(p: Tensor) -> bool:
    """Whether a weight is not its own master: it lies on a device, or is too coarse."""
    return p.device.type != "cpu" or p.dtype in (torch.bfloat16, torch.float16)


def weight_of(module: nn.Module) -> Tensor:
    """``module.weight``, for whoever reads it without a forward pass: waits if an attached optimizer still computes it."""
    for wait in getattr(module, "awaits", []):
        wait(module)
    return module.weight


def _square(grad: Tensor) -> Tensor:
    """Sum of squares: fp64 scalar, where the gradient lies. In one pass that writes nothing, as ``clip_grad_norm_`` has it."""
    return torch.linalg.vector_norm(grad, dtype=torch.float32).double().square()


def _parts(params: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Runs of parameters of at most ``limit`` elements together; a larger one is a run of its own."""
    parts: list[list[Tensor]] = [[]]
    for p in params:
        if parts[-1] and sum(q.numel() for q in parts[-1]) + p.numel() > limit:
            parts.append([])
        parts[-1].append(p)
    return parts
