"""Ways to spend less device memory, each with its price in time: the switches of ``cfg.memory``, where they act.

An optimizer whose states are on the host, and the step that clips for either kind; modules that wait in host memory between
uses; layers that keep no activations; low-rank adapters, without which the policy is its own reference. Knows torch modules
and optimizers. Does not know losses, rollouts or what a policy is for; how much each saves is `memory`'s to say.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_nb_utils import pinned
from rlhf_nb_utils.config import MemoryConfig, TrainingError
from rlhf_nb_utils.offload import CPUOffloadAdamW

_recomputed = functools.partial(checkpoint, use_reentrant=False)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def make_optimizer(groups: Iterable, memory: MemoryConfig, model: nn.Module | None = None, **settings) -> torch.optim.Optimizer:
    """AdamW over parameter groups (or parameters), fused where that can be, or `CPUOffloadAdamW`; ``settings`` are AdamW's.

    The offloaded one computes behind the next forward pass of ``model``, if it is told which: see `settle`.
    Raises TrainingError for bf16 weights under plain AdamW: without an fp32 master, small steps round to nothing.
    """
    groups = list(groups)
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    if memory.optimizer == "offload":
        optimizer = CPUOffloadAdamW(groups, stream_gradients=memory.stream_gradients, **settings)
        return optimizer if model is None else optimizer.attach(model)
    if any(p.dtype == torch.bfloat16 for p in parameters):
        raise TrainingError(
            "bfloat16 weights need an fp32 master, which AdamW has not: memory.optimizer=offload, or models.dtype=float32 "
            "with autocast=true"
        )
    return torch.optim.AdamW(groups, fused=all(p.device.type in ("cpu", "cuda") for p in parameters), **settings)


def accumulating(optimizer: torch.optim.Optimizer, more: bool):
    """Around the backward pass of a micro-batch: an offloaded optimizer has to know whether there is ``more`` to come."""
    return optimizer.accumulate() if more and isinstance(optimizer, CPUOffloadAdamW) else contextlib.nullcontext()


def clipped_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Clip the global gradient norm, take the step, return the norm before clipping.

    Raises FloatingPointError, before any weight moves, if the norm is not finite.
    """
    if isinstance(optimizer, CPUOffloadAdamW):
        optimizer.max_grad_norm = max_grad_norm
        optimizer.step()
        return optimizer.grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}: no weight was changed")
    optimizer.step()
    return norm


def settle(optimizer: torch.optim.Optimizer) -> None:
    """At the end of a training, or of an iteration's updates: the weights are those of the last step, however they are read.

    After a step alone (`ppo.ppo_step`, say) an offloaded optimizer may still be computing: forward passes wait for it, and so
    do ``state_dict`` and `offload.weight_of`.
    """
    if isinstance(optimizer, CPUOffloadAdamW):
        optimizer.synchronize()


# --- where a module is, and what it is, while it works ----------------------------------------------------------------


def park(module: nn.Module, device: torch.device | str) -> nn.Module:
    """From now on the module lies in host memory, and is on ``device`` only while it is `at_work`. Returns it.

    The host's copy stays (pinned, if ``device`` is a CUDA device), so nothing is ever copied back: what changes the weights
    has to do it there, outside `at_work`. A reference that shares its policy's weights stays where they are.
    """
    if getattr(module, "adapters_off", False):
        return module
    module.to("cpu")
    if torch.device(device).type == "cuda":
        tensors = list(_tensors(module))
        for tensor, home in zip(tensors, pinned.copies([tensor.data for tensor in tensors])):
            tensor.data = home
    module.works_on = torch.device(device)
    return module


def waiting(module: nn.Module, memory: MemoryConfig, device: torch.device) -> nn.Module:
    """The module, parked if ``memory`` wants it so; on a CPU it is in host memory anyway."""
    return park(module, device) if memory.park and device.type != "cpu" else module


@contextlib.contextmanager
def at_work(module) -> Iterator[None]:
    """While this lasts, a parked module is on its device, and a reference that shares its policy's weights has no adapters.

    What computes with a module enters by itself; around several such calls it saves the copies between them.
    """
    device, bare = getattr(module, "works_on", None), getattr(module, "adapters_off", False)
    with contextlib.ExitStack() as stack:
        if device is not None:
            stack.enter_context(_on(module, device))
        if bare:
            stack.enter_context(_without_adapters(module))
        yield


@contextlib.contextmanager
def in_place_of(policy: nn.Module, reference: nn.Module) -> Iterator[None]:
    """While this lasts a parked reference is at work, and the policy is away from its device: there is room for one of them
    and a KV cache. Where the reference is not parked, it is at work, and the policy stays."""
    device = getattr(reference, "works_on", None)
    if device is None:
        with at_work(reference):
            yield
        return
    held = [(tensor, tensor.data.device) for tensor in _tensors(policy)]
    try:
        for tensor, _ in held:
            tensor.data = tensor.data.to("cpu")
        with at_work(reference):
            yield
    finally:
        for tensor, home in held:
            tensor.data = tensor.data.to(home)


@contextlib.contextmanager
def _on(module: nn.Module, device: torch.device) -> Iterator[None]:
    held = [(tensor, tensor.data) for tensor in _tensors(module)]
    module.works_on = None  # whoever enters once more finds it there
    try:
        for tensor, home in held:
            tensor.data = home.to(device, non_blocking=True, copy=True)
        yield
    finally:
        module.works_on = device
        for tensor, home in held:
            tensor.data = home


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# --- activations ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recomputing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """In a forward pass inside, each of the layers (transformers' ``GradientCheckpointingLayer``) keeps its input alone.

    Chen et al. 2016. The library does so in training mode only, and a policy is always in evaluation mode.
    """
    layers = [layer for layer in layers if torch.is_grad_enabled()]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing, layer.training, layer._gradient_checkpointing_func = True, True, _recomputed
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes):
            layer.gradient_checkpointing, layer.training = False, mode


# --- low-rank adapters ------------------------------------------------------------------------------------------------


def add_adapters(lm: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a language model and put low-rank adapters, fp32, beside every linear map but the head (Hu et al. 2022, eq. 3).

    At first they are zero, so the model computes what it did.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and rarely wanted

    lm.requires_grad_(False)
    transposed = any(type(module).__name__ == "Conv1D" for module in lm.modules())  # GPT-2's linear maps
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", fan_in_fan_out=transposed)
    inject_adapter_in_model(settings, lm)
    for p in lm.parameters():
        if p.requires_grad:
            p.data = p.data.float()  # a step of 1e-5 is lost on a bf16 weight


def adapted(module: nn.Module) -> list[nn.Module]:
    """The linear maps that have adapters."""
    return [layer for layer in module.modules() if hasattr(layer, "lora_A")]


def merged_state(lm: nn.Module) -> dict[str, Tensor]:
    """The state dict that the language model would have without adapters, their product added to the weights in fp32."""
    state = lm.state_dict()
    for name, layer in lm.named_modules():
        if hasattr(layer, "lora_A"):
            weight = f"{name}.base_layer.weight"
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            state[weight] = (state[weight].float() + delta.float()).to(state[weight].dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


@contextlib.contextmanager
def _without_adapters(module: nn.Module) -> Iterator[None]:
    active = [layer for layer in adapted(module) if not layer.disable_adapters]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
