"""Evaluation: oracles are hand-computed numbers, enumeration of subsets, scipy's optimiser and float64 loops."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_nb_utils import evaluation
from rlhf_nb_utils.config import load_config
from rlhf_nb_utils.evaluation import EvaluationError
from rlhf_nb_utils.models import Policy, frozen_copy, load_tokenizer
from rlhf_nb_utils.rollouts import Rollout, pad_queries

# ---------------------------------------------------------------------------------------------- statistics


def test_a_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(300):
        _, low, high = evaluation.bootstrap_interval(rng.exponential(2.0, 60), 600, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 300 <= 0.97


def test_a_bootstrap_interval_is_as_wide_as_the_central_limit_theorem_says():
    values = np.random.default_rng(1).normal(5, 3, 2000)
    mean, low, high = evaluation.bootstrap_interval(values, 4000)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (high - mean, mean - low) == pytest.approx((half, half), rel=0.06)


def test_a_bootstrap_is_reproducible_and_does_not_depend_on_its_chunks(monkeypatch):
    values = np.arange(40.0)
    first = evaluation.bootstrap_interval(values, 500, seed=3)
    assert first == evaluation.bootstrap_interval(values, 500, seed=3)
    assert first != evaluation.bootstrap_interval(values, 500, seed=4)
    monkeypatch.setattr(evaluation, "CHUNK", 400)
    assert first == evaluation.bootstrap_interval(values, 500, seed=3)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0], [2.0]]])
def test_bad_values_stop_with_one_line(values):
    with pytest.raises(EvaluationError) as error:
        evaluation.bootstrap_interval(values)
    assert "\n" not in str(error.value)


def test_a_tie_is_half_a_win_and_every_prompt_is_in_the_denominator():
    # 2 wins, 1 loss, 1 tie: (2 + 0.5) / 4. Leaving ties out gives 2/3; calling them losses 1/2, wins 3/4.
    result = evaluation.win_rate([3.0, 1.0, 0.0, 2.0], [1.0, 1.0, 5.0, 1.5])
    assert (result.rate, result.ties, result.n) == (0.625, 0.25, 4)
    assert 0 <= result.low <= result.rate <= result.high <= 1


def test_win_rates_of_the_two_sides_sum_to_one():
    a, b = np.random.default_rng(0).integers(0, 4, (2, 50))
    assert evaluation.win_rate(a, b).rate + evaluation.win_rate(b, a).rate == pytest.approx(1.0)


def test_a_difference_of_rounding_alone_is_a_tie():
    assert evaluation.win_rate([1.0 + 1e-8, 2.0], [1.0, 1.0]).ties == 0.5


def test_a_policy_against_itself_wins_half_and_always_ties():
    result = evaluation.win_rate(np.arange(9.0), np.arange(9.0))
    assert (result.rate, result.low, result.high, result.ties) == (0.5, 0.5, 0.5, 1.0)


def test_win_rates_need_the_same_prompts():
    with pytest.raises(EvaluationError, match="3 values for 2 prompts"):
        evaluation.win_rate([1.0, 2.0], [1.0, 2.0, 3.0])


def _length_biased(prompts=600, seed=0, bias=2.5, quality=0.0):
    """Wins that come from length alone: P(win) = sigmoid(quality + bias · tanh(d / std d)), the first mostly longer."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(20, 41, prompts), rng.integers(5, 36, prompts)
    d = (lengths - others) / (lengths - others).std()
    wins = rng.random(prompts) < 1 / (1 + np.exp(-(quality + bias * np.tanh(d))))
    return wins.astype(float), np.zeros(prompts) + 0.5, lengths, others


def test_length_control_agrees_with_a_general_optimiser():
    wins, half, lengths, others = _length_biased()
    d = (lengths - others) / np.std(lengths - others)

    def negative_log_likelihood(theta):
        logit = theta[0] + theta[1] * np.tanh(d)
        return np.sum(np.logaddexp(0, logit) - wins * logit)

    intercept = minimize(negative_log_likelihood, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9}).x[0]
    result = evaluation.length_controlled_win_rate(wins, half, lengths, others)
    assert result.estimate == pytest.approx(1 / (1 + math.exp(-intercept)), abs=1e-4)


def test_length_control_takes_away_a_win_rate_won_by_length_alone():
    wins, half, lengths, others = _length_biased(2000)
    plain = evaluation.win_rate(wins, half)
    controlled = evaluation.length_controlled_win_rate(wins, half, lengths, others)
    assert plain.low > 0.7
    assert controlled.low < 0.5 < controlled.high


def test_length_control_keeps_what_is_not_due_to_length():
    wins, half, lengths, others = _length_biased(4000, quality=1.0)
    controlled = evaluation.length_controlled_win_rate(wins, half, lengths, others)
    assert controlled.low < 1 / (1 + math.exp(-1.0)) < controlled.high


def test_length_control_without_any_difference_in_length_is_the_win_rate():
    scores, baseline = [3.0, 1.0, 0.0, 2.0, 4.0], [1.0, 1.0, 5.0, 1.5, 0.0]
    result = evaluation.length_controlled_win_rate(scores, baseline, [7] * 5, [7] * 5)
    assert result.estimate == pytest.approx(3.5 / 5, abs=1e-3)


@pytest.mark.parametrize("wins", [np.ones(40), (np.arange(40) > 19).astype(float)])
def test_length_control_stays_finite_where_one_side_or_one_length_wins_everything(wins):
    result = evaluation.length_controlled_win_rate(wins, np.full(40, 0.5), np.arange(40), np.full(40, 19.5), 200)
    assert np.isfinite(result).all() and 0 <= result.low <= result.high <= 1


def test_agreement_counts_an_undecided_rater_as_half():
    # same sign, opposite, undecided first, undecided both
    result = evaluation.pairwise_agreement([1.0, 2.0, 0.0, 0.0], [0.5, -1.0, 3.0, 0.0])
    assert (result.rate, result.ties, result.n) == (0.5, 0.5, 4)


def test_distinct_n_by_hand():
    responses = [[1, 2, 1, 2], [1, 2, 3], [5]]
    assert evaluation.ngram_count(responses, 2) == 5
    assert evaluation.distinct_n(responses, 2) == 3 / 5  # (1,2) (2,1) (2,3): no bigram crosses two responses
    assert evaluation.distinct_n(responses, 1) == 4 / 8


def test_distinct_n_at_equal_counts_does_not_punish_the_longer_responses():
    rng = np.random.default_rng(0)
    short, long = ([rng.integers(0, 30, length).tolist() for _ in range(200)] for length in (10, 40))
    count = evaluation.common_ngram_count(2, short, long)
    assert count == 200 * 9
    as_they_come = evaluation.distinct_n(short, 2), evaluation.distinct_n(long, 2)
    equal = evaluation.distinct_n(short, 2, count), evaluation.distinct_n(long, 2, count)
    assert as_they_come[0] > 3 * as_they_come[1]
    assert equal[0] == pytest.approx(equal[1], rel=0.05)


def test_distinct_n_refuses_a_count_it_cannot_supply():
    with pytest.raises(EvaluationError, match="common_ngram_count"):
        evaluation.distinct_n([[1, 2]], 2, 5)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    proxy = rng.permutation(12.0 + np.arange(12)).reshape(2, 6)
    gold = rng.normal(size=(2, 6))
    expected = []
    for row in range(2):
        best = [max(subset, key=lambda i: proxy[row, i]) for subset in itertools.combinations(range(6), n)]
        expected.append([np.mean(proxy[row, best]), np.mean(gold[row, best])])
    got = np.stack([evaluation.expected_best_of_n(proxy, n), evaluation.expected_best_of_n(proxy, n, gold)], 1)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_several_sizes_of_best_of_n_at_once():
    samples, gold = np.random.default_rng(0).normal(size=(2, 5, 8)).round(1)
    got = evaluation.expected_best_of_n(samples, [1, 2, 8], gold)
    np.testing.assert_allclose(got[0], gold.mean(1))
    tied = [np.mean(gold[row, samples[row] == samples[row].max()]) for row in range(5)]
    np.testing.assert_allclose(got[2], tied)
    np.testing.assert_allclose(got[1], evaluation.expected_best_of_n(samples, 2, gold))
    with pytest.raises(EvaluationError, match="best of 0"):
        evaluation.expected_best_of_n(samples, [0, 8])


def test_best_of_n_breaks_ties_at_random_rather_than_by_position():
    # Samples 1 and 2 tie for best: of {0,1,2}, half the gold of each; pairs (0,1) → 5, (0,2) → 9, (1,2) → 7.
    result = evaluation.expected_best_of_n([[0.0, 1.0, 1.0]], 2, [[-1.0, 5.0, 9.0]])
    assert result == pytest.approx([7.0])
    same = evaluation.expected_best_of_n([[1.0, 1.0, 1.0]], 2, [[0.0, 3.0, 6.0]])
    assert same == pytest.approx([3.0])


def test_best_of_n_is_unbiased_for_a_known_distribution():
    samples = np.random.default_rng(0).random((4000, 8))  # E[max of n uniforms] = n / (n + 1)
    for n in (1, 4, 8):
        assert evaluation.expected_best_of_n(samples, n).mean() == pytest.approx(n / (n + 1), abs=0.006)


def test_best_of_n_does_not_overflow():
    samples = np.random.default_rng(0).normal(size=(2, 256))
    np.testing.assert_allclose(evaluation.expected_best_of_n(samples, 128, np.ones((2, 256))), 1.0)


def test_best_of_n_needs_n_samples():
    with pytest.raises(EvaluationError, match="best of 4"):
        evaluation.expected_best_of_n([[1.0, 2.0]], 4)


def test_the_kl_bound_of_best_of_n_by_hand_and_as_an_integral():
    assert evaluation.best_of_n_kl(1) == 0
    assert evaluation.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    u = (np.arange(200_000) + 0.5) / 200_000  # quantile of the score: the density ratio is n u^(n-1)
    for n in (2, 16):
        ratio = n * u ** (n - 1)
        assert evaluation.best_of_n_kl(n) == pytest.approx(np.mean(ratio * np.log(ratio)), abs=1e-4)


def test_best_of_n_from_few_likely_responses_moves_less_than_the_bound():
    p = np.array([0.6, 0.3, 0.1])
    best = np.diff(np.concatenate([[0], np.cumsum(p)]) ** 4)
    assert np.sum(best * np.log(best / p)) < evaluation.best_of_n_kl(4)


# ---------------------------------------------------------------------------------------------- models


def _policy(tokenizer, seed: int, eos_logit: float = 0.0) -> Policy:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    lm = GPT2LMHeadModel(config)
    with torch.no_grad():
        lm.transformer.wte.weight.mul_(20)  # far from uniform, so that the KL is not tiny
        lm.transformer.ln_f.bias.fill_(0.25)
        lm.transformer.wte.weight[tokenizer.eos_token_id] = eos_logit / (16 * 0.25)
    return Policy(lm)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-gpt2")


@pytest.fixture(scope="module")
def models(tokenizer):
    return _policy(tokenizer, 0, eos_logit=8.0), frozen_copy(_policy(tokenizer, 1, eos_logit=8.0))


def _cfg(**overrides):
    return load_config("smoke", 0, {"rollouts.response_length": 8, "rollouts.batch_size": 3, **overrides})


QUERIES = ["This film", "I went to see the old theatre and", "A", "The actors were not", "Never again"]


def _words(queries, responses):
    return [float(len((q + r).split())) for q, r in zip(queries, responses)]


def _rollout(tokenizer) -> Rollout:
    generator = torch.Generator().manual_seed(5)
    queries, query_mask = pad_queries([[0, 9, 4], [0, 3], [0, 7, 7, 8, 2]], tokenizer.pad_token_id)
    responses = torch.randint(1, len(tokenizer), (3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    responses[1, 1] = tokenizer.eos_token_id  # ends by EOS, and is padded with EOS behind it
    responses[~mask] = tokenizer.pad_token_id
    ended = torch.tensor([False, True, False])
    return Rollout(queries, query_mask, responses, mask, ended, torch.zeros(3, 6), torch.zeros(3, 6))


def test_exact_kl_per_response_equals_a_float64_loop_over_tokens_and_vocabulary(models, tokenizer):
    policy, reference = models
    rollout = _rollout(tokenizer)
    expected = []
    doubles = [GPT2LMHeadModel(m.lm.config).double().eval() for m in models]
    for double, model in zip(doubles, models):
        double.load_state_dict(model.lm.state_dict())
    for row in range(3):
        query = rollout.queries[row][rollout.query_mask[row]]
        response = rollout.responses[row][rollout.mask[row]]
        ids = torch.cat([query, response])[None]
        logps = [double(ids).logits.log_softmax(-1)[0].detach().numpy() for double in doubles]
        total = 0.0
        for t in range(len(query) - 1, ids.shape[1] - 1):  # the state before each response token
            total += sum(math.exp(p) * (p - q) for p, q in zip(logps[0][t].tolist(), logps[1][t].tolist()))
        expected.append(total)
    got = evaluation.exact_kl_per_response(policy, reference, rollout, rows=2)
    assert got.shape == (3,) and not got.requires_grad
    assert min(expected) > 0.5
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)


def test_exact_kl_does_not_depend_on_its_chunks_and_is_zero_against_itself(models, tokenizer):
    policy, reference = models
    rollout = _rollout(tokenizer)
    whole = evaluation.exact_kl_per_response(policy, reference, rollout, rows=8)
    torch.testing.assert_close(whole, evaluation.exact_kl_per_response(policy, reference, rollout, rows=1))
    assert evaluation.exact_kl_per_response(policy, policy, rollout).abs().max() < 1e-6


def test_response_statistics_count_the_eos_as_a_token(tokenizer):
    assert evaluation.response_statistics(_rollout(tokenizer)) == pytest.approx({"length": 4.0, "eos_rate": 1 / 3})


@pytest.fixture(scope="module")
def evaluated(models, tokenizer):
    scorers = {"gold": _words, "proxy": lambda q, r: torch.tensor(_words(q, r)) ** 2}
    return evaluation.evaluate(*models, tokenizer, QUERIES, scorers, _cfg())


def test_an_evaluation_has_one_record_per_prompt_in_their_order(evaluated, tokenizer):
    assert evaluated.queries == QUERIES
    assert {len(v) for v in (evaluated.responses, evaluated.tokens, evaluated.kl, *evaluated.scores.values())} == {5}
    eos = tokenizer.eos_token_id
    assert evaluated.ended.any() and not evaluated.ended.all()
    for tokens, length, ended, response in zip(evaluated.tokens, evaluated.length, evaluated.ended, evaluated.responses):
        assert len(tokens) == length and (tokens[-1] == eos) == ended and eos not in tokens[:-1]
        assert response == tokenizer.decode([t for t in tokens if t != eos])
    assert evaluated.scores["gold"].tolist() == _words(QUERIES, evaluated.responses)
    assert (evaluated.kl > 0).all() and evaluated.tokens_per_second > 0


def test_an_evaluation_is_reproducible_and_moves_with_the_seed(models, tokenizer, evaluated):
    again = evaluation.evaluate(*models, tokenizer, QUERIES, {"gold": _words}, _cfg())
    assert again.responses == evaluated.responses
    other = evaluation.evaluate(*models, tokenizer, QUERIES, {}, _cfg().model_copy(update={"seed": 1}))
    assert other.responses != evaluated.responses


def test_an_evaluation_is_saved_and_loaded_whole(evaluated, tmp_path):
    path = tmp_path / "deep" / "after.parquet"
    evaluated.save(path)
    loaded = evaluation.Evaluation.load(path)
    assert (loaded.queries, loaded.responses, loaded.tokens) == (QUERIES, evaluated.responses, evaluated.tokens)
    for name in ("kl", "length", "ended"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(evaluated, name))
    assert loaded.scores.keys() == evaluated.scores.keys()
    np.testing.assert_array_equal(loaded.scores["proxy"], evaluated.scores["proxy"])
    assert loaded.tokens_per_second == evaluated.tokens_per_second
    assert [p.name for p in path.parent.iterdir()] == ["after.parquet"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 half a file"])
def test_a_missing_or_damaged_evaluation_says_what_to_do(tmp_path, content):
    path = tmp_path / "x.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvaluationError, match="run the stage again"):
        evaluation.Evaluation.load(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops_and_names_the_prompt(models, tokenizer, bad):
    with pytest.raises(EvaluationError, match=r"'gold'.*prompt 2") as error:
        evaluation.evaluate(*models, tokenizer, QUERIES, {"gold": lambda q, r: [0, 1, bad, 3, 4]}, _cfg())
    assert "\n" not in str(error.value)


def test_a_scorer_that_drops_a_response_is_caught(models, tokenizer):
    with pytest.raises(EvaluationError, match="give one each"):
        evaluation.evaluate(*models, tokenizer, QUERIES, {"gold": lambda q, r: _words(q, r)[:-1]}, _cfg())


def test_no_prompts_stop_with_one_line(models, tokenizer):
    with pytest.raises(EvaluationError, match="n_prompts"):
        evaluation.evaluate(*models, tokenizer, [], {}, _cfg())


def test_best_of_n_picks_by_the_proxy_and_reports_the_gold(models, tokenizer):
    cfg = _cfg(**{"evaluation.best_of_n": 6})
    result = evaluation.best_of_n(models[0], tokenizer, QUERIES, _words, lambda q, r: [-w for w in _words(q, r)], cfg)
    assert result.proxy.shape == (5, 6) and [len(r) for r in result.responses] == [6] * 5
    assert result.proxy[3, 4] == len((QUERIES[3] + result.responses[3][4]).split())
    rows = result.curve(200)
    assert [row["n"] for row in rows] == [1, 2, 4, 6]
    assert rows[0]["proxy"].estimate == pytest.approx(result.proxy.mean())
    assert rows[-1]["proxy"].estimate == pytest.approx(result.proxy.max(1).mean())
    # Gold is the opposite of the proxy here: the more the proxy gains, the more the gold loses.
    assert rows[-1]["gold"].estimate == pytest.approx(-result.proxy.max(1).mean())
    assert rows[-1]["gold"].estimate < rows[0]["gold"].estimate


def _record(scores: dict, length=5, queries=None, prompts=200) -> evaluation.Evaluation:
    scores = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    prompts = len(next(iter(scores.values())))
    return evaluation.Evaluation(
        queries or [f"q{i}" for i in range(prompts)], ["r"] * prompts, [[1, 2, 3, i % 7, 5] for i in range(prompts)],
        scores, np.ones(prompts), np.full(prompts, length), np.ones(prompts, bool), 100.0,
    )  # fmt: skip


def test_the_summary_is_paired_by_prompt():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 10, 200)  # prompts differ far more than the two policies do
    before, after = _record({"gold": easy}), _record({"gold": easy + 1 + 0.1 * rng.normal(size=200)})
    rows = {row.quantity: row for row in evaluation.summary(before, after, 500)}
    gold = rows["gold score"]
    assert gold.before.high - gold.before.low > 2
    assert gold.difference.high - gold.difference.low < 0.1
    assert gold.difference.estimate == pytest.approx(1, abs=0.05)
    assert rows["win rate, gold"].after.estimate == 1 and "of 200" in rows["win rate, gold"].note


def test_the_summary_marks_the_score_that_was_optimised_as_no_evidence():
    rng = np.random.default_rng(0)
    score, other = rng.normal(size=(2, 50))
    # "gold" is the very reward that was optimised, under another name.
    before = _record({"proxy": score, "gold": score, "independent": other})
    after = _record({"proxy": score + 1, "gold": score + 1, "independent": other})
    marked = {row.quantity for row in evaluation.summary(before, after, 100) if "no evidence" in row.note}
    assert {"proxy score", "gold score", "win rate, proxy", "win rate, gold"} <= marked
    assert not any("independent" in name for name in marked)


def test_the_summary_refuses_different_prompts():
    with pytest.raises(EvaluationError, match="different prompts"):
        evaluation.summary(_record({"gold": [1, 2]}), _record({"gold": [1, 2]}, queries=["q1", "q0"]))


def test_rollout_like_records_are_enough_for_statistics():
    fake = SimpleNamespace(lengths=torch.tensor([2, 4]), ended=torch.tensor([True, True]))
    assert evaluation.response_statistics(fake) == {"length": 3.0, "eos_rate": 1.0}
