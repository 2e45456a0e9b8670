"""Checkpoints under everything that can happen to them: kill, full disk, bit rot, and an exact resume."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rlhf_nb_utils import checkpoint
from rlhf_nb_utils.checkpoint import CheckpointError, latest, load, save, write_json_atomic
from rlhf_nb_utils.config import CourseError


def tensors(value, size=64):
    return {"policy": {"weight": torch.full((size,), float(value))}, "rng": {"cpu": torch.arange(5, dtype=torch.uint8)}}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def assert_whole(path, step):
    loaded, state = load(path)
    assert state == {"step": step}
    assert set(loaded) == {"policy", "rng"}
    assert bool((loaded["policy"]["weight"] == step).all())


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ---- what goes in comes out ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    full = (torch.randn(4, 6) * 3).to(dtype)
    group = {
        "full": full,
        "scalar": full[0, 0],
        "empty": full[:0],
        "transposed": full.t(),
        "row": full[1],
        "strided": full[:, ::2],
        "flat": full.view(-1),
    }
    loaded, _ = load(save(tmp_path / "step-1", {"g": group, "nothing": {}}, {}))
    assert loaded["nothing"] == {}
    for name, tensor in group.items():
        assert loaded["g"][name].dtype == dtype and loaded["g"][name].shape == tensor.shape
        assert torch.equal(loaded["g"][name], tensor), name


def test_state_comes_back_equal(tmp_path):
    state = {"step": 3, "lr": 0.1 + 0.2, "names": ["a", "ü\n"], "nested": {"none": None, "big": 2**70, "yes": True}}
    assert load(save(tmp_path / "step-3", {}, state))[1] == state


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), (1, 2), {1: 2}, torch.zeros(2), object(), {1, 2}])
def test_state_that_would_come_back_changed_is_refused_and_leaves_nothing(tmp_path, bad):
    save(tmp_path / "step-1", tensors(1), {"step": 1})
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "step-2", tensors(2), {"x": bad})
    assert_one_line(error, "state.json")
    assert names(tmp_path) == ["step-1"]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    path = save(tmp_path / "step-1", {"model": model}, {})
    assert (path / "model.safetensors").stat().st_size < 2 * 7 * 3 * 4
    loaded = load(path)[0]["model"]
    assert loaded["0.weight"] is loaded["1.weight"]
    expected = model[0].weight.detach().clone()
    torch.nn.init.zeros_(model[0].weight)
    model.load_state_dict(loaded)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, expected)


def test_no_pickle_and_nothing_but_safetensors_and_json_is_written(tmp_path):
    path = save(tmp_path / "step-1", tensors(1), {"step": 1})
    assert names(path) == ["manifest.json", "policy.safetensors", "rng.safetensors", "state.json"]


# ---- which are kept, and which is the last ----


def test_the_last_two_are_kept_by_step_and_not_by_name(tmp_path):
    (tmp_path / "notes-7").mkdir()
    for step in (8, 9, 10):
        save(tmp_path / f"step-{step}", tensors(step), {"step": step})
    assert names(tmp_path) == ["notes-7", "step-10", "step-9"]
    (tmp_path / "notes-7").rmdir()
    assert latest(tmp_path) == tmp_path / "step-10"


def test_checkpoints_of_an_abandoned_future_go_when_an_earlier_step_is_saved(tmp_path):
    for step in (20, 40):
        save(tmp_path / f"step-{step}", tensors(step), {"step": step})
    save(tmp_path / "step-30", tensors(30), {"step": 30})
    assert names(tmp_path) == ["step-20", "step-30"]


def test_no_checkpoint_is_none_and_not_an_error(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "step-1")


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    save(tmp_path / "step-1", tensors(5), {"step": 5})
    save(tmp_path / "step-1", tensors(1), {"step": 1})
    assert_whole(tmp_path / "step-1", 1)
    assert names(tmp_path) == ["step-1"]


# ---- damage ----


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path / "policy.safetensors", 100),
    "one flipped bit in a tensor": lambda path: flip(path / "policy.safetensors", -3),
    "one flipped bit in a header": lambda path: flip(path / "policy.safetensors", 12),
    "one flipped digit in the state": lambda path: flip(path / "state.json", (path / "state.json").read_text().index("2,")),
    "a file gone": lambda path: (path / "rng.safetensors").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "an empty manifest": lambda path: (path / "manifest.json").write_text(""),
    "a manifest of something else": lambda path: (path / "manifest.json").write_text("[]"),
    "another format": lambda path: (path / "manifest.json").write_text('{"format": 99, "files": {}}'),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path / f"step-{step}", tensors(step), {"step": step, "pad": 0} if step == 2 else {"step": step})
    DAMAGE[damage](tmp_path / "step-2")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "step-2")
    assert issubclass(CheckpointError, CourseError)
    assert_one_line(error, "step-2", "delete this folder", "step-1 is used instead")
    with pytest.warns(UserWarning, match="step-2.*going on from step-1"):
        assert latest(tmp_path) == tmp_path / "step-1"
    assert_whole(tmp_path / "step-1", 1)


def test_a_flipped_byte_of_the_manifest_is_harmless_or_noticed(tmp_path):
    path = save(tmp_path / "step-1", tensors(1), {"step": 1})
    good = (path / "manifest.json").read_bytes()
    for position in range(0, len(good), 4):
        flip(path / "manifest.json", position)
        with contextlib.suppress(CheckpointError):
            assert_whole(path, 1)
        (path / "manifest.json").write_bytes(good)


def test_when_all_are_damaged_the_error_says_to_delete_them(tmp_path):
    save(tmp_path / "step-1", tensors(1), {"step": 1})
    DAMAGE["truncated"](tmp_path / "step-1")
    for ask in (latest, lambda folder: load(folder / "step-1")):
        with pytest.raises(CheckpointError) as error:
            ask(tmp_path)
        assert_one_line(error, "step-1", "policy.safetensors has 100 bytes", "delete", "anew")


# ---- a full disk ----


def full_in_save_file(monkeypatch):
    """What safetensors 0.8 raises on a full tmpfs, after part of the file was written."""

    def save_file(_, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def full_in(name, nth):
    def patch(monkeypatch):
        original, calls = getattr(os, name), []

        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    return patch


@pytest.mark.parametrize("patch", [full_in_save_file, *(full_in("fsync", n) for n in range(1, 7)), full_in("rename", 1)])
@pytest.mark.parametrize("name", ["step-2", "step-1"])
def test_a_full_disk_ends_in_one_line_keeps_the_last_and_leaves_nothing(tmp_path, monkeypatch, patch, name):
    save(tmp_path / "step-1", tensors(1), {"step": 1})
    with monkeypatch.context() as patched:
        patch(patched)
        with pytest.raises(CheckpointError) as error:
            save(tmp_path / name, tensors(2), {"step": 2})
    assert_one_line(error, "disk is full", "RLHF_NB_RUNS")
    after_the_rename = name in names(tmp_path) and load(tmp_path / name)[1] == {"step": 2}
    if not after_the_rename:
        assert_whole(tmp_path / "step-1", 1)
        assert "step-1, is kept" in str(error.value)
    assert all(not hidden.startswith(".") for hidden in names(tmp_path))
    save(tmp_path / "step-3", tensors(3), {"step": 3})
    assert_whole(latest(tmp_path), 3)


def test_another_error_of_the_disk_is_one_line_too(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "file" / "step-1", tensors(1), {"step": 1})
    assert_one_line(error, "could not be written", "RLHF_NB_RUNS")


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "stage.json"
    write_json_atomic(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(CheckpointError):
        write_json_atomic(path, {"a": float("nan")})
    with monkeypatch.context() as patched:
        full_in("fsync", 1)(patched)
        with pytest.raises(CheckpointError, match="disk is full"):
            write_json_atomic(path, {"a": 2})
    assert names(path.parent) == ["stage.json"]
    assert json.loads(path.read_text()) == {"a": 1}
    write_json_atomic(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


# ---- killed ----


def in_child_killed_at(name, nth, work):
    """Run ``work`` in a forked child that is killed by SIGKILL on its nth call of os.<name>; True if it got so far."""
    pid = os.fork()
    if pid == 0:
        original, calls = getattr(os, name), []

        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture
def one_thread():
    """A forked child has no use of the parent's pool of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("name", ["step-2", "step-1"])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_killed_at_any_call_the_last_complete_one_is_whole(tmp_path, one_thread, call, name):
    """Between any two calls that touch the disk, also while a checkpoint of the same name is replaced."""
    for nth in range(1, 30):
        folder = tmp_path / f"{nth}"
        save(folder / "step-1", tensors(1), {"step": 1})
        killed = in_child_killed_at(call, nth, lambda to=folder / name: save(to, tensors(2), {"step": 2}))
        loaded, state = load(folder / name) if name == "step-1" else load(latest(folder))
        assert state["step"] in ((1, 2) if killed else (2,))
        assert bool((loaded["policy"]["weight"] == state["step"]).all())
        save(folder / "step-3", tensors(3), {"step": 3})
        assert names(folder)[-1] == "step-3" and not any(n.endswith(".partial") for n in names(folder))
        if not killed:
            assert nth > 1
            return
    raise AssertionError("the child was killed every time")


SAVES_FOR_EVER = """
import sys, torch
from rlhf_nb_utils.checkpoint import save
step = int(sys.argv[2])
while True:
    step += 1
    tensors = {"policy": {"weight": torch.full((200_000,), float(step))}, "rng": {"cpu": torch.arange(5, dtype=torch.uint8)}}
    save(sys.argv[1] + f"/step-{step}", tensors, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_from_the_last_that_was_reported(tmp_path):
    root = Path(checkpoint.__file__).parent.parent
    done = 0
    for attempt in range(3):
        command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path), str(done)]
        run = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        reported = int(run.stdout.readline())
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        run.kill()  # SIGKILL
        reported = max([reported, *map(int, run.communicate()[0].split())])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no half-written folder is ever under a checkpoint's name
            path = latest(tmp_path)
        step = int(path.name.removeprefix("step-"))
        assert step in (reported, reported + 1)
        assert_whole(path, step)
        done = step


# ---- optimizer and exact resume ----


class Model(torch.nn.Module):
    """Tied embedding, dropout (so that the generator matters), a parameter that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.inner = torch.nn.Linear(6, 6)
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, ids):
        hidden = torch.nn.functional.dropout(torch.tanh(self.inner(self.embedding(ids))), 0.3)
        return self.head(hidden)


def start(seed, **options):
    torch.manual_seed(seed)
    model = Model()
    groups = [
        {"params": [model.embedding.weight, model.unused], "lr": 3e-2, "weight_decay": 0.0},
        {"params": list(model.inner.parameters()), "betas": (0.8, 0.95)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-5, weight_decay=0.1, **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)


def train(model, optimizer, schedule, steps):
    for _ in range(steps):
        ids = torch.randint(11, (5,))
        loss = torch.nn.functional.cross_entropy(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}, {"foreach": True}])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, options):
    model, optimizer, schedule = start(0, **options)
    train(model, optimizer, schedule, 4)
    saved_tensors, saved_state = checkpoint.optimizer_to_tensors(optimizer)
    groups = {"model": model, "optimizer": saved_tensors, "rng": checkpoint.rng_state()}
    path = save(tmp_path / "step-4", groups, {"optimizer": saved_state, "schedule": schedule.last_epoch})
    train(model, optimizer, schedule, 5)  # the uninterrupted run
    expected_draw = torch.rand(3)

    resumed, resumed_optimizer, resumed_schedule = start(99, **options)
    loaded, state = load(path)
    resumed.load_state_dict(loaded["model"])
    checkpoint.optimizer_from_tensors(resumed_optimizer, loaded["optimizer"], state["optimizer"])
    resumed_schedule.last_epoch = state["schedule"]
    checkpoint.set_rng_state(loaded["rng"])
    train(resumed, resumed_optimizer, resumed_schedule, 5)

    assert torch.equal(torch.rand(3), expected_draw)
    for (name, expected), value in zip(model.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(value, expected), name
    mine, theirs = resumed_optimizer.state_dict(), optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for i, values in theirs["state"].items():
        assert mine["state"][i].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(mine["state"][i][key], value) and mine["state"][i][key].dtype == value.dtype, key
    assert isinstance(mine["param_groups"][0]["betas"], tuple)


def test_loading_copies_so_that_two_optimizers_do_not_share_their_moments():
    model, optimizer, schedule = start(0)
    train(model, optimizer, schedule, 1)
    saved = checkpoint.optimizer_to_tensors(optimizer)
    other = start(0)[1]
    checkpoint.optimizer_from_tensors(other, *saved)
    moment = optimizer.state[model.inner.weight]["exp_avg"]
    before = moment.clone()
    for values in other.state.values():
        values["exp_avg"].fill_(7)
    assert torch.equal(moment, before)


class HostAdam(torch.optim.AdamW):
    """Keeps fp32 moments on the host, made at once, whatever its parameters are."""

    def __init__(self, parameters):
        super().__init__(parameters)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros(p.shape, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros(p.shape, dtype=torch.float32),
                }


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta stands for a GPU: another device than the host
@pytest.mark.parametrize("fresh", [torch.optim.AdamW, HostAdam])
def test_fp32_moments_of_bf16_weights_stay_fp32_and_stay_on_the_host(tmp_path, device, fresh):
    """Mistake 7: ``load_state_dict`` casts them to the parameter's dtype and moves them to its device."""
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16, device=device))
    optimizer = HostAdam([weight])
    moments = torch.tensor([1.0, 1e-3, 1.0 + 2**-20, 3.0])  # not all are bf16 numbers
    optimizer.state[weight]["exp_avg"].copy_(moments)
    optimizer.state[weight]["step"].fill_(12345)
    saved_tensors, saved_state = checkpoint.optimizer_to_tensors(optimizer)
    loaded, state = load(save(tmp_path / "step-1", {"optimizer": saved_tensors}, saved_state))

    resumed = fresh([torch.nn.Parameter(weight.detach())])
    checkpoint.optimizer_from_tensors(resumed, loaded["optimizer"], state)
    values = next(iter(resumed.state.values()))
    assert values["exp_avg"].dtype == torch.float32
    assert values["exp_avg"].device.type == values["step"].device.type == "cpu"
    assert torch.equal(values["exp_avg"], moments)
    assert values["step"].item() == 12345


def test_moments_beside_their_parameter_follow_it_to_another_device(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(4))
    saved = checkpoint.optimizer_to_tensors(HostAdam([weight]))
    moved = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, device="meta"))])
    checkpoint.optimizer_from_tensors(moved, *saved)
    values = next(iter(moved.state.values()))
    assert values["exp_avg"].device.type == "meta"
    assert values["step"].device.type == "cpu"  # where torch keeps it for kernels that are not fused


@pytest.mark.parametrize("shapes", [[(3,)], [(4,), (4,)], [(2, 2)]])
def test_an_optimizer_of_other_parameters_is_refused_in_one_line(shapes):
    saved = checkpoint.optimizer_to_tensors(HostAdam([torch.nn.Parameter(torch.zeros(4))]))
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes])
    with pytest.raises(CheckpointError) as error:
        checkpoint.optimizer_from_tensors(other, *saved)
    assert_one_line(error, "other parameters", "delete the checkpoint")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_numbers_of_cuda_go_on_where_they_were():
    states = checkpoint.rng_state()
    expected = torch.rand(3, device="cuda")
    checkpoint.set_rng_state(states)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_parts_of_one_tensor_are_written_without_a_copy_and_what_overlaps_with_one(tmp_path):
    whole = torch.arange(12.0)
    apart = {"first": whole[:4], "second": whole[4:].view(2, 4)}
    distinct, aliases = checkpoint._distinct(apart)
    assert not aliases and all(distinct[name].data_ptr() == apart[name].data_ptr() for name in apart)
    overlapping = {"all": whole, "middle": whole[3:9], "end": whole[8:]}
    for number, some in enumerate((apart, overlapping)):
        save(tmp_path / f"{number:06d}", {"states": some}, {})
        found = load(tmp_path / f"{number:06d}")[0]["states"]
        assert all(torch.equal(found[name], some[name]) for name in some)
