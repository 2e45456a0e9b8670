"""Every mistake runs and shows in the log what it should; afterwards the algorithm is as it was; one recording."""

import contextlib
import functools

import pytest
import torch
from test_ablations import SMALL
from test_ppo import EOS, PROMPTS, TOKENIZER, roll, settings, taste, tiny_policy

from rlhf_nb_utils import ablations, mistakes, models, ppo, rollouts, stages, store
from rlhf_nb_utils.config import TrainingError, load_config
from rlhf_nb_utils.mistakes import DIAGNOSTICS, MISTAKES, MistakeError, made
from rlhf_nb_utils.tracking import MetricsLogger

CFG = settings(ppo__iterations=3, ppo__lr_schedule="constant")


def log(name=None):
    """The metrics of a short run of a tiny policy, healthy or with a mistake."""
    rows, policy = [], tiny_policy()
    torch.manual_seed(0)
    with made(name) if name else contextlib.nullcontext():
        state = ppo.prepare(policy, models.frozen_copy(policy), taste, PROMPTS, TOKENIZER, CFG)
        ppo.train(state, taste, PROMPTS, TOKENIZER, CFG, [lambda _, metrics, __: rows.append(dict(metrics))])
    return rows


@pytest.fixture(scope="module")
def healthy():
    return log()


def unpriced(row):
    """The reward that the score alone would give."""
    return row["score_normalised"] - CFG.ppo.missing_eos_penalty * (1 - row["eos_rate"])


# mistake -> does the log show it? Of the sick run's rows and the healthy one's; never true of the healthy run itself.
SIGNS = {
    # Paid all the same, but behind the end, where no return hears of it.
    "score in the last column": lambda s, h: s[0]["reward"] == h[0]["reward"] and s[0]["return"] != h[0]["return"],
    "score on every token": lambda s, h: s[0]["advantage_std"] > 1.5 * h[0]["advantage_std"],
    "EOS lost to padding": lambda s, h: s[0]["eos_rate"] == 0 < h[0]["eos_rate"],
    "returns from whitened advantages": lambda s, h: all(
        row["advantage_std"] == pytest.approx(1, abs=1e-4) and row["return"] == pytest.approx(row["value"], abs=1e-5) for row in s
    ),
    "top-k sampling": lambda s, h: s[1]["kl"] != h[1]["kl"] and s[0]["first_ratio_deviation"] < 1e-4,
    "KL sign inverted": lambda s, h: s[-1]["kl"] < 0 < s[-1]["kl_k3"] and s[-1]["reward"] > unpriced(s[-1]),
    "no KL penalty": lambda s, h: s[-1]["kl"] > 1e-3 and s[-1]["reward"] == pytest.approx(unpriced(s[-1]), abs=1e-5),
    "rate ten times too high": lambda s, h: s[0]["lr"] == pytest.approx(10 * h[0]["lr"]) and s[0]["approxkl"] > h[0]["approxkl"],
    "dropout in the update": lambda s, h: s[0]["first_ratio_deviation"] > 0.01,
    "reference moves along": lambda s, h: all(abs(row["kl"]) < 1e-4 and row["kl_k3"] < 1e-4 for row in s),
    "one update per batch": lambda s, h: all(abs(row["ratio"] - 1) < 1e-4 and row["clipfrac"] == 0 for row in s),
    "labels swapped": lambda s, h: s[0]["score"] == pytest.approx(-h[0]["score"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_runs_and_its_log_shows_it(name, healthy):
    sick, shows = log(name), SIGNS[name]
    assert len(sick) == 3 and set(DIAGNOSTICS) <= set(sick[0])
    assert shows(sick, healthy) and not shows(healthy, healthy)


def test_the_healthy_run_is_healthy_again_after_all_the_mistakes(healthy):
    timings = {"seconds", "tokens_per_second", "peak_memory_mib"}
    again = log()
    assert [{k: v for k, v in row.items() if k not in timings} for row in again] == [
        {k: v for k, v in row.items() if k not in timings} for row in healthy
    ]


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_mistake_replaces_is_put_back_even_after_an_error(name):
    places = [(stages, "build"), (ppo, "prepare"), (ppo, "train"), *(p[:2] for p in MISTAKES[name].patches)]
    before = [getattr(*place) for place in places]
    with pytest.raises(KeyError), made(name) as mistake:
        assert mistake is MISTAKES[name]
        assert all(getattr(*place) is not old for place, old in zip(places, before))
        raise KeyError
    assert [getattr(*place) for place in places] == before


def test_there_are_twelve_and_each_is_told_in_whole_sentences():
    assert len(MISTAKES) == 12 and set(SIGNS) == set(MISTAKES)
    for mistake in MISTAKES.values():
        assert all(text.endswith(".") and "|" not in text for text in (mistake.wrong, mistake.sees, mistake.cure))
        assert bool(mistake.patches) != bool(mistake.settings(CFG.ppo))


def test_an_unknown_mistake_is_named_with_those_there_are():
    with pytest.raises(MistakeError, match="'no kl'; there are score in the last column, .*no KL penalty"), made("no kl"):
        pass


# --- by hand ------------------------------------------------------------------------------------------------------------


def test_scores_land_where_they_should_not():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    scores, kl = torch.tensor([5.0, 7.0]), torch.ones(2, 3)
    with made("score in the last column"):
        assert ppo.token_rewards(scores, kl, mask, 0.5).tolist() == [[-0.5, -0.5, 5.0], [-0.5, -0.5, 6.5]]
    with made("score on every token"):
        assert ppo.token_rewards(scores, kl, mask, 0.5).tolist() == [[4.5, 4.5, 0.0], [6.5, 6.5, 6.5]]
    assert ppo.token_rewards(scores, kl, mask, 0.5).tolist() == [[-0.5, 4.5, 0.0], [-0.5, -0.5, 6.5]]


def test_k1_is_the_other_way_round():
    one, other = torch.tensor([[-1.0]]), torch.tensor([[-3.0]])
    with made("KL sign inverted"):
        assert ppo.k1(one, other).item() == -2
    assert ppo.k1(one, other).item() == 2


def test_the_end_is_taken_for_padding_and_nothing_else_is():
    policy = tiny_policy()
    ids = rollouts.encode_queries(TOKENIZER, PROMPTS)
    sound = ppo.sample_many(policy, ids, CFG.rollouts, TOKENIZER, 0)
    with made("EOS lost to padding"):
        sick = ppo.sample_many(policy, ids, CFG.rollouts, TOKENIZER, 0)
    assert sound.ended.any() and not sick.ended.any()
    assert torch.equal(sick.lengths, sound.lengths - sound.ended.long())
    assert not (sick.responses[sick.mask] == EOS).any() and torch.equal(sick.responses, sound.responses)


def test_only_the_likeliest_tokens_are_sampled_while_logprobs_are_of_all():
    policy = tiny_policy()
    with made("top-k sampling"), torch.no_grad():
        rollout = roll(policy, CFG)
        logits, _ = policy(rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1])
    chosen = logits.gather(-1, rollout.responses[..., None])
    assert ((logits > chosen).sum(-1)[rollout.mask] < mistakes.TOP_K).all()
    full = (chosen.squeeze(-1) - logits.logsumexp(-1))[rollout.mask]
    assert torch.allclose(rollout.logprobs[rollout.mask], full, atol=1e-4)


def test_dropout_is_off_again_after_the_update():
    policy = tiny_policy()
    with made("dropout in the update"):
        state = ppo.prepare(policy, models.frozen_copy(policy), taste, PROMPTS, TOKENIZER, CFG)
        ppo.train(state, taste, PROMPTS, TOKENIZER, CFG)
    assert all(m.p == 0 for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(roll(policy, CFG).logprobs, roll(policy, CFG).logprobs)


def test_settings_are_given_by_their_dotted_names():
    assert mistakes.settings(MISTAKES["no KL penalty"], CFG) == {"ppo.kl_coef": 0.0}
    assert mistakes.settings(MISTAKES["rate ten times too high"], CFG) == {"ppo.learning_rate": pytest.approx(2e-2)}
    assert mistakes.settings(MISTAKES["labels swapped"], CFG) == {}


# --- the recording ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The smallest settings there are, and folders of their own."""
    cfg = load_config("smoke", overrides=SMALL)
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(ablations, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(
        mistakes, "load_config", lambda profile, seed, _settings=None: cfg.model_copy(update={"profile": profile, "seed": seed})
    )
    monkeypatch.setattr(store, "_data_hash", lambda: "data")
    monkeypatch.setattr(store, "_code_hash", lambda *_: "code")
    monkeypatch.setattr(stages, "MetricsLogger", functools.partial(MetricsLogger, tensorboard=False))
    return cfg


def test_no_stage_is_built_while_a_mistake_is_made(small):
    for stage in (stages.sft, stages.ppo):
        with made("labels swapped"), pytest.raises(MistakeError, match="stage sft is not built while"):
            stage(small)
    assert not store.stage_dir(small, "sft").exists()


@pytest.mark.slow
def test_a_recording_keeps_curves_samples_and_what_sound_code_measured(small, monkeypatch):
    path = mistakes.record("smoke", 0, ["one update per batch", "labels swapped"])
    kept = ablations.load("clinic")
    assert path == ablations.RECORDED / "clinic.json" and kept["recipe"] == small.model_dump(mode="json")
    assert list(kept["runs"]) == ["healthy", "one update per batch", "labels swapped"]  # in the order of the mistakes
    for run in kept["runs"].values():
        assert set(run["curves"]) == set(DIAGNOSTICS) and all(len(curve) == 2 for curve in run["curves"].values())
        assert len(run["samples"]) == 4 and set(run["watched"]) == {"positive", "kl", "length", "eos_rate"}
        assert run["stopped"] is None
    healthy, once, swapped = kept["runs"].values()
    assert once["settings"] == {"ppo.num_ppo_epochs": 1, "ppo.num_mini_batches": 1} and healthy["settings"] == {}
    assert once["curves"]["clipfrac"] == [0, 0]
    assert swapped["curves"]["score"][0] == -healthy["curves"]["score"][0]
    # The healthy run is the one that the PPO stage makes; and no PPO stage was made of any.
    assert store.find(small, "ppo") is None and not list(store.stage_dir(small, "ppo").parent.glob("ppo-*"))
    rows = stages.ppo(small).history
    for key, curve in healthy["curves"].items():
        assert curve == [float(f"{row[f'ppo/{key}']:.3g}") for row in rows]

    mistakes.record("smoke", 0, ["labels swapped"])
    assert ablations.load("clinic") == kept  # made again to the digit, and the rest is kept
    with pytest.raises(MistakeError, match="another recipe"):
        mistakes.record("smoke", 1, ["labels swapped"])

    def dies(*_):
        raise TrainingError("PPO stopped at iteration 1: loss nan")

    monkeypatch.setattr(ppo, "train", dies)
    dead = mistakes.run(small, "rate ten times too high")
    assert dead["stopped"] == "PPO stopped at iteration 1: loss nan" and dead["watched"] is None
    assert dead["curves"]["kl"] == [] and dead["samples"] == []


def test_what_may_not_be_recorded_is_refused(monkeypatch):
    with pytest.raises(MistakeError, match="at least 1"):
        mistakes.record(jobs=0)
    with pytest.raises(MistakeError, match="no mistake is called 'drop out'"):
        mistakes.record(names=["drop out"])
    monkeypatch.setattr(
        mistakes, "load_config", lambda profile, seed, _settings=None: load_config(profile, seed, {"data.source": "imdb"})
    )
    with pytest.raises(MistakeError, match="not ours"):
        mistakes.record()
