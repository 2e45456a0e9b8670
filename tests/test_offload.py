"""The offloaded AdamW against torch's own, which it must not differ from, whatever the weights' dtype and place."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from rlhf_nb_utils import checkpoint
from rlhf_nb_utils.offload import CPUOffloadAdamW, weight_of

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def model(dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def gradients(net: nn.Module, step: int, scale=1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [(scale * torch.randn(p.shape, generator=generator)).to(p.dtype) for p in net.parameters()]


def feed(net: nn.Module, grads) -> None:
    for p, grad in zip(net.parameters(), grads):
        p.grad = None if grad is None else grad.clone()


def masters(optimizer, net) -> list[torch.Tensor]:
    return [optimizer.state[p].get("master", p.detach()) for p in net.parameters()]


def reference_of(net: nn.Module) -> nn.Module:
    """The fp32 model that starts where ``net`` starts: what the master weights have to follow."""
    return copy.deepcopy(net).float()


def worst(net, reference, optimizer) -> float:
    pairs = zip(masters(optimizer, net), reference.parameters())
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6], ids=["no clip", "clipped", "never clipped"])
@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True}], ids=["plain", "amsgrad", "maximize"])
def test_fifty_steps_are_those_of_adamw(dtype, clip, extra):
    net = model(dtype)
    reference = reference_of(net)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, **extra, max_grad_norm=clip)
    theirs = torch.optim.AdamW(reference.parameters(), **SETTINGS, **extra)
    for step in range(50):
        grads = gradients(net, step, scale=1 + step % 5)
        feed(net, grads)
        feed(reference, [grad.float() for grad in grads])
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or float("inf"))
        ours.step()
        theirs.step()
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert worst(net, reference, ours) <= 1e-6
    for p, master in zip(net.parameters(), masters(ours, net)):
        assert torch.equal(p, master.to(dtype))  # the weight is its master, rounded


def test_pure_bf16_fails_that_test():
    """At a rate of 1e-5 most steps are below half a unit of the last place: without a master they are lost."""
    net, settings = model(torch.bfloat16), SETTINGS | {"lr": 1e-5}
    start, pure, reference = copy.deepcopy(net), copy.deepcopy(net), reference_of(net)
    ours, naive = CPUOffloadAdamW(net.parameters(), **settings), torch.optim.AdamW(pure.parameters(), **settings)
    theirs = torch.optim.AdamW(reference.parameters(), **settings)
    for step in range(50):
        for each in (net, pure, reference):
            feed(each, [grad.to(next(each.parameters()).dtype) for grad in gradients(net, step)])
        for optimizer in (ours, naive, theirs):
            optimizer.step()
    assert worst(net, reference, ours) <= 1e-6
    off = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(pure.parameters(), reference.parameters()))
    assert off > 1e-4
    moved = [(a != b).float().mean().item() for a, b in zip(pure.parameters(), start.parameters())]
    assert moved[0] < 0.5  # of the first matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stream", [False, True], ids=["kept", "streamed"])
def test_accumulated_micro_batches_are_one_batch(dtype, stream):
    net = model(dtype)
    reference = reference_of(net)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, max_grad_norm=0.1, stream_gradients=stream)
    theirs = torch.optim.AdamW(reference.parameters(), **SETTINGS)
    for step in range(10):
        batch = torch.randn(12, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
        sums = [torch.zeros(p.shape) for p in net.parameters()]
        parts = batch.split(4)
        for k, part in enumerate(parts):
            loss = net(part).float().square().mean() / 3
            found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            sums = [a + b.float() for a, b in zip(sums, found)]
            if k < len(parts) - 1:
                with ours.accumulate():
                    loss.backward()
            else:
                loss.backward()
        apart = dtype != torch.float32
        assert all((p.grad is None) == (stream and apart) for p in net.parameters())
        feed(reference, sums)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        ours.step()
        ours.zero_grad()
        theirs.step()
    # Streamed, the sum is fp32; kept on the device it is bf16, and rounds at each addition.
    assert worst(net, reference, ours) <= (1e-6 if stream or not apart else 2e-2)


def test_streamed_gradients_of_different_micro_batches_may_be_of_different_parameters():
    net = model(torch.bfloat16)
    reference = reference_of(net)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, stream_gradients=True)
    theirs = torch.optim.AdamW(reference.parameters(), **SETTINGS)
    one, other = torch.ones(2, 7, dtype=torch.bfloat16), torch.ones(2, 16, dtype=torch.bfloat16)
    losses = (lambda: net[2](other).float().sum(), lambda: net[:3](one).float().sum())  # net[4] gets nothing at all
    for _ in range(3):
        found = zip(*(torch.autograd.grad(loss(), list(net.parameters()), allow_unused=True) for loss in losses))
        given = [[grad.float() for grad in pair if grad is not None] for pair in found]
        sums = [sum(grads) if grads else None for grads in given]
        with ours.accumulate():
            losses[0]().backward()
        losses[1]().backward()
        feed(reference, sums)
        ours.step()
        ours.zero_grad()
        theirs.step()
    assert "exp_avg" not in ours.state[net[4].weight] and worst(net, reference, ours) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_parameter_without_gradient_stays_as_it_is(dtype):
    net = model(dtype)
    reference, before = reference_of(net), copy.deepcopy(net)
    ours, theirs = CPUOffloadAdamW(net.parameters(), **SETTINGS), torch.optim.AdamW(reference.parameters(), **SETTINGS)
    for step in range(4):
        grads = [grad if step % 2 or i != 2 else None for i, grad in enumerate(gradients(net, step))]
        grads[0] = None  # never
        feed(net, grads)
        feed(reference, [None if grad is None else grad.float() for grad in grads])
        ours.step()
        theirs.step()
    assert torch.equal(net[0].weight, before[0].weight) and worst(net, reference, ours) <= 1e-6
    assert ours.state[net[2].weight]["step"] == 2 == theirs.state[reference[2].weight]["step"]


def test_groups_schedulers_and_groups_added_later():
    net = model(torch.bfloat16)
    reference = reference_of(net)

    def groups(net):
        return [{"params": list(net[0].parameters()), "lr": 1e-2}, {"params": list(net[2].parameters()), "weight_decay": 0.0}]

    ours, theirs = CPUOffloadAdamW(groups(net), **SETTINGS), torch.optim.AdamW(groups(reference), **SETTINGS)
    for optimizer, each in ((ours, net), (theirs, reference)):
        optimizer.add_param_group({"params": list(each[4].parameters()), "betas": (0.5, 0.9)})
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=8) for o in (ours, theirs)]
    for step in range(8):
        grads = gradients(net, step)
        feed(net, grads)
        feed(reference, [grad.float() for grad in grads])
        for each in (ours, theirs, *schedulers):
            each.step()
    assert worst(net, reference, ours) <= 1e-6


def test_tied_weights_are_one_parameter():
    net = nn.ModuleDict({"embed": nn.Embedding(11, 4), "head": nn.Linear(4, 11, bias=False)}).to(torch.bfloat16)
    net["head"].weight = net["embed"].weight
    reference = reference_of(net)
    ours, theirs = CPUOffloadAdamW(net.parameters(), **SETTINGS), torch.optim.AdamW(reference.parameters(), **SETTINGS)
    ids = torch.arange(5)
    for _ in range(3):
        net["head"](net["embed"](ids)).float().square().mean().backward()
        reference["embed"].weight.grad = net["embed"].weight.grad.float()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert len(list(net.parameters())) == 1 and worst(net, reference, ours) <= 1e-6


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_is_the_run(dtype):
    net = model(dtype)
    ours = CPUOffloadAdamW(net.named_parameters(), **SETTINGS, max_grad_norm=1.0)
    for step in range(3):
        feed(net, gradients(net, step))
        ours.step()
    other, saved = copy.deepcopy(net), copy.deepcopy(ours.state_dict())
    fresh = CPUOffloadAdamW(other.named_parameters(), lr=9.0, max_grad_norm=1.0)
    fresh.load_state_dict(saved)
    for step in range(3, 6):
        for each, optimizer in ((net, ours), (other, fresh)):
            feed(each, gradients(net, step))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(masters(ours, net), masters(fresh, other)))
    state = fresh.state[next(iter(other.parameters()))]
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in state.values())
    assert saved["param_groups"][0]["param_names"][0] == "0.weight"


def test_state_dicts_go_to_plain_adamw_and_back():
    net = model()
    there, ours = copy.deepcopy(net), CPUOffloadAdamW(net.parameters(), **SETTINGS)
    theirs = torch.optim.AdamW(there.parameters(), **SETTINGS)
    for turn in range(3):
        for step in range(2):
            for each, optimizer in ((net, ours), (there, theirs)):
                feed(each, gradients(net, 10 * turn + step))
                optimizer.step()
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in (ours, theirs)]
        assert saved[0].keys() == saved[1].keys() and saved[0]["state"][0].keys() == saved[1]["state"][0].keys()
        assert saved[0]["param_groups"][0].keys() == saved[1]["param_groups"][0].keys()
        ours, theirs = CPUOffloadAdamW(net.parameters(), lr=9.0), torch.optim.AdamW(there.parameters(), lr=9.0)
        ours.load_state_dict(saved[1])
        theirs.load_state_dict(saved[0])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(net.parameters(), there.parameters()))


def test_with_bf16_weights_plain_adamw_goes_on_from_a_masters_state_and_a_master_is_made_from_its_weights():
    net = model(torch.bfloat16)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS)
    feed(net, gradients(net, 0))
    ours.step()
    there = copy.deepcopy(net)
    theirs = torch.optim.AdamW(there.parameters(), lr=9.0)
    theirs.load_state_dict(ours.state_dict())  # which casts: torch's AdamW keeps what its weights are
    assert theirs.param_groups[0]["lr"] == SETTINGS["lr"]
    for state, own in zip(theirs.state.values(), ours.state.values()):
        assert state["exp_avg"].dtype == torch.bfloat16 and torch.equal(state["exp_avg"], own["exp_avg"].bfloat16())
    feed(there, gradients(net, 1))
    theirs.step()
    back, last = copy.deepcopy(there), copy.deepcopy(theirs.state_dict())
    for state in last["state"].values():
        state.pop("master", None)  # plain AdamW has none of its own
    fresh = CPUOffloadAdamW(back.parameters(), lr=9.0)
    fresh.load_state_dict(last)
    assert all(torch.equal(m, p.float()) for m, p in zip(masters(fresh, back), back.parameters()))
    feed(back, gradients(net, 2))
    fresh.step()
    assert all(state["exp_avg"].dtype == torch.float32 for state in fresh.state.values())
    assert not any(torch.equal(p, q) for p, q in zip(back.parameters(), there.parameters()))


def test_the_state_of_bf16_weights_survives_plain_adamws_layout_and_a_checkpoint(tmp_path):
    """A master goes through safetensors; loading does not cast fp32 moments to bf16 (mistake 7)."""
    net = model(torch.bfloat16)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS)
    for step in range(3):
        feed(net, gradients(net, step))
        ours.step()
    tensors, state = checkpoint.optimizer_to_tensors(ours)
    checkpoint.save(tmp_path / "step1", {"optimizer": tensors}, {"optimizer": state})
    tensors, state = checkpoint.load(tmp_path / "step1")
    other = copy.deepcopy(net)
    fresh = CPUOffloadAdamW(other.parameters(), lr=9.0)
    fresh.load_state_dict({"state": _by_index(tensors["optimizer"]), "param_groups": ours.state_dict()["param_groups"]})
    for each, optimizer in ((net, ours), (other, fresh)):
        feed(each, gradients(net, 3))
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(masters(ours, net), masters(fresh, other)))


def _by_index(tensors):
    state = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return state


def test_weights_written_by_somebody_else_are_the_master():
    net = model(torch.bfloat16)
    ours = CPUOffloadAdamW(net.parameters(), **(SETTINGS | {"lr": 1e-6}))
    feed(net, gradients(net, 0))
    ours.step()
    net.load_state_dict(model(torch.bfloat16, seed=1).state_dict())
    feed(net, gradients(net, 1))
    ours.step()
    for p, fresh in zip(masters(ours, net), model(torch.bfloat16, seed=1).parameters()):
        assert (p - fresh.float()).abs().max() < 1e-3
    saved = copy.deepcopy(ours.state_dict())
    other = model(torch.bfloat16, seed=2)  # not the weights that the state belongs to
    fresh = CPUOffloadAdamW(other.parameters())
    fresh.load_state_dict(saved)
    feed(other, gradients(other, 2, scale=1e-12))
    fresh.step()
    for p, start in zip(masters(fresh, other), model(torch.bfloat16, seed=2).parameters()):
        assert (p - start.float()).abs().max() < 1e-3


# --- the hooks, the worker, bad input ---------------------------------------------------------------------------------


def test_attached_the_host_computes_behind_the_next_forward_pass():
    net = model(torch.bfloat16)
    twin = copy.deepcopy(net)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, max_grad_norm=0.5).attach(net)
    plain = CPUOffloadAdamW(twin.parameters(), **SETTINGS, max_grad_norm=0.5)
    for step in range(20):
        batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).bfloat16()
        for each, optimizer in ((net, ours), (twin, plain)):
            each(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()  # must not take the gradients from the worker
    ours.synchronize()
    assert not ours._pending
    assert all(torch.equal(a, b) for a, b in zip(masters(ours, net), masters(plain, twin)))


@pytest.mark.parametrize("read", ["state_dict", "weight_of", "optimizer_to_tensors", "forward"])
def test_attached_whoever_reads_weights_gets_those_of_the_last_step(read, monkeypatch):
    net, pause = (
        nn.ModuleDict({"body": nn.Linear(7, 4), "head": nn.Linear(4, 11, bias=False)}).to(torch.bfloat16),
        threading.Event(),
    )
    before = copy.deepcopy(net.state_dict())
    ours = CPUOffloadAdamW(net.parameters(), lr=0.1).attach(net)
    monkeypatch.setattr(ours, "_finish", lambda *args, do=ours._finish: (pause.wait(10), do(*args))[1])
    net["head"](net["body"](torch.ones(2, 7).bfloat16())).float().square().sum().backward()
    ours.step()
    assert ours._pending and torch.equal(net["head"].weight, before["head.weight"])  # the host has not begun
    threading.Timer(0.1, pause.set).start()
    if read == "state_dict":
        weight = net.state_dict()["head.weight"]
    elif read == "weight_of":
        weight = weight_of(net["head"])
    elif read == "optimizer_to_tensors":
        checkpoint.optimizer_to_tensors(ours)
        weight = net["head"].weight
    else:
        net["head"](torch.ones(1, 4).bfloat16())
        weight = net["head"].weight
    assert (weight - before["head.weight"]).abs().min() > 0.05
    assert weight_of(nn.Linear(2, 2)).shape == (2, 2)  # which nobody attached to


def test_a_model_does_not_keep_the_states_of_an_optimizer_that_is_gone():
    net = model(torch.bfloat16)
    ours = CPUOffloadAdamW(net.parameters()).attach(net)
    net(torch.ones(2, 7).bfloat16()).float().sum().backward()
    ours.step()
    ours.synchronize()
    states = weakref.ref(ours._buckets[0].flat["master"])
    del ours
    gc.collect()
    assert states() is None
    net(torch.ones(2, 7).bfloat16())
    net.state_dict()


def test_a_device_holds_few_gradients_that_are_on_their_way_out(monkeypatch):
    """Were all of them there at the same time, streaming would save nothing at the peak."""
    monkeypatch.setattr("rlhf_nb_utils.offload.LEAVING", 100)
    ours, waited = CPUOffloadAdamW(model(torch.bfloat16).parameters(), stream_gradients=True), []

    class Event:
        def __init__(self, number):
            self.number = number

        def query(self):
            return self.number == over

        def synchronize(self):
            waited.append(self.number)

    over = None
    for number, size in enumerate((10, 20, 15, 500, 5, 5)):
        ours._let_go(torch.zeros(size, dtype=torch.bfloat16), Event(number))
        assert sum(grad.nbytes for grad, _ in ours._leaving) <= 100
    assert waited == [0, 1, 2, 3] and len(ours._leaving) == 2
    over = 4  # and is not waited for
    ours._let_go(torch.zeros(3, dtype=torch.bfloat16), Event(6))
    assert [event.number for _, event in ours._leaving] == [5, 6] and waited == [0, 1, 2, 3]
    with ours.accumulate():
        assert len(ours._leaving) == 2
    assert not ours._leaving and waited[4:] == [5, 6]


def test_a_gradient_taken_back_after_the_backward_pass_is_none():
    net = model(torch.bfloat16)
    before, ours = copy.deepcopy(net), CPUOffloadAdamW(net.parameters(), **SETTINGS)
    net(torch.ones(2, 7).bfloat16()).float().sum().backward()
    net[0].weight.grad = None
    ours.step()
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters())]
    assert moved == [False, *[True] * 5] and "step" not in ours.state[net[0].weight]


def test_gradients_changed_after_the_backward_pass_are_the_ones_used():
    net = model(torch.bfloat16)
    twin = copy.deepcopy(net)
    ours, plain = CPUOffloadAdamW(net.parameters(), **SETTINGS), CPUOffloadAdamW(twin.parameters(), **SETTINGS)
    net(torch.ones(2, 7).bfloat16()).float().sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        p.grad.mul_(-1)
        q.grad = p.grad.clone()
    ours.step()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


def test_a_gradient_in_the_place_of_another_is_not_taken_for_it():
    """Its address may be the same, and so may its version."""
    net = model(torch.bfloat16)
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS)
    net(torch.ones(2, 7).bfloat16()).float().sum().backward()
    for p in net.parameters():
        address, version, place = p.grad.data_ptr(), p.grad._version, p.grad.data
        p.grad = None
        place *= -3
        p.grad = place.data  # whose count of versions begins anew
        assert (p.grad.data_ptr(), p.grad._version) == (address, version)
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).float().norm()
    ours.step()
    assert ours.grad_norm == pytest.approx(expected.item(), rel=1e-3)


def test_two_optimizers_attached_to_one_model_are_both_waited_for(monkeypatch):
    net, pause = model(torch.bfloat16), threading.Event()
    before = copy.deepcopy(net)
    both = [CPUOffloadAdamW(net[index].parameters(), lr=0.1).attach(net) for index in (0, 2)]
    for optimizer in both:
        monkeypatch.setattr(optimizer, "_finish", lambda *args, do=optimizer._finish: (pause.wait(10), do(*args))[1])
    net(torch.ones(2, 7).bfloat16()).float().square().sum().backward()
    for optimizer in both:
        optimizer.step()
    threading.Timer(0.1, pause.set).start()
    assert not torch.equal(weight_of(net[0]), before[0].weight) and not torch.equal(weight_of(net[2]), before[2].weight)


def test_what_zero_grad_forgets_no_step_uses():
    net = model(torch.bfloat16)
    before = copy.deepcopy(net)
    for stream in (False, True):
        ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, stream_gradients=stream)
        for _ in range(2):
            net(torch.ones(2, 7).bfloat16()).float().sum().backward()
        ours.zero_grad()
        ours.step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters()))


def test_an_optimizer_that_is_gone_takes_no_gradients():
    net = model(torch.bfloat16)
    first = CPUOffloadAdamW(net.parameters(), stream_gradients=True)
    del first
    gc.collect()
    net(torch.ones(2, 7).bfloat16()).float().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_moves_nothing(bad, dtype):
    net = model(dtype)
    before, ours = copy.deepcopy(net), CPUOffloadAdamW(net.parameters(), **SETTINGS, max_grad_norm=1.0)
    grads = gradients(net, 0)
    grads[-1][0] = bad
    feed(net, grads)
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters()))


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}, {"max_grad_norm": 0.0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CPUOffloadAdamW(model().parameters(), **wrong)


def test_buckets_hold_runs_of_parameters(monkeypatch):
    monkeypatch.setattr("rlhf_nb_utils.offload.BUCKET", 100)
    monkeypatch.setattr("rlhf_nb_utils.offload.PIECE", 37)  # in the middle of rows
    net = model(torch.bfloat16)
    reference = reference_of(net)
    ours, theirs = CPUOffloadAdamW(net.parameters(), **SETTINGS), torch.optim.AdamW(reference.parameters(), **SETTINGS)
    sizes = [bucket.size for bucket in ours._buckets]
    assert sizes == [112, 16, 256, 16 + 48 + 3] and sum(sizes) == sum(p.numel() for p in net.parameters())
    for step in range(3):
        grads = [None if (step, index) == (1, 4) else grad for index, grad in enumerate(gradients(net, step))]  # a run in two
        feed(net, grads)
        feed(reference, [None if grad is None else grad.float() for grad in grads])
        ours.step()
        theirs.step()
    assert worst(net, reference, ours) <= 1e-6
    last = ours._buckets[-1]
    assert last.runs(last.params, [2, 3, 3]) == [(0, 16, 2), (16, 67, 3)] and last.runs(last.params[::2], [3, 3]) == [
        (0, 16, 3), (64, 67, 3),
    ]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stream", [False, True], ids=["kept", "streamed"])
@pytest.mark.parametrize("attached", [False, True], ids=["waits", "attached"])
def test_on_a_device_the_numbers_are_those_of_the_host(dtype, stream, attached):
    net = model(dtype).cuda()
    reference = reference_of(net).cpu()
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, max_grad_norm=0.5, stream_gradients=stream)
    ours = ours.attach(net) if attached else ours
    theirs = torch.optim.AdamW(reference.parameters(), **SETTINGS)
    for step in range(20):
        batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(step)).to("cuda", dtype)
        loss = net(batch).float().square().mean()
        feed(reference, [grad.float().cpu() for grad in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        ours.step()
        ours.zero_grad()
        theirs.step()
        ours.synchronize()
    pairs = zip(masters(ours, net), reference.parameters())
    assert max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs) <= 1e-5
    assert all(value.device.type == "cpu" for state in ours.state.values() for value in state.values())
    assert all(bucket.staging.is_pinned() for bucket in ours._buckets)


@pytest.mark.cuda
def test_on_a_device_streamed_micro_batches_are_summed_and_a_resumed_run_is_the_run(monkeypatch):
    monkeypatch.setattr("rlhf_nb_utils.offload.LEAVING", 200)
    net = model(torch.bfloat16).cuda()
    reference = reference_of(net).cpu()
    ours = CPUOffloadAdamW(net.parameters(), **SETTINGS, max_grad_norm=0.5, stream_gradients=True).attach(net)
    theirs = torch.optim.AdamW(reference.parameters(), **SETTINGS)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(ours.state_dict())
            ours = CPUOffloadAdamW(net.parameters(), lr=9.0, max_grad_norm=0.5, stream_gradients=True).attach(net)
            ours.load_state_dict(saved)
        batch = torch.randn(9, 7, generator=torch.Generator().manual_seed(step)).to("cuda", torch.bfloat16)
        sums = [torch.zeros(p.shape) for p in net.parameters()]
        for k, part in enumerate(batch.split(3)):
            loss = net(part).float().square().mean()
            found = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            sums = [a + b.float().cpu() for a, b in zip(sums, found)]
            with ours.accumulate() if k < 2 else contextlib.nullcontext():
                loss.backward()
        assert all(p.grad is None for p in net.parameters())
        feed(reference, sums)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        ours.step()
        ours.zero_grad()
        theirs.step()
    ours.synchronize()
    assert max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(masters(ours, net), reference.parameters())) <= 1e-5


def test_a_scheduler_that_steps_before_the_host_has_computed_changes_the_next_step_only(monkeypatch):
    """`step` returns early; the rate of this step is what it was when it was called."""
    moved, net, pause = {}, model(torch.bfloat16), threading.Event()
    for attached in (False, True):
        own = copy.deepcopy(net)
        optimizer = CPUOffloadAdamW(own.parameters(), lr=0.1, weight_decay=0.0)
        if attached:
            optimizer.attach(own)
            monkeypatch.setattr(optimizer, "_finish", lambda *a, do=optimizer._finish: (pause.wait(10), do(*a))[1])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
        feed(own, [torch.ones_like(p) for p in own.parameters()])
        optimizer.step()
        scheduler.step()
        if attached:
            pause.set()
        optimizer.synchronize()
        moved[attached] = [(p - q).abs().mean().item() for p, q in zip(own.parameters(), net.parameters())]
    assert moved[True] == moved[False] and min(moved[True]) > 0.05


def test_a_second_optimizer_over_the_same_weights_says_so():
    net = model(torch.bfloat16)
    both = [CPUOffloadAdamW(net.parameters(), stream_gradients=True) for _ in range(2)]
    with pytest.raises(RuntimeError, match="another CPUOffloadAdamW took this parameter's gradient"):
        sum(p.sum() for p in net.parameters()).backward()
    assert len(both) == 2
