"""The contests' own arithmetic, the table, and one round of those that need no peer at the smallest size."""

import itertools
import json

import ipywidgets
import nbformat
import pytest
import torch

from rlhf_nb_utils import bench, contests, gauges, plots, widgets
from rlhf_nb_utils.config import CourseError, load_config
from rlhf_nb_utils.contests import Bar, Contest, Setting

TINY = Setting(1, 64, 40, batch=8, response=4)


def test_contestants_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    clock, order = [0.0], []

    def contestant(name: str, seconds: float):
        def run():
            order.append(name)
            clock[0] += seconds * len(order)  # slower from round to round

        return run

    monkeypatch.setattr(contests.time, "perf_counter", lambda: clock[0])
    seconds = contests.race({"a": contestant("a", 1.0), "b": contestant("b", 10.0)}, 3)
    assert order == ["a", "b"] * (3 + contests.WARM)
    first = 2 * contests.WARM + 1
    assert seconds == {"a": [first, first + 2, first + 4], "b": [10 * (first + 1), 10 * (first + 3), 10 * (first + 5)]}


def test_a_figure_is_the_median_of_the_ratios_within_a_round():
    found = contests.ratios([2.0, 9.0, 40.0, 8.0, 10.0], [1.0, 3.0, 10.0, 2.0, 2.0])
    assert found == [2.0, 3.0, 4.0, 4.0, 5.0]
    assert bench.cells(Bar("x", 4.0), found) == ["x", "4.00× [2.50, 4.50]", "≥ 4×", "✓"]
    assert not bench.met(Bar("x", 3.9, "≤"), found)
    assert bench.cells(Bar("small", 1e-6, "≤", ""), [3e-7])[1:] == ["3e-07", "≤ 1e-06", "✓"]
    assert bench.cells(Bar("reported"), found)[2:] == ["–", ""]
    assert bench.cells(Bar("x", 4.0), None)[1:] == ["not yet measured", "≥ 4×", ""]


def test_both_sides_of_ppo_score_the_same_text_alike():
    """The reward on text, tokenised anew, is the reward model's output on the ids that were sampled."""
    tokenizer = contests.word_tokenizer(40)
    ids = [[3, 5, 7, 11], [2, 4]]
    texts = [" ".join(map(str, row)) + " " for row in ids]
    found = contests.scorer(TINY, tokenizer)(texts, ["9 ", "1 6 "])
    model = contests.classifier(TINY)
    for row, extra, score in zip(ids, ([9], [1, 6]), found):
        with torch.no_grad():
            hidden = model.transformer(input_ids=torch.tensor([row + extra])).last_hidden_state
        assert score.item() == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_our_side_does_one_iteration_at_a_call(critic, monkeypatch):
    seen, train = [], contests.ppo.train

    def counted(state, *rest):
        done = train(state, *rest)
        seen.append(done.iteration)
        return done

    monkeypatch.setattr(contests.ppo, "train", counted)
    run = contests.ours(TINY, critic)
    run()
    run()
    assert seen == [1, 2]


@pytest.mark.parametrize(
    "contest",
    [
        contests.rollout_contest(TINY, "cpu", {2: (1.0, 1.0)}, (4.5, 8.0), length=3),
        contests.optimizer_contest(TINY),
        gauges.logprob_contest("cpu", bf16=True, setting=TINY),
        gauges.handler_contest(),
    ],
    ids=lambda contest: contest.name,
)
def test_a_contest_gives_each_bar_its_figures(contest):
    found = contest.hold(1)
    assert len(found) == len(contest.bars) and all(len(figures) == 1 and figures[0] >= 0 for figures in found)


def test_every_control_is_turned_from_end_to_end_and_never_left_where_it_stands():
    seen = []

    def draw(**values):
        if values["odd"]:
            raise CourseError("does not go with the others")
        seen.append(values)
        return plots.plot_gae({0.5: [1.0]})

    given = {
        "choice": ipywidgets.SelectionSlider(options=[("none", 0), ("few", 2), ("many", 9)], value=2),
        "whole": ipywidgets.IntSlider(3, min=1, max=9), "real": ipywidgets.FloatSlider(0.5, min=0.0, max=1.0),
        "wide": ipywidgets.FloatLogSlider(1.0, min=-2, max=2), "yes": ipywidgets.Checkbox(False),
        "text": ipywidgets.Text("so"), "only": ipywidgets.Dropdown(options=["one"]), "few": ipywidgets.IntSlider(2, min=1, max=4),
        "odd": ipywidgets.Checkbox(False),
    }  # fmt: skip
    box = widgets.interactive(draw, **given)
    (start,), found = tuple(seen), gauges.turn(box, 9)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(given.keys() - {"only"}, 9) | {"odd": 4}
    drawn = seen[: -len(found["odd"]) - 1]  # but for those of "odd", every turn shows other values
    assert all(before != after for before, after in itertools.pairwise(drawn))
    assert {name: control.value for name, control in given.items()} == start
    reached = {name: {values[name] for values in seen} for name in given}
    assert reached["choice"] == {0, 2, 9} and reached["yes"] == {False, True} and len(reached["text"]) == 2
    assert reached["whole"] == set(range(1, 10)) and reached["few"] == {1, 2, 3, 4}
    assert (min(reached["real"]), max(reached["real"])) == (0, 1)
    assert (min(reached["wide"]), max(reached["wide"])) == pytest.approx((0.01, 100))
    assert all(sum(values[name] != start[name] for name in given) <= 1 for values in seen)  # one at a time


def test_the_sliders_of_a_notebook_are_turned_in_a_kernel(tmp_path, capsys):
    new = nbformat.v4
    given = new.new_code_cell('PROFILE = "smoke"\nSEED = 0\nOVERRIDES = {}', metadata={"tags": ["parameters"]})
    setup = new.new_code_cell(
        "from rlhf_nb_utils import plots, widgets\n"
        "from rlhf_nb_utils.config import load_config\n"
        "import time\n"
        "def slow(lam):\n"
        "    time.sleep(0.2)\n"
        "    return plots.plot_gae({lam: [1.0, 2.0]})"
    )
    turned, quick = (
        new.new_code_cell(f'widgets.interactive({function}, **widgets.controls(load_config(PROFILE).ppo, "lam"))')
        for function in ("slow", "lambda lam: plots.plot_gae({lam: [1.0]})")
    )
    nbformat.write(new.new_notebook(cells=[given, setup, turned, quick]), tmp_path / "03_turned.ipynb")
    nbformat.write(new.new_notebook(cells=[given]), tmp_path / "04_still.ipynb")
    contest = gauges.slider_contest(tmp_path / "bench", tmp_path)
    (slowest,) = contest.hold(2)
    assert len(slowest) == 2 and min(slowest) > 200  # ms, of the first of the two
    printed = capsys.readouterr().out
    assert "03_turned In [3], lam" in printed and "03_turned In [4], lam" in printed and "04_still" not in printed


def test_the_contest_of_offloaded_optimizers_holds_on_a_host_too(monkeypatch):
    monkeypatch.setattr(contests.peers, "offloaded_adamw", torch.optim.AdamW)
    contest = contests.offload_contest("cpu", TINY, rows=2, width=6)
    assert [len(figures) for figures in contest.hold(1)] == [1, 1, 1]


def test_two_iterations_are_those_of_a_run_by_models_of_the_right_shape(tmp_path, monkeypatch):
    contests.gpt2_config(TINY).save_pretrained(tmp_path / "policy")
    given = {
        "models.policy": str(tmp_path / "policy"), "models.reward_backbone": "tiny-bert", "reward_model.max_length": 9,
        "rollouts.response_length": 5, "rollouts.batch_size": 4, "ppo.batch_size": 4, "ppo.num_mini_batches": 2,
    }  # fmt: skip
    lean = gauges.EVERY_SWITCH | {"memory.park": False}
    cfg, steps, read = load_config("smoke", 0, given | lean), [], []
    step, forward = contests.CPUOffloadAdamW.step, gauges.phases.shapes.RewardModel.forward
    monkeypatch.setattr(contests.CPUOffloadAdamW, "step", lambda self, *_: steps.append(1) or step(self))
    monkeypatch.setattr(gauges.phases.shapes.RewardModel, "forward", lambda *a: read.append(tuple(a[1].shape)) or forward(*a))
    state = gauges.iterate(cfg, 7, 2)
    assert state.iteration == 2 and len(steps) == 2 * cfg.ppo.num_ppo_epochs * 2
    assert read == [(16, 9), (4, 9), (4, 9)]  # the reference's samples, then each iteration's
    assert state.policy.chunked_head and next(state.policy.lm.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in gauges.phases.Models.of(cfg, torch.device("cpu")).judge.parameters())


@pytest.mark.parametrize("lean_runs_out, plain_runs_out", [(False, True), (False, False), (True, True)])
def test_a_card_has_to_hold_some_and_not_the_other(monkeypatch, lean_runs_out, plain_runs_out):
    caps, device = [], type("Device", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)

    def iterate(cfg, query, iterations):
        ran.append((cfg.models.policy, query, iterations))
        if plain_runs_out if cfg.memory.optimizer == "adamw" else lean_runs_out:
            raise torch.OutOfMemoryError

    ran = []
    monkeypatch.setattr(gauges, "iterate", iterate)
    for name, result in {"reset_peak_memory_stats": None, "max_memory_allocated": 2**32, "max_memory_reserved": 2**33}.items():
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    contest = gauges.card_contest()
    found = dict(zip(contest.bars, contest.hold(1), strict=True))
    first, second = [list(found.items())[i : i + 3] for i in (0, 3)]
    for (bar, through), (given_out, peak), (reserved, most) in (first, second):
        assert bench.met(bar, through) == (not lean_runs_out)
        assert (peak, most) == (([], []) if lean_runs_out else ([4.0], [8.0]))
        assert "given out" in given_out.what and "reserved" in reserved.what
        assert bench.cells(given_out, peak)[1] == ("–" if lean_runs_out else "4.00 GiB")
    assert bench.met(*list(found.items())[-1]) == plain_runs_out
    xl, tiny_llama = "openai-community/gpt2-xl", load_config("gpu-12gb-1b").models.policy
    assert ran == [(xl, 64, 2), (tiny_llama, None, 2), (xl, 64, 2)]
    assert caps == [gauges.CAP / 80, 1.0]


def test_forward_passes_alone_are_as_many_as_tokens_are_sampled(monkeypatch):
    policy, calls = contests.models.Policy(contests.language_model(TINY)), []
    policy.lm.register_forward_hook(lambda *_: calls.append(1))
    contests.passes_alone(policy, [[1, 2], [3]], 5, contests.word_tokenizer(40))
    assert len(calls) == 5


@pytest.mark.parametrize("separate", [True, False])
def test_the_passes_alone_are_those_of_an_iteration_and_train_the_policy_and_no_frozen_model(monkeypatch, separate):
    made, calls = [], []

    def recorded(make):
        def one(setting):
            model, number = make(setting), len(made)
            (model.transformer if hasattr(model, "score") else model).register_forward_hook(lambda *_: calls.append(number))
            made.append((model, {name: p.detach().clone() for name, p in model.named_parameters()}))
            return model

        return one

    for name in ("language_model", "classifier"):
        monkeypatch.setattr(contests, name, recorded(getattr(contests, name)))
    contests.passes(TINY, separate)()
    updates = contests.EPOCHS * contests.MINI_BATCHES
    expected = [TINY.response + updates, 1, 1, (1 + updates) * separate]  # policy, reference, reward model, critic
    assert [calls.count(number) for number in range(4)] == expected
    moved = [any(not torch.equal(p, start[name]) for name, p in model.named_parameters()) for model, start in made]
    assert moved == [True, False, False, separate]


def test_the_offloaded_step_is_adamws_and_bf16_without_a_master_fails():
    contest = gauges.fidelity_contest("cpu", TINY)
    figures = dict(zip(contest.bars, contest.hold(1)))
    assert all(bench.met(bar, found) for bar, found in figures.items())


def test_plans_are_within_a_tenth_of_what_is_counted():
    contest = gauges.planner_contest("cpu")
    assert all(bench.met(bar, found) for bar, found in zip(contest.bars, contest.hold(1)))


def test_gpt2_xl_is_planned_within_what_was_asked_and_has_one_figure_a_phase(monkeypatch):
    contest = gauges.memory_contest()
    found = contest.hold(1)
    sizes = [pair for pair in zip(contest.bars, found, strict=True) if pair[0].unit == " GiB"]
    assert len(sizes) == 5 and all(bench.met(bar, figures) for bar, figures in sizes)
    # What was planned a moment ago is traced again where a wait is timed.
    traced, trace, cfg = [], gauges.phases._trace, load_config("gpu-12gb")
    monkeypatch.setattr(gauges.phases, "_trace", lambda phase, *rest: traced.append(phase) or trace(phase, *rest))
    gauges.memory.report(cfg)
    traced.clear()
    gauges.seconds_to_report(cfg)
    gauges.memory.report(cfg)
    assert sorted(traced) == sorted((*gauges.phases.PHASES[:-1], *gauges.phases.BEFORE))


def test_names_are_told_apart_and_every_bar_of_a_gpu_is_listed_without_one():
    for device in bench.DEVICES:
        bars = [bar.what for contest in bench.contests_on(device, None) for bar in contest.bars]
        assert len(bars) == len(set(bars))
    text = bench.report({}, None)
    assert text.count("not yet measured") == sum(len(c.bars) for d in bench.DEVICES for c in bench.contests_on(d, None))


@pytest.fixture
def one_contest(monkeypatch, tmp_path):
    """Two contests in place of the real ones, whose figures are those of a list."""
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path))
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    given = {"optimizer": [1.0, 3.0, 3.0], "rollouts": [2.0]}
    made = [Contest(name, (Bar(f"contest {name}", 2.0),), lambda _, name=name: [given[name]]) for name in given]
    monkeypatch.setattr(bench, "contests_on", lambda device, folder: made)
    return given


def run(*arguments: str) -> int:
    return bench.main([*arguments, "--threads", str(torch.get_num_threads())])


def test_the_table_is_printed_and_kept(one_contest, capsys, tmp_path):
    assert run("--only", "optimizer") == 0
    out = capsys.readouterr().out
    assert "| contest optimizer | 3.00×" in out and "| contest rollouts | not yet measured |" in out
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["cpu"]["found"] == {"contest optimizer": [1.0, 3.0, 3.0]} and "torch" in kept["cpu"]["machine"]
    with pytest.raises(bench.BenchError, match="at least 5"):
        run("--repeats", "3")


def test_what_was_found_on_a_gpu_stays_in_the_table(one_contest, capsys, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps({"cuda": {"machine": "a card", "found": {"contest rollouts": [7.0]}}}))
    assert run("--only", "optimizer") == 0
    assert run("--only", "rollouts") == 0  # and what the same machine found a moment ago
    cpu, gpu = capsys.readouterr().out.split("On the CPU")[-1].split("On a GPU (a card)")
    assert "7.00×" in gpu and "2.00×" in cpu and "3.00×" in cpu
    (tmp_path / "bench.json").write_text("{not json")
    assert run() == 0
    with pytest.raises(bench.BenchError, match="--device cpu"):
        run("--device", "cuda")


def test_a_missing_peer_is_installed_once_and_named_if_that_did_not_help(one_contest, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        bench.subprocess, "run", lambda command, **_: calls.append(command) or type("Done", (), {"returncode": 0})
    )
    monkeypatch.setitem(bench.peers.PACKAGES, "no_such_peer", ("no-such-peer==1",))
    monkeypatch.setattr(bench, "contests_on", lambda *_: [Contest("ppo", (), lambda _: [], ("no_such_peer",))])
    assert run("--only", "ppo") == 0
    assert "no-such-peer==1" in calls[0] and calls[1][1:3] == ["-m", "rlhf_nb_utils.bench"] and "ppo" in calls[1]
    monkeypatch.setenv("RLHF_NB_PEERS", str(tmp_path / "peers"))
    with pytest.raises(bench.BenchError, match="no_such_peer cannot be imported"):
        run("--only", "ppo")
