"""Stages at the smallest size: found again, rebuilt for a reason, never half there, and resumed after any end."""

import errno
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_nb_utils import data, models, stages, store
from rlhf_nb_utils import ppo as ppo_
from rlhf_nb_utils.checkpoint import CheckpointError
from rlhf_nb_utils.config import CourseError, TrainingError, field_names, load_config
from rlhf_nb_utils.ngrams import NGramLinear
from rlhf_nb_utils.tracking import MetricsLogger, read_metrics

TIMINGS = {"wall_time", "ppo/seconds", "ppo/tokens_per_second", "ppo/peak_memory_mib"}
NAMES = ("sft", "preferences", "reward_model", "ppo", "evaluation")


class Killed(BaseException):
    """What no `except Exception` sees."""


# --- a course in miniature ----------------------------------------------------------------------------------------------


def invented_reviews():
    """Reviews nobody wrote, 24 for each use, every opening different."""
    words = itertools.product(("old", "new", "long", "odd"), ("film", "story", "cast", "plot"), ("fine", "dull", "warm"), "ab")
    texts = [f"{a.title()} {b}s {c}{tag} enough to be seen twice, and I did. Watch it." for a, b, c, tag in words]
    rows = [data.Review(f"r-{i:03d}", text, i % 2) for i, text in enumerate(texts)]
    return {role: rows[24 * i : 24 * (i + 1)] for i, role in enumerate(("evaluation", "ppo", "preferences", "sft"))}


def isolate(patch, runs):
    """Runs in a folder of their own, on invented reviews, unmoved by whoever edits the package or data/ meanwhile."""
    patch.setenv("RLHF_NB_RUNS", str(runs))
    patch.setattr(store, "_data_hash", lambda: "data")
    patch.setattr(store, "_code_hash", lambda *_: "code")
    patch.setattr(stages, "MetricsLogger", functools.partial(MetricsLogger, tensorboard=False))
    patch.setattr(data, "_embedded", invented_reviews)


def settings(folder, **changes):
    small = {
        "models.policy": f"{folder}/lm", "models.evaluator": f"{folder}/evaluator",
        "data.n_sft": 20, "data.n_preferences": 16, "data.n_ppo": 12, "data.n_evaluation": 8,
        "sft.batch_size": 8, "sft.max_length": 48, "preferences.criterion": "descriptiveness",
        "rollouts.response_length": 5, "rollouts.batch_size": 64, "reward_model.backbone": "policy",
        "reward_model.pooling": "last", "reward_model.max_length": 48, "reward_model.batch_size": 8,
        "ppo.iterations": 5, "ppo.batch_size": 4, "ppo.num_mini_batches": 2, "ppo.num_ppo_epochs": 2,
        "ppo.learning_rate": 2e-3, "ppo.checkpoint_interval": 2, "ppo.evaluation_interval": 2,
        "ppo.kl_controller": "adaptive", "ppo.kl_target": 0.2, "ppo.kl_horizon": 20,
        "evaluation.n_prompts": 4, "evaluation.best_of_n": 2, "evaluation.best_of_prompts": 4,
        "evaluation.bootstrap_samples": 100,
    }  # fmt: skip
    return load_config("smoke", overrides=small | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a language model, an evaluator, and runs/ in which everything before PPO is built."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = models.load_tokenizer("tiny-gpt2")
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.1, "bos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=0, **shape)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    NGramLinear(np.linspace(-1, 1, 64)).save(folder / "evaluator")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder / "runs")
        stages.reward_model(settings(folder))
    return folder


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """What an uninterrupted PPO stage leaves: its rows, samples and weights."""
    runs = tmp_path_factory.mktemp("straight") / "runs"
    shutil.copytree(base / "runs", runs)
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, runs)
        return left_by(stages.ppo(settings(base)))


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """A copy of the runs of ``base``, to be spoilt; the settings that go with it."""
    shutil.copytree(base / "runs", tmp_path / "runs")
    isolate(monkeypatch, tmp_path / "runs")
    return SimpleNamespace(cfg=settings(base), folder=base, runs=tmp_path / "runs" / "smoke" / "stages")


def left_by(stage):
    rows = [{key: value for key, value in row.items() if key not in TIMINGS} for row in stage.history]
    return (
        rows,
        (stage.path / "samples.jsonl").read_text(),
        [(row["iteration"], row["response"]) for row in map(json.loads, (stage.path / "watched.jsonl").open())],
        load_file(stage.path / "model.safetensors"),
        stage.summary,
    )


def assert_same(stage, straight, exactly=True):
    rows, samples, watched, tensors, summary = left_by(stage)
    expected_rows, expected_samples, expected_watched, expected_tensors, expected_summary = straight
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and samples == expected_samples and watched == expected_watched
    close = functools.partial(pytest.approx, rel=0 if exactly else 1e-4, abs=0 if exactly else 1e-5)
    assert rows == [close(row) for row in expected_rows] and summary == close(expected_summary)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=0, atol=0 if exactly else 1e-5)


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


# --- built once, found again --------------------------------------------------------------------------------------------


def test_all_five_stages_are_built_in_order_once_and_then_only_found(base, tmp_path, monkeypatch, capsys):
    isolate(monkeypatch, tmp_path)
    cfg = settings(base)
    assert all(store.find(cfg, name) is None for name in NAMES)
    built = stages.evaluation(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("stage ")] == [
        f"stage {name}: building, because it is not there yet" for name in NAMES
    ]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert stages.evaluation(cfg) == built == store.find(cfg, "evaluation") == store.require(cfg, "evaluation")
    assert capsys.readouterr().out == "" and times == {path: path.stat().st_mtime_ns for path in times}
    assert {path.name for path in (tmp_path / "smoke/stages").glob("[!.]*")} == {store.stage_dir(cfg, n).name for n in NAMES}


def test_what_the_stages_hold(here, straight):
    cfg = here.cfg
    evaluation = stages.evaluation(cfg)
    sft, preferences, scored, trained = (store.find(cfg, name) for name in NAMES[:4])
    assert [row["step"] for row in sft.history] == [1, 2, 3] and sft.summary["steps"] == 3  # 18 demonstrations, by 8
    assert sft.history[-1]["sft/heldout_loss"] == sft.summary["heldout_loss"] < sft.summary["heldout_loss_before"]
    train, heldout = stages.load_comparisons(preferences)
    assert len(train) + len(heldout) == 16 and not {c.query for c in train} & {c.query for c in heldout}
    reward_model = stages.load_reward_model(scored, cfg)
    own = [(c.query, r) for c in heldout for r in c.responses]
    normalised = reward_model.normalise(reward_model.score(*map(list, zip(*own))))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-4) and normalised.std(correction=0).item() == pytest.approx(1)
    assert_same(trained, straight)
    assert not (trained.path / "checkpoints").exists()
    rows = trained.history
    assert [row["step"] for row in rows if "ppo/evaluation_score" in row] == [1, 2, 4, 5]
    policy, tokenizer = stages.load_policy(trained, cfg)
    before, _ = stages.load_policy(sft, cfg)
    assert tokenizer.padding_side == "left" and policy.value_head.weight.any() and not before.value_head.weight.any()
    assert any(not torch.equal(a, b) for a, b in zip(policy.lm.parameters(), before.lm.parameters()))
    first, after, best = stages.load_evaluation(evaluation)
    assert first.queries == after.queries == [data.split_opening(r, cfg.data)[0] for r in invented_reviews()["evaluation"][:4]]
    assert set(after.scores) == {"gold", "proxy", "independent"} and best.proxy.shape == best.gold.shape == (4, 2)
    assert not np.abs(first.kl).max() > 1e-4 and after.kl.mean() == pytest.approx(evaluation.summary["kl"])
    judge, texts = stages.pf.make_scorer("descriptiveness", cfg), [q + r for q, r in zip(after.queries, after.responses)]
    assert after.scores["gold"] == pytest.approx(judge(texts))
    assert after.scores["proxy"] == pytest.approx(reward_model.score(after.queries, after.responses).numpy(), abs=1e-5)
    assert [len(group) for group in best.responses] == [2] * 4 and best.queries == after.queries
    watched = stages.load_watched(evaluation)
    assert list(watched) == [1, 2, 4, 5] and set(watched[1]) == {"kl", "length", "ended", "gold", "proxy", "independent"}
    logged = {row["step"]: row for row in rows if "ppo/evaluation_score" in row}
    for step, columns in watched.items():
        assert columns["proxy"].mean() == pytest.approx(logged[step]["ppo/evaluation_score"], abs=1e-4)
        assert columns["kl"].mean() == pytest.approx(logged[step]["ppo/evaluation_kl"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"sft__epochs": 2}, "sft"), ({"data__n_sft": 21}, "sft"), ({"device": "auto"}, "sft"),
        ({"models__autocast": True}, "sft"), ({"preferences__noise": 2.0}, "preferences"),
        ({"rollouts__response_length": 6}, "preferences"), ({"rollouts__top_k": 5}, "preferences"),
        ({"rollouts__top_p": 0.9}, "preferences"), ({"models__judge": "another"}, "preferences"),
        ({"reward_model__loss": "margin"}, "reward_model"), ({"models__reward_backbone": "another"}, "reward_model"),
        ({"rollouts__temperature": 0.9}, "ppo"), ({"ppo__kl_coef": 0.3}, "ppo"), ({"data__n_ppo": 13}, "ppo"),
        ({"evaluation__best_of_n": 3}, "evaluation"), ({"models__evaluator": "another"}, "evaluation"),
    ],
)  # fmt: skip
def test_a_setting_changes_the_hash_of_the_stage_that_reads_it_and_of_all_after_it(here, change, first):
    changed = settings(here.folder, **change)
    different = [store.stage_hash(changed, name) != store.stage_hash(here.cfg, name) for name in NAMES]
    assert different == [i >= NAMES.index(first) for i in range(5)]


def test_the_seed_the_data_and_the_code_change_every_hash(here, monkeypatch):
    def hashes(cfg=here.cfg):
        return [store.stage_hash(cfg, name) for name in NAMES]

    before = hashes()
    assert len({*before}) == 5 and hashes() == before
    seed = hashes(here.cfg.model_copy(update={"seed": 1}))
    monkeypatch.setattr(store, "_code_hash", lambda *_: "other")
    code = hashes()
    monkeypatch.setattr(store, "_data_hash", lambda: "other")
    assert not any(len({*row}) < 4 for row in zip(before, seed, code, hashes()))


def test_no_setting_is_forgotten_by_the_hashes():
    read = [key for keys in store.SETTINGS.values() for key in keys]
    assert [name for name in field_names() if name not in read and name.split(".")[0] not in read] == []


def test_a_rebuild_says_what_changed(here, monkeypatch, capsys):
    def lines(cfg, name="preferences"):
        getattr(stages, name)(cfg)
        return [line.removeprefix("stage ") for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]

    assert lines(here.cfg) == []
    assert lines(settings(here.folder, sft__learning_rate=1e-4)) == [
        "sft: building, because sft.learning_rate was 0.0005 and is 0.0001",
        "preferences: building, because stage sft before it changed",
    ]
    assert lines(settings(here.folder, sft__learning_rate=1e-4, preferences__noise=2.0)) == [
        "preferences: building, because preferences.noise was 1.0 and is 2.0"
    ]
    monkeypatch.setattr(store, "_code_hash", lambda *_: "other")
    assert lines(here.cfg, "sft") == ["sft: building, because sft.learning_rate was 0.0001 and is 0.0005"]
    monkeypatch.setattr(store, "_code_hash", lambda *_: "third")
    assert lines(here.cfg, "sft") == ["sft: building, because the code changed"]
    monkeypatch.setattr(store, "_data_hash", lambda: "other")
    assert lines(here.cfg, "sft") == ["sft: building, because the data changed"]


def test_a_model_trained_anew_in_the_same_folder_is_another_model(here, tmp_path):
    shutil.copytree(here.folder / "lm", tmp_path / "lm")
    cfg = settings(here.folder, models__policy=str(tmp_path / "lm"))
    before = store.stage_hash(cfg, "sft")
    assert store.stage_hash(cfg, "sft") == before
    os.utime(tmp_path / "lm/model.safetensors", ns=(1, 1))
    assert store.stage_hash(cfg, "sft") != before


# --- missing, half-written, locked --------------------------------------------------------------------------------------


def spoil(path, how):
    if how == "no record":
        (path / "stage.json").unlink()
    elif how == "half a record":
        (path / "stage.json").write_text((path / "stage.json").read_text()[:40])
    elif how == "a file is missing":
        (path / "model.safetensors").unlink()
    else:
        os.truncate(path / "model.safetensors", 1000)


@pytest.mark.parametrize("how", ["no record", "half a record", "a file is missing", "a file is cut short"])
def test_a_half_written_stage_is_not_found_and_is_built_anew(here, capsys, how):
    whole = store.require(here.cfg, "sft")
    weights = {name: tensor.clone() for name, tensor in load_file(whole.path / "model.safetensors").items()}
    spoil(whole.path, how)
    assert store.find(here.cfg, "sft") is None
    with pytest.raises(store.StageError, match="missing or stale"):
        store.require(here.cfg, "sft")
    again = stages.sft(here.cfg)
    assert "stage sft: building, because it is half-written" in capsys.readouterr().out
    assert again.summary == whole.summary and store.require(here.cfg, "sft") == again
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(again.path / "model.safetensors").items())


def test_a_missing_stage_is_one_line_that_names_the_command(here):
    with pytest.raises(store.StageError) as error:
        store.require(here.cfg, "ppo")
    assert str(error.value) == "stage ppo is missing or stale: `python -m rlhf_nb_utils.course stage ppo --profile smoke`"


def lock(cfg, name):
    path = store.stage_dir(cfg, name)
    return FileLock(path.parent / f".{path.name}.lock")


def test_two_builders_at_once_is_one_clear_line_and_readers_are_not_shut_out(here):
    with lock(here.cfg, "ppo"), pytest.raises(store.StageError) as error:
        stages.ppo(here.cfg)
    assert str(error.value).startswith("stage ppo is being built by another run: wait for it") and "\n" not in str(error.value)
    assert not list(here.runs.glob("ppo-*"))
    with lock(here.cfg, "sft"):
        assert stages.sft(here.cfg) == store.find(here.cfg, "sft")


def test_what_a_killed_build_left_is_not_mixed_into_the_next(here, capsys):
    whole = store.require(here.cfg, "sft")
    steps = [row["step"] for row in whole.history]
    partial = whole.path.with_name(whole.path.name + ".partial")
    whole.path.rename(partial)  # killed just before the rename
    (partial / "left over").write_text("x")
    again = stages.sft(here.cfg)
    assert "because an earlier run of it was interrupted" in capsys.readouterr().out
    assert [row["step"] for row in again.history] == steps and not (again.path / "left over").exists() and not partial.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TrainingError("SFT loss is nan at step 3"), RuntimeError("a bug")])
def test_a_build_that_fails_leaves_nothing_and_its_error_is_kept(here, monkeypatch, error):
    before = files_under(here.runs)

    def fail(self, path):
        Path(path, "half").write_text("x")
        raise error

    monkeypatch.setattr(models.Policy, "save", fail)
    with pytest.raises(type(error)) as raised:
        stages.sft(settings(here.folder, sft__epochs=2))
    assert raised.value is error and files_under(here.runs) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # the tokenizers library
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(here, monkeypatch, error):
    before = files_under(here.runs)

    def full(self, path):
        Path(path, "half").write_text("x")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(models.Policy, "save", full)
        with pytest.raises(store.StageError, match=r"^the disk is full at .*: free some space; finished stages") as raised:
            stages.sft(settings(here.folder, sft__epochs=2))
    assert "\n" not in str(raised.value) and files_under(here.runs) == before
    assert store.find(here.cfg, "sft") and stages.sft(settings(here.folder, sft__epochs=2)).summary["steps"] == 6


# --- PPO, stopped and resumed -------------------------------------------------------------------------------------------


def stop_at(iteration, error=Killed):
    """A callback that ends the run after this iteration's logs and checkpoint."""

    def callback(state, *_):
        if state.iteration == iteration:
            raise error

    return callback


def partial_of(cfg):
    path = store.stage_dir(cfg, "ppo")
    return path.with_name(path.name + ".partial")


def killed_run(folder, runs, iteration):
    """In a process of its own: PPO until the end of ``iteration``, then SIGKILL in the middle of a line of the log."""
    isolate(pytest.MonkeyPatch(), runs)
    cfg = settings(folder)

    def callback(state, *_):
        if state.iteration == iteration:
            for name in ("metrics.jsonl", "samples.jsonl", "watched.jsonl"):
                with open(partial_of(cfg) / name, "a") as file:
                    file.write('{"iteration": 9, "st')
            os.kill(os.getpid(), signal.SIGKILL)

    stages.ppo(cfg, callback)


def test_killed_with_sigkill_a_run_goes_on_from_its_checkpoint_to_the_same_end(here, straight, capsys):
    code = f"import test_stages; test_stages.killed_run({str(here.folder)!r}, {str(here.runs.parents[1])!r}, 3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = partial_of(here.cfg)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3] and store.find(here.cfg, "ppo") is None
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["000002"]
    done = []
    stage = stages.ppo(here.cfg, lambda state, *_: done.append(state.iteration))
    assert done == [3, 4, 5] and "because an earlier run of it was interrupted" in capsys.readouterr().out
    assert_same(stage, straight, exactly=False)  # another process: memory may be laid out differently


@pytest.mark.parametrize(
    ("moment", "again"),
    [("before a checkpoint", 5), ("after a checkpoint", 3), ("while the policy is saved", 1), ("before the rename", 1)],
)
def test_stopped_at_any_moment_a_run_goes_on_to_the_same_end_bit_for_bit(here, straight, monkeypatch, moment, again):
    iteration = {"before a checkpoint": 1, "after a checkpoint": 2}.get(moment, 99)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "while the policy is saved":

            def save(self, path):
                Path(path, "model.safetensors").write_text("half")
                raise Killed

            patch.setattr(models.Policy, "save", save)
        if moment == "before the rename":
            patch.setattr(stages.checkpoint, "write_json_atomic", lambda *_: (_ for _ in ()).throw(Killed))
        stages.ppo(here.cfg, stop_at(iteration))
    references, train, iterations = [], ppo_.train, []

    def spy(state, *args):
        references.append({name: p.clone() for name, p in state.reference.lm.named_parameters()})
        return train(state, *args)

    monkeypatch.setattr(ppo_, "train", spy)
    stage = stages.ppo(here.cfg, lambda state, *_: iterations.append(state.iteration))
    assert len(iterations) == again
    assert_same(stage, straight)
    assert store.find(here.cfg, "ppo") == stage and not partial_of(here.cfg).exists()
    sft, _ = stages.load_policy(store.require(here.cfg, "sft"), here.cfg)
    assert all(torch.equal(p, references[0][name]) for name, p in sft.lm.named_parameters())


def stopped_after_four(here):
    with pytest.raises(Killed):
        stages.ppo(here.cfg, stop_at(5))
    checkpoints = partial_of(here.cfg) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000002", "000004"]
    return checkpoints


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(here, straight):
    os.truncate(stopped_after_four(here) / "000004/policy.safetensors", 500)
    iterations = []
    with pytest.warns(UserWarning, match="000004 .*is corrupt: going on from 000002"):
        stage = stages.ppo(here.cfg, lambda state, *_: iterations.append(state.iteration))
    assert iterations == [3, 4, 5]
    assert_same(stage, straight)


def test_if_every_checkpoint_is_corrupt_one_line_says_what_to_delete(here, straight):
    checkpoints = stopped_after_four(here)
    for path in checkpoints.iterdir():
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no usable checkpoint: .*delete them, and the run starts anew") as error:
        stages.ppo(here.cfg)
    assert "\n" not in str(error.value)
    shutil.rmtree(checkpoints)
    assert_same(stages.ppo(here.cfg), straight)


def test_a_full_disk_during_ppo_keeps_the_last_good_checkpoint(here, straight, monkeypatch):
    writes, save_file = [], stages.checkpoint.save_file

    def full(tensors, path):
        writes.append(path)
        if len(writes) > 2:  # policy and optimizer of iteration 2 were written
            Path(path).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(stages.checkpoint, "save_file", full)
        with pytest.raises(CourseError, match="disk is full") as error:
            stages.ppo(here.cfg)
    assert "\n" not in str(error.value)
    assert [path.name for path in (partial_of(here.cfg) / "checkpoints").iterdir()] == ["000002"]
    assert_same(stages.ppo(here.cfg), straight)


def test_a_score_that_is_not_a_number_names_the_iteration_and_keeps_the_last_good_checkpoint(here, straight, monkeypatch):
    load, sick = stages.load_reward_model, []

    def load_sick(stage, cfg):
        model = load(stage, cfg)
        score = model.score
        model.score = lambda queries, responses: score(queries, responses) * (math.nan if sick else 1.0)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(stages, "load_reward_model", load_sick)
        with pytest.raises(TrainingError, match="PPO stopped at iteration 4: reward_fn gave the score nan") as error:
            stages.ppo(here.cfg, lambda state, *_: sick.append(1) if state.iteration == 3 else None)
    assert "\n" not in str(error.value)
    assert [path.name for path in (partial_of(here.cfg) / "checkpoints").iterdir()] == ["000002"]
    assert store.find(here.cfg, "ppo") is None
    assert_same(stages.ppo(here.cfg), straight)


def test_samples_are_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [json.dumps({"iteration": i, "query": "q", "response": "naïve \u2028 line"}) for i in (1, 2, 2, 3)]
    path.write_text("\n".join(rows) + '\n{"iteration": 2, "que')
    stages._cut(path, 2)
    assert path.read_text() == "".join(row + "\n" for row in rows[:3]) and os.listdir(tmp_path) == ["samples.jsonl"]
    stages._cut(path, 0)
    assert path.read_text() == ""


# --- the runs a recipe is compared with ----------------------------------------------------------------------------------


def test_a_run_may_be_rewarded_by_the_annotator_itself(here):
    cfg = settings(here.folder, ppo__reward="annotator")
    trained, watched = stages.ppo(cfg), stages.load_watched(stages.evaluation(cfg))
    logged = {row["step"]: row["ppo/evaluation_score"] for row in trained.history if "ppo/evaluation_score" in row}
    for step, columns in watched.items():
        assert columns["gold"].mean() == pytest.approx(logged[step], abs=1e-4)
        assert abs(columns["proxy"].mean() - logged[step]) > 1e-3
    assert store.find(here.cfg, "ppo") is None  # another stage than the reward model's run


def test_without_sft_the_policy_is_the_base_model(here):
    cfg = settings(here.folder, sft__epochs=0)
    stage = stages.sft(cfg)
    assert stage.history == [] and stage.summary["heldout_loss"] == stage.summary["heldout_loss_before"]
    base = models.load_policy(cfg.models.policy)
    policy, _ = stages.load_policy(stage, cfg)
    assert all(torch.equal(a, b) for a, b in zip(base.lm.parameters(), policy.lm.parameters()))


# --- comparisons made elsewhere, settings that cannot work ---------------------------------------------------------------


def write_pairs(path, n):
    rows = [{"prompt": f"Film {i}", "chosen": " is good.", "rejected": " is bad."} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_comparisons_made_elsewhere_train_a_reward_model_and_a_changed_file_rebuilds_it(here, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, 20)
    cfg = settings(here.folder, preferences__source=str(path))
    first = stages.reward_model(cfg)
    train, heldout = stages.load_comparisons(stages.preferences(cfg))
    assert len(train) + len(heldout) == 20 and train[0].scores is None
    assert first.summary["accuracy"]["gold"] is None and first.summary["accuracy"]["pairs"] == len(heldout)
    write_pairs(path, 21)
    assert stages.reward_model(cfg).path != first.path


def test_settings_ppo_refuses_are_refused_before_anything_is_trained(base, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path / "runs")
    for changes in ({"rollouts__top_k": 5}, {"ppo__kl_coef": 0}):
        with pytest.raises(TrainingError):
            stages.ppo(settings(base, **changes))
    assert not (tmp_path / "runs").exists()


def test_code_hash_is_of_what_a_stage_imports_and_of_no_comment(tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    files = {
        "top": "from pkg import middle\nx = 1\n",
        "middle": "def f():\n    from pkg.low import g\n    return g()\n",
        "low": "def g():\n    return 1\n",
        "plots": "y = 1\n",
    }
    for name, source in files.items():
        (package / f"{name}.py").write_text(source)
    before = store.code_hash("top", package)

    def after(name: str, source: str) -> str:
        (package / f"{name}.py").write_text(source)
        found = store.code_hash("top", package)
        (package / f"{name}.py").write_text(files[name])
        return found

    assert after("low", 'def g():\n    """Why."""\n    return 1  # one\n') != after("low", "def g():\n    return 2\n")
    assert after("middle", files["middle"] + "# a remark\n") == before
    assert after("plots", "y = 2\n") == before
    assert after("low", "def g():\n    return 2\n") != before


def test_code_hash_is_of_the_modules_that_python_loads(tmp_path):
    code = "import sys, rlhf_nb_utils.stages; print(*(m for m in sys.modules if m.startswith('rlhf_nb_utils.')))"
    loaded = {m.split(".")[1] for m in subprocess.check_output([sys.executable, "-c", code], text=True).split()}
    package = tmp_path / "rlhf_nb_utils"
    shutil.copytree(Path(stages.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = store.code_hash(folder=package)
    counted = set()
    for path in package.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(source + "\nadded = 1\n", encoding="utf-8")
        if store.code_hash(folder=package) != before:
            counted.add(path.stem)
        path.write_text(source, encoding="utf-8")
    assert counted == loaded and "kl" in counted and "plots" not in counted


def test_a_stage_whose_folder_could_not_be_moved_is_found_after_its_resume(tmp_path, monkeypatch):
    """A folder that somebody has open (Windows), or a kill just before the rename, leaves a finished record behind."""
    isolate(monkeypatch, tmp_path)
    cfg, made, replace = load_config("smoke"), [], os.replace

    def make(folder):
        made.append(1)
        (folder / "model.bin").write_text("trained")
        return {"value": 10 ** len(made)}  # a record of another size

    def locked(source, target):
        if Path(source).is_dir():
            raise PermissionError(13, "in use by another process")
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises((OSError, CourseError)):
        store.build(cfg, "ppo", make, resumes=True)
    monkeypatch.setattr(os, "replace", replace)
    store.build(cfg, "ppo", make, resumes=True)
    assert store.find(cfg, "ppo") is not None and len(made) == 2
