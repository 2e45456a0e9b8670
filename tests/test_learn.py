"""What one seed measures, on numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_nb_utils import data, learn, models
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import load_config
from rlhf_nb_utils.rollouts import encode_queries


def test_where_a_path_passes_a_kl():
    path = [(0.0, 0.5), (2.0, 0.8), (4.0, 0.9)]
    assert learn.positive_at(path, 4.0) == pytest.approx(0.9, abs=1e-3)
    assert learn.positive_at(path, 2.0) == pytest.approx(0.8, abs=1e-3)
    between = learn.positive_at(path, 3.0)
    assert math.log(between / (1 - between)) == pytest.approx((math.log(4) + math.log(9)) / 2, abs=0.02)
    # A path that went too far and came back is read where it passed last.
    assert learn.positive_at([*path, (2.0, 0.95)], 3.0) > 0.9


def test_the_last_fifth_of_a_line_and_of_noise():
    line = [{"ppo/score_normalised": 0.1 * i, "ppo/kl": 3.0 + (-1) ** i} for i in range(40)]
    found = learn._last_fifth(line)
    assert found["score_normalised_change"] == pytest.approx(0.8) and found["score_normalised_scatter"] < 1e-9
    assert abs(found["kl_change"]) < found["kl_scatter"] and found["kl_scatter"] == pytest.approx(1, abs=0.2)


def test_minutes_count_from_the_start_of_the_first_iteration():
    rows = [{"wall_time": 1000.0 + 30 * i, "ppo/seconds": 20.0} for i in range(5)]
    assert learn.minutes(rows) == pytest.approx(140 / 60)


def test_pairs_of_a_prompt_are_averaged_without_those_that_tie():
    got = learn._mean_of_pairs(np.array([1.0, 0.0, np.nan, 1.0, np.nan, np.nan]))
    np.testing.assert_array_equal(got, [0.5, 1.0, np.nan])


def test_heldout_pairs_are_disjoint_and_in_the_order_of_gold():
    gold = np.array([[0.0, 9.0, -9.0, 3.0, 7.0]] * 50)
    best = ev.BestOfN([f"q{i}" for i in range(50)], [list("abcde")] * 50, gold, gold)
    pairs, agree = learn.heldout_pairs(best, seed=0, noise=1.0)
    assert [p.responses for p in pairs[:2]] == [("b", "a"), ("d", "c")]
    assert agree.shape == (100,) and agree.mean() > 0.97  # gaps of 9 and 12: a wrong label has odds of 1 to 8,000
    _, coin = learn.heldout_pairs(ev.BestOfN(best.queries, best.responses, gold / 1e6, gold / 1e6), 0, 1.0)
    assert 0.3 < coin.mean() < 0.7


def test_runs_are_compared_at_the_lower_of_their_final_kls():
    def run(kls, shares):
        way = {
            i: {"kl": np.array([kl]), "gold": 2.0 * (np.arange(1000) < 1000 * p) - 1}
            for i, (kl, p) in enumerate(zip(kls, shares))
        }
        return way, SimpleNamespace(kl=way[len(kls) - 1]["kl"], scores={"gold": way[len(kls) - 1]["gold"]})

    def distance(**runs):
        return learn._distance({name: way for name, (way, _) in runs.items()}, {name: end for name, (_, end) in runs.items()})

    far, near = run([1.0, 3.0, 6.0], [0.6, 0.8, 0.95]), run([1.0, 2.0, 3.0], [0.6, 0.65, 0.7])
    assert distance(annotator=far, main=near) == pytest.approx(0.1, abs=1e-3)
    assert distance(annotator=near, main=far) == pytest.approx(-0.1, abs=1e-3)


def test_the_protocol_takes_prompts_that_the_course_does_not_show():
    cfg = load_config("cpu")
    ours, shown = learn.prompts(cfg), data.load_prompts(cfg.data, "evaluation")
    assert len(ours) == len(set(ours)) == 1000 and len(shown) == 1000 and not set(ours) & set(shown)


def test_what_the_reference_makes_of_a_text_is_the_sum_of_its_tokens_logprobs(monkeypatch):
    """One text at a time, without padding or the package's head, against batches of both."""
    cfg = load_config("cpu")
    policy, tokenizer = models.load_policy("tiny-gpt2"), models.load_tokenizer("tiny-gpt2")
    monkeypatch.setattr(learn.stages, "sft", lambda cfg: None)
    monkeypatch.setattr(learn.stages, "load_policy", lambda stage, cfg: (policy, tokenizer))
    monkeypatch.setattr(learn, "REFERENCE_ROWS", 2)
    queries = ["A film about", "I never thought that this one", "Bad."]
    tokens = [tokenizer(text)["input_ids"] for text in (" a dog.", " would", " Very bad, and long besides.")]
    found = learn.surprise(cfg, SimpleNamespace(queries=queries, tokens=tokens))
    for query, ids, value in zip(encode_queries(tokenizer, queries), tokens, found):
        both = torch.tensor([query + ids])
        with torch.no_grad():
            logits = policy.lm(input_ids=both).logits[0, len(query) - 1 : -1]
        assert value == pytest.approx(
            torch.nn.functional.cross_entropy(logits, both[0, len(query) :], reduction="sum").item(), rel=1e-4
        )


def test_the_objective_of_ppo_and_of_best_of_n():
    cfg = load_config("cpu", 0, {"ppo.kl_coef": 0.5, "ppo.score_clip": 1.0})
    norm = {"score_mean": 1.0, "score_std": 2.0}
    after = SimpleNamespace(scores={"proxy": np.array([3.0, 9.0, -9.0])}, kl=np.array([0.0, 2.0, 2.0]))
    proxy = np.array([[1.0, 2.0], [5.0, 1.0], [-9.0, -8.0]])
    found = learn._objective(cfg, norm, after, SimpleNamespace(proxy=proxy))
    np.testing.assert_allclose(found["objective_after"], [1.0, 0.0, -2.0])
    np.testing.assert_allclose(found["objective_best_of_n"], np.array([0.5, 1.0, -1.0]) - 0.5 * (math.log(2) - 0.5))


def test_each_reward_model_is_asked_about_the_same_pairs(monkeypatch):
    """Scores planted so that one model is always right, one always wrong and one always undecided."""
    gold = np.random.default_rng(0).normal(size=(40, 4))
    gold[0, 1] = gold[0, 0]  # one pair that gold cannot order
    texts = [[f"{i} {k}" for k in range(4)] for i in range(40)]
    score = {text: gold[i, k] for i, row in enumerate(texts) for k, text in enumerate(row)}
    signs = {"main": 1, "trunk": -1, "triples": 0}
    planted = {kind: SimpleNamespace(score=lambda q, r, s=s: np.array([s * score[t] for t in r])) for kind, s in signs.items()}
    bag = SimpleNamespace(score=lambda texts: np.zeros(len(texts)))
    monkeypatch.setattr(learn.stages, "preferences", lambda cfg: None)
    monkeypatch.setattr(learn.stages, "load_comparisons", lambda stage: ([], []))
    monkeypatch.setattr(learn, "bag_of_words_baseline", lambda train, heldout: (bag, None))
    monkeypatch.setattr(learn.stages, "reward_model", lambda cfg: cfg.kind)
    monkeypatch.setattr(learn.stages, "load_reward_model", lambda kind, cfg: planted[kind])
    settings = {"seed": 0, "preferences": SimpleNamespace(noise=1.0)}
    cfgs = {kind: SimpleNamespace(kind=kind, **settings) for kind in signs}
    columns = learn._reward_models(cfgs, ev.BestOfN([""] * 40, texts, gold, gold))
    means = {name: np.nanmean(column) for name, column in columns.items()}
    assert [means[f"gold_agreement_{kind}"] for kind in ("main", "trunk", "triples", "bag")] == [1.0, 0.0, 0.5, 0.5]
    assert columns["gold_agreement_main"].shape == (40,)
    # By sampled labels a perfect model is as good as the annotator's own score, and a contrary one as much worse.
    assert means["label_agreement_main"] == pytest.approx(means["label_agreement_annotator"], abs=0.01)
    assert 0.6 < means["label_agreement_main"] < 0.95
    assert means["label_agreement_trunk"] == pytest.approx(1 - means["label_agreement_main"], abs=0.01)
