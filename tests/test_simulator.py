"""The simulator: a recording at the smallest size, and the state machine."""

import json
from itertools import product

import pytest
from recordings import made_up

from rlhf_nb_utils import ablations, simulator
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.simulator import Point, Simulation

SMALL = {
    "data.n_sft": 32, "data.n_preferences": 32, "data.n_ppo": 32, "data.n_evaluation": 8, "rollouts.response_length": 8,
    "ppo.batch_size": 8, "evaluation.n_prompts": 8, "evaluation.best_of_n": 1, "evaluation.best_of_prompts": 4,
    "evaluation.bootstrap_samples": 100,
}  # fmt: skip
TONE, SAFETY = simulator.SCENARIOS


@pytest.fixture
def recording():
    return made_up([Point(*point) for point in product((TONE, SAFETY), (0.1, 1.0), (2, 8), (0.0, 1.0))])


# ------------------------------------------------------------------------------------------------ recording


def test_every_point_of_the_grid_is_a_valid_configuration():
    points = simulator.grid()
    assert len(points) == len(set(points)) == 2 * 4 * 4 * 3 and simulator.DEFAULT in points
    cfg = simulator.configured(Point(SAFETY, 0.3, 16, 3.0), 7)
    found = (cfg.preferences.criterion, cfg.ppo.kl_coef, cfg.ppo.iterations, cfg.preferences.noise, cfg.seed)
    assert found == ("clean-language", 0.3, 16, 3.0, 7)
    assert cfg.ppo.lr_schedule == "constant" and cfg.ppo.entropy_coef == 0


def test_a_recording_keeps_curves_and_texts_and_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path / "recorded")
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "runs"))
    small = SMALL | {"ppo.lr_schedule": "constant"}
    values = {"PROFILE": "smoke", "SETTINGS": small, "STEPS": (1, 2), "BETAS": (0.1,), "NOISES": (1.0,), "PROMPT_ROW": 0}
    for name, value in values.items():
        monkeypatch.setattr(simulator, name, value)
    monkeypatch.setattr(simulator, "SCENARIOS", {TONE: simulator.SCENARIOS[TONE]})
    ran, run = [], simulator._run
    monkeypatch.setattr(simulator, "_run", lambda cfg: ran.append(cfg.ppo.iterations) or run(cfg))
    with pytest.raises(CourseError, match="missing"):
        simulator.load()
    path = simulator.record()
    assert ran == [2]  # the longer one, of which the shorter is the beginning
    both = json.loads(path.read_text())
    path.unlink()
    path = simulator.record(only=[(TONE, 0.1, 1, 1.0)])
    alone = json.loads(path.read_text())["runs"]
    assert ran == [2, 1] and alone == both["runs"][:1]  # run by itself, it is the same
    simulator.record()
    assert ran == [2, 1, 2]  # the first is kept
    kept = json.loads(path.read_text())
    assert kept == both and [run["steps"] for run in kept["runs"]] == [1, 2]
    short, long = kept["runs"]
    assert kept["recipe"]["profile"] == "smoke" and kept["prompt"].strip() and long["comparisons"] == 32
    assert len(long["sft_loss"]) == 2 and long["kl"][0] == 0 and 0 <= long["accuracy"] <= 1
    for name in simulator.CURVES:
        assert len(long[name]) == 2 and long[name] == [round(value, 3) for value in long[name]]
        assert short[name] == long[name][:1]
    assert len(long["text"]) == 3 and short["text"] == long["text"][:2] and all(isinstance(t, str) for t in long["text"])
    assert not list((tmp_path / "runs" / "smoke" / "stages").glob("ppo-*"))
    assert [state.done for state in Simulation(simulator.load()).run()][-1]
    monkeypatch.setattr(simulator, "SETTINGS", small | {"ppo.learning_rate": 1e-5})
    with pytest.raises(CourseError, match="record all points anew"):
        simulator.record(only=[(TONE, 0.1, 1, 1.0)])
    simulator.record()
    assert ran == [2, 1, 2, 2] and simulator.load()["recipe"]["ppo"]["learning_rate"] == 1e-5


def test_what_may_not_be_recorded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path)
    with pytest.raises(CourseError, match=r"β = 0.5, 8 steps, noise 1 is not in the grid"):
        simulator.record(only=[(TONE, 0.5, 8, 1.0)])
    with pytest.raises(CourseError, match="at least 1"):
        simulator.record(jobs=0)
    for settings, why in (({"data.source": "imdb"}, "not ours"), ({"ppo.lr_schedule": "linear"}, "constant rate")):
        monkeypatch.setattr(simulator, "SETTINGS", settings)
        with pytest.raises(CourseError, match=why):
            simulator.record()


# ------------------------------------------------------------------------------------------------ the state machine


def test_the_phases_come_in_order_and_each_step_shows_its_own_numbers(recording):
    simulation = Simulation(recording)
    assert simulation.point == Point(TONE, 0.1, 8, 1.0)
    states = list(simulation.run())
    assert [state.phase for state in states] == [*list(simulator.PHASES)[:3], *["PPO"] * 8, "done"]
    assert [state.step for state in states] == [0, 0, 0, *range(1, 9), 8] and {state.of for state in states} == {8}
    assert [state.reward for state in states[:3]] == [None] * 3 == [state.kl for state in states[:3]]
    assert [state.reward for state in states[3:]] == [*(step + 0.1 for step in range(1, 9)), 8.1]
    assert [state.kl for state in states[3:]] == [state.reward / 2 for state in states[3:]]
    assert [state.accuracy for state in states] == [None, None, *[0.8] * 10]
    assert [int(state.text.split()[-1]) for state in states] == [state.step for state in states]
    assert [state.done for state in states] == [False] * 11 + [True]


def test_the_explanations_tell_what_this_run_had(recording):
    simulation = Simulation(recording)
    simulation.choose(beta=1.0, noise=0.0)
    said = {state.phase: state.explanation for state in simulation.run()}
    assert "from 3.50 to 3.25" in said["supervised fine-tuning"]
    assert "5,000 comparisons" in said["preferences"] and "noise 0 " in said["preferences"]
    assert "β = 1," in said["PPO"]


def test_a_simulation_is_reset_and_stays_at_its_end(recording):
    simulation = Simulation(recording)
    first = simulation.state
    for _ in range(5):
        simulation.step()
    assert simulation.state.step == 3 and simulation.reset() == first == simulation.state
    end = simulation.choose(steps=2) and list(simulation.run())[-1]
    assert end.done and simulation.step() == end and list(simulation.run()) == [end]
    assert simulation.choose(noise=0.0).step == 0 and simulation.point == Point(TONE, 0.1, 2, 0.0)


def test_only_what_was_recorded_can_be_chosen(recording):
    simulation = Simulation(recording)
    assert simulation.values("beta") == [0.1, 1.0] and simulation.values("scenario") == [TONE, SAFETY]
    simulation.step()
    for wrong in ({"beta": 0.5}, {"steps": 4}, {"noise": 9.0}, {"scenario": "tone: sour"}):
        (axis,) = wrong
        with pytest.raises(CourseError, match=f"{axis} .* is not recorded; recorded: .*") as error:
            simulation.choose(**wrong)
        assert "\n" not in str(error.value) and all(str(v) in str(error.value) for v in simulation.values(axis))
    assert simulation.point == simulator.DEFAULT and simulation.state.phase == "preferences"  # as before
    few = Simulation(made_up([Point(TONE, 0.1, 2, 0.0), Point(TONE, 1.0, 4, 3.0)]))
    with pytest.raises(CourseError, match=r"β = 1, 2 steps, noise 3 is not .* nearest that is: .*, β = 1, 4 steps, noise 3"):
        few.choose(beta=1.0, noise=3.0)
    with pytest.raises(CourseError, match="holds no run"):
        Simulation(made_up([]))
