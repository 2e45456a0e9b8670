"""The whole pipeline as a player of recorded runs: fine-tuning, preferences, reward model, PPO step by step.

`record` keeps curves and sample texts of a grid of settings, each at its very number of PPO steps (the beginning of a longer
run where that is the same run, number by number);
`Simulation` walks through them, a state machine without a model; `players` shows it. Nothing is interpolated: what was not
recorded cannot be chosen. Knows the stages and PPO; no formula stands here. Like other recordings, only those of the
embedded reviews may be kept, for they hold samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_nb_utils import ablations, checkpoint, data, models, ppo, stages, store
from rlhf_nb_utils.config import Config, CourseError, load_config, same_recipe
from rlhf_nb_utils.learn_table import spread
from rlhf_nb_utils.rollouts import encode_queries, sample_many
from rlhf_nb_utils.tokenizer_bridge import response_texts

SCENARIOS: dict[str, dict] = {
    "tone: positive": {"preferences.criterion": "sentiment"},
    "safety: clean language": {"preferences.criterion": "clean-language"},
}
BETAS = (0.03, 0.1, 0.3, 1.0)
STEPS = (2, 4, 8, 16)
NOISES = (0.0, 1.0, 3.0)
PROFILE = "cpu"
# What makes a handful of steps tell. One step is one iteration: a batch of responses and its epochs of updates.
SETTINGS = {
    "rollouts.response_length": 32,
    "ppo.batch_size": 64,
    "ppo.gradient_accumulation_steps": 1,
    "ppo.learning_rate": 3e-4,
    "ppo.num_ppo_epochs": 2,
    "ppo.entropy_coef": 0.0,  # at this rate the bonus would break the text within a few steps
    "ppo.lr_schedule": "constant",
}
PROMPT_ROW = 11  # of the evaluation prompts, on which nothing is trained: the one completed after each step
RUNS_PER_WRITE = 8  # what an interruption of `record` costs at most
CURVES = {"reward": "score_normalised", "kl": "kl", "entropy": "entropy"}  # name here -> name in PPO's metrics

# Phase -> what happens in it, what goes in and what comes out.
PHASES = {
    "supervised fine-tuning": "Demonstrations go in, a policy that completes an opening and stops comes out: its loss on "
    "held-out ones went from {before:.2f} to {after:.2f} nats per token.",
    "preferences": "Pairs of the policy's own completions go in, and an annotator with noise {noise:g} says which is better: "
    "{comparisons:,} comparisons come out.",
    "reward model": "Comparisons go in, a model that gives any completion one number comes out: it learned to score the "
    "better of two higher.",
    "PPO": "Openings go in; the policy completes them, the reward model scores them, every nat of KL costs β = {beta:g}, and "
    "a policy moved towards the better ones comes out.",
    "done": "The policy of the last step comes out; at another β, noise or number of steps it would be another one.",
}


class SimulatorError(CourseError):
    """Settings that were not recorded, or may not be."""


class Point(NamedTuple):
    """A point of the grid: one recorded run."""

    scenario: str
    beta: float
    steps: int
    noise: float


DEFAULT = Point("tone: positive", 0.1, 8, 1.0)


# --- recording --------------------------------------------------------------------------------------------------------


def grid() -> list[Point]:
    """All points to be recorded; those that share a reward model stand together."""
    return [Point(s, beta, n, noise) for s, noise, beta, n in product(SCENARIOS, NOISES, BETAS, STEPS)]


def configured(point: Point, seed: int) -> Config:
    """The settings of a point's run."""
    chosen = {"ppo.kl_coef": point.beta, "ppo.iterations": point.steps, "preferences.noise": point.noise}
    return load_config(PROFILE, seed, SETTINGS | SCENARIOS[point.scenario] | chosen)


def record(seed: int = 0, jobs: int = 1, only: Sequence[tuple] | None = None) -> Path:
    """Run the points of ``only``, ``(scenario, beta, steps, noise)``, or the whole grid; write data/recorded/simulator.json.

    Points recorded with the same settings are kept, so the command may be stopped and given again. At a constant rate a
    run is the beginning, number by number, of one that takes more steps: of runs that differ in their steps alone the
    longest is made. Raises SimulatorError for a point outside the grid, no jobs, reviews that may not be recorded, another
    schedule of the rate, or points recorded with other settings that would stay.
    """
    wanted = [Point(*point) for point in only or grid()]
    if unknown := set(wanted) - set(grid()):
        raise SimulatorError(f"{_name(unknown.pop())} is not in the grid: see SCENARIOS, BETAS, STEPS and NOISES")
    if jobs < 1:
        raise SimulatorError("jobs must be at least 1")
    cfgs = {point: configured(point, seed) for point in wanted}
    if any(cfg.data.source != "embedded" for cfg in cfgs.values()):
        raise SimulatorError("only runs on the embedded reviews may be recorded: IMDb's text is not ours to hand on")
    if any(cfg.ppo.lr_schedule != "constant" for cfg in cfgs.values()):
        raise SimulatorError("a short run is the beginning of a long one only at a constant rate: ppo.lr_schedule=constant")
    recipe = load_config(PROFILE, seed, SETTINGS).model_dump(mode="json") | {"scenarios": SCENARIOS}
    kept = _kept(recipe, wanted)
    missing = [point for point in wanted if point not in kept]
    _build_shared([cfgs[point] for point in missing], jobs)
    longest = {point._replace(steps=0): point for point in sorted(missing, key=lambda point: point.steps)}
    for start in range(0, len(longest), RUNS_PER_WRITE):
        some = list(longest)[start : start + RUNS_PER_WRITE]
        runs = dict(zip(some, spread(_run, [(cfgs[longest[key]],) for key in some], jobs)))
        found = {point: runs[key] for point in missing if (key := point._replace(steps=0)) in runs}
        kept |= {point: point._asdict() | _beginning(run, point.steps) for point, run in found.items()}
        _write(recipe, kept)
    return _write(recipe, kept)


def _beginning(run: dict, steps: int) -> dict:
    """What the run would have recorded had it ended after so many steps."""
    return run | {name: run[name][:steps] for name in CURVES} | {"text": run["text"][: steps + 1]}


def _build_shared(cfgs: list[Config], jobs: int) -> None:
    """The reward models, one for each criterion and noise: two processes must not build one stage at a time."""
    for cfg in cfgs[:1]:
        stages.sft(cfg)
    shared = {store.stage_hash(cfg, "reward_model"): cfg for cfg in cfgs}
    spread(stages.reward_model, [(cfg,) for cfg in shared.values()], jobs)


def _run(cfg: Config) -> dict:
    """One run: what the early stages found, and PPO's curves (steps,) and texts (1 + steps,), the first before any step.

    Reward, KL and entropy of a step are those of the responses it learns from; its text is what the policy says after it.
    """
    first, compared, scored = stages.sft(cfg), stages.preferences(cfg), stages.reward_model(cfg)
    policy, tokenizer = stages.load_policy(first, cfg)
    reference, reward_fn = models.frozen_copy(policy), stages.load_reward_model(scored, cfg).score
    prompts = data.load_prompts(cfg.data, "ppo")
    torch.manual_seed(cfg.seed)
    rows, texts = [], [_completion(policy, tokenizer, cfg)]

    def keep(state, metrics, _samples) -> None:
        rows.append(metrics)
        texts.append(_completion(state.policy, tokenizer, cfg))

    state = ppo.prepare(policy, reference, reward_fn, prompts, tokenizer, cfg)
    ppo.train(state, reward_fn, prompts, tokenizer, cfg, [keep])
    return {
        "sft_loss": [_rounded(first.summary[key]) for key in ("heldout_loss_before", "heldout_loss")],
        "comparisons": compared.summary["train"] + compared.summary["heldout"],
        "accuracy": _rounded(scored.summary["accuracy"]["gold"]),  # against the annotator's taste: noise does not cap it
        **{name: [_rounded(row[key]) for row in rows] for name, key in CURVES.items()},
        "text": texts,
    }


def _completion(policy: models.Policy, tokenizer, cfg: Config) -> str:
    """What the policy says to the fixed prompt; always by the same seed, so that only the policy makes a difference."""
    ids = encode_queries(tokenizer, [_prompt(cfg)])
    sampled = sample_many(policy, ids, cfg.rollouts, tokenizer, cfg.seed, cfg.models.autocast)
    return response_texts(tokenizer, sampled.responses, sampled.mask)[0]


def _prompt(cfg: Config) -> str:
    return data.load_prompts(cfg.data, "evaluation")[PROMPT_ROW]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3) + 0.0  # + 0.0: no "-0.0"


def _path() -> Path:
    return ablations.RECORDED / "simulator.json"


def _kept(recipe: dict, wanted: list[Point]) -> dict[Point, dict]:
    """What was recorded with this recipe. Raises SimulatorError if points of another one would stay beside the wanted."""
    if not _path().exists():
        return {}
    recording = load()
    found = {point: run for point, run in _runs(recording).items() if point in grid()}
    if same_recipe(recording["recipe"], recipe):
        return found
    if set(found) - set(wanted):
        raise SimulatorError(f"data/recorded/{_path().name} was made with other settings: record all points anew")
    return {}


def _write(recipe: dict, runs: dict[Point, dict]) -> Path:
    ablations.RECORDED.mkdir(parents=True, exist_ok=True)
    prompt = _prompt(load_config(PROFILE, recipe["seed"], SETTINGS))
    in_order = [runs[point] for point in grid() if point in runs]
    checkpoint.write_json_atomic(_path(), {"recipe": recipe, "prompt": prompt, "runs": in_order})
    return _path()


def load() -> dict:
    """What `record` wrote. Raises CourseError where there is none."""
    return ablations.load("simulator")


def _runs(recording: dict) -> dict[Point, dict]:
    return {Point(*(run[axis] for axis in Point._fields)): run for run in recording["runs"]}


# --- the state machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Where a simulation is: its phase, PPO step ``step`` of ``of``, and what is known by then (None: not yet).

    reward: mean score, in standard deviations of the SFT policy's; kl: nats per response; entropy: nats per token;
    accuracy: share of held-out pairs that the reward model orders as the annotator's taste does; text: a completion.
    """

    phase: str
    step: int
    of: int
    reward: float | None
    kl: float | None
    accuracy: float | None
    entropy: float | None
    text: str
    done: bool
    explanation: str


class Simulation:
    """Walks through a recorded run: three phases, each PPO step, done. No model, no file, no clock."""

    def __init__(self, recording: dict):
        self.prompt, self.runs = recording["prompt"], _runs(recording)
        if not self.runs:
            raise SimulatorError("the recording holds no run: `git checkout data/recorded`")
        self.point = DEFAULT if DEFAULT in self.runs else next(iter(self.runs))
        self._position = 0

    def values(self, axis: str) -> list:
        """The recorded values of ``scenario``, ``beta``, ``steps`` or ``noise``; numbers in order."""
        found = list(dict.fromkeys(getattr(point, axis) for point in self.runs))
        return found if axis == "scenario" else sorted(found)

    def choose(self, scenario: str | None = None, beta: float | None = None, steps: int | None = None,
               noise: float | None = None) -> State:  # fmt: skip
        """Take another run, from its beginning; what is not given stays. Raises SimulatorError for one not recorded."""
        given = {"scenario": scenario, "beta": beta, "steps": steps, "noise": noise}
        given = {axis: value for axis, value in given.items() if value is not None}
        for axis, value in given.items():
            if value not in self.values(axis):
                raise SimulatorError(f"{axis} {value!r} is not recorded; recorded: {', '.join(map(str, self.values(axis)))}")
        point = self.point._replace(**given)
        if point not in self.runs:
            nearest = max(self.runs, key=lambda other: sum(a == b for a, b in zip(point, other)))
            raise SimulatorError(f"{_name(point)} is not recorded; the nearest that is: {_name(nearest)}")
        self.point = point
        return self.reset()

    def reset(self) -> State:
        """Back to the first phase."""
        self._position = 0
        return self.state

    def step(self) -> State:
        """On to the next phase, or the next PPO step; at the end it stays there."""
        self._position = min(self._position + 1, self.point.steps + 3)
        return self.state

    def run(self) -> Iterator[State]:
        """The present state and all that follow, to the end. A step or reset from outside is taken up."""
        yield self.state
        while not self.state.done:
            yield self.step()

    @property
    def state(self) -> State:
        """Positions 0, 1, 2 are the phases before PPO, 3 its first step, ``steps + 3`` the end."""
        run, of, position = self.runs[self.point], self.point.steps, self._position
        step, done = min(max(position - 2, 0), of), position == of + 3
        phase = "done" if done else list(PHASES)[min(position, 3)]
        before, after = run["sft_loss"]
        return State(
            phase=phase, step=step, of=of, done=done, text=run["text"][step],
            accuracy=run["accuracy"] if position >= 2 else None,
            explanation=PHASES[phase].format(**run | {"before": before, "after": after}),
            **{name: run[name][step - 1] if step else None for name in CURVES},
        )  # fmt: skip


def _name(point: Point) -> str:
    return f"{point.scenario}, β = {point.beta:g}, {point.steps} steps, noise {point.noise:g}"
