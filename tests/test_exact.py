import copy
import itertools
import math

import pytest
import torch

from rlhf_nb_utils import exact
from rlhf_nb_utils.gae import gae, token_rewards
from rlhf_nb_utils.kl import k1, k3

BETA = 0.3
WORLD = exact.make_world(seed=0)
STRINGS = exact.all_strings()
TUPLES = list(itertools.product(range(4), repeat=6))


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = WORLD.ref_logits + 0.7 * noise(1, 1365, 4)  # a policy well away from the reference and from the optimum
ANY_CRITIC = noise(2, 1365)
EXACT_CRITIC = exact.values(LOGITS, WORLD, BETA).v


def python_tables(logits):
    """Conditionals as a dictionary from prefix (a tuple) to four probabilities; prefixes counted without exact's ids."""
    prefixes = [p for t in range(6) for p in itertools.product(range(4), repeat=t)]
    rows = logits.tolist()
    weights = [[math.exp(x) for x in row] for row in rows]
    return {prefix: [w / math.fsum(row) for w in row] for prefix, row in zip(prefixes, weights)}


def python_string_probabilities(logits):
    table = python_tables(logits)
    return [math.prod(table[x[:t]][x[t]] for t in range(6)) for x in TUPLES]


P, Q = python_string_probabilities(LOGITS), python_string_probabilities(WORLD.ref_logits)
R = WORLD.reward.tolist()


# --- strings and distributions ---


def test_the_strings_are_all_4096_in_order():
    assert [tuple(x) for x in STRINGS.tolist()] == TUPLES
    assert exact.string_ids(STRINGS).tolist() == list(range(4096))
    assert exact.as_text(STRINGS[[0, 1, 4095]]) == ["aaaaaa", "aaaaab", "dddddd"]


def test_a_state_is_a_prefix_and_holds_nothing_of_the_token_after_it():
    ids = exact.prefix_ids(STRINGS).tolist()
    pairs = {(x[:t], row[t]) for x, row in zip(TUPLES, ids) for t in range(6)}
    assert len(pairs) == len({prefix for prefix, _ in pairs}) == len({state for _, state in pairs}) == 1365
    for prefix, state in pairs:
        assert exact.level(len(prefix)).start <= state < exact.level(len(prefix)).stop


def test_an_incomplete_string_has_no_reward():
    with pytest.raises(ValueError, match="complete strings of 6"):
        WORLD.scores(STRINGS[:, :5])


def test_sequence_probabilities_equal_a_python_loop():
    probabilities = exact.sequence_logprobs(LOGITS).exp()
    assert probabilities.tolist() == pytest.approx(P, rel=1e-12)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


def test_visitation_is_the_mass_of_the_strings_that_pass_through():
    mass = dict.fromkeys(range(1365), 0.0)
    for row, p in zip(exact.prefix_ids(STRINGS).tolist(), P):
        for state in row:
            mass[state] += p
    assert exact.visitation(LOGITS).tolist() == pytest.approx([mass[s] for s in range(1365)], rel=1e-10)


def test_the_kl_of_strings_is_the_expected_sum_of_the_kls_of_tokens():
    of_strings = math.fsum(p * math.log(p / q) for p, q in zip(P, Q))
    assert exact.sequence_kl(LOGITS, WORLD.ref_logits).item() == pytest.approx(of_strings, rel=1e-12)
    assert exact.sequence_kl(WORLD.ref_logits, WORLD.ref_logits).item() == 0


def test_the_reward_has_mean_0_and_variance_1_under_the_reference_and_depends_on_the_seed_alone():
    assert math.fsum(q * r for q, r in zip(Q, R)) == pytest.approx(0, abs=1e-12)
    assert math.fsum(q * r * r for q, r in zip(Q, R)) == pytest.approx(1, rel=1e-12)
    again, other = exact.make_world(seed=0), exact.make_world(seed=1)
    assert torch.equal(again.reward, WORLD.reward) and torch.equal(again.ref_logits, WORLD.ref_logits)
    assert not torch.equal(other.reward, WORLD.reward)


def test_samples_follow_the_policy_and_repeat_with_the_generator():
    samples = exact.sample(LOGITS, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(samples, exact.sample(LOGITS, 20_000, torch.Generator().manual_seed(0)))
    for t in range(6):
        counts = torch.bincount(samples[:, t], minlength=4) / len(samples)
        expected = [math.fsum(p for x, p in zip(TUPLES, P) if x[t] == token) for token in range(4)]
        assert counts.tolist() == pytest.approx(expected, abs=0.015)
    assert WORLD.scores(samples).mean().item() == pytest.approx(math.fsum(p * r for p, r in zip(P, R)), abs=0.035)


# --- values, objective, gradient ---


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("prefix", [(), (2,), (1, 3), (0, 2, 1, 1), (3, 0, 0, 2, 1)])
def test_values_of_a_prefix_equal_a_sum_over_its_completions(prefix, beta):
    pi, ref, t = python_tables(LOGITS), python_tables(WORLD.ref_logits), len(prefix)

    def worth(start):
        """Expected reward from step t on, over completions of ``start``, given ``start``."""
        total = 0.0
        for x, r in zip(TUPLES, R):
            if x[: len(start)] == start:
                probability = math.prod(pi[x[:u]][x[u]] for u in range(len(start), 6))
                cost = sum(math.log(pi[x[:u]][x[u]] / ref[x[:u]][x[u]]) for u in range(t, 6))
                total += probability * (r - beta * cost)
        return total

    found = exact.values(LOGITS, WORLD, beta)
    state = list(pi).index(prefix)
    q = [worth((*prefix, token)) for token in range(4)]
    assert found.q[state].tolist() == pytest.approx(q, abs=1e-10)
    assert found.v[state].item() == pytest.approx(worth(prefix), abs=1e-10)
    assert found.advantages[state].tolist() == pytest.approx([x - worth(prefix) for x in q], abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_the_objective_is_reward_minus_beta_kl_and_the_value_of_the_empty_prefix(beta):
    expected = math.fsum(p * (r - beta * math.log(p / q)) for p, q, r in zip(P, Q, R))
    assert exact.objective(LOGITS, WORLD, beta).item() == pytest.approx(expected, abs=1e-12)
    assert exact.values(LOGITS, WORLD, beta).v[0].item() == pytest.approx(expected, abs=1e-12)


def autograd_gradient(logits, beta):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(exact.objective(logits, WORLD, beta), logits)[0]


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_the_gradient_is_that_of_the_objective(beta):
    gradient = exact.gradient(LOGITS, WORLD, beta)
    torch.testing.assert_close(gradient, autograd_gradient(LOGITS, beta), atol=1e-13, rtol=1e-9)
    for state, token in ((0, 1), (7, 3), (400, 2)):  # and of finite differences, which know no calculus
        step = torch.zeros_like(LOGITS)
        step[state, token] = 1e-4
        rise = exact.objective(LOGITS + step, WORLD, beta) - exact.objective(LOGITS - step, WORLD, beta)
        assert gradient[state, token].item() == pytest.approx(rise.item() / 2e-4, rel=1e-5)


# --- the optimum ---


def test_the_optimal_distribution_is_the_tilted_reference():
    weights = [q * math.exp(r / BETA) for q, r in zip(Q, R)]
    z = math.fsum(weights)
    log_p, log_z = exact.optimal_distribution(WORLD, BETA)
    assert log_p.exp().tolist() == pytest.approx([w / z for w in weights], rel=1e-9)
    assert log_z.item() == pytest.approx(math.log(z), rel=1e-12)


def test_the_optimal_conditionals_make_up_the_optimal_distribution():
    logits, soft_values = exact.optimal_policy(WORLD, BETA)
    torch.testing.assert_close(exact.sequence_logprobs(logits), exact.optimal_distribution(WORLD, BETA)[0])
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(1365, dtype=torch.float64))
    torch.testing.assert_close(soft_values, exact.values(logits, WORLD, BETA).v)


def test_the_optimum_is_worth_beta_log_z_and_nothing_is_worth_more():
    logits, _ = exact.optimal_policy(WORLD, BETA)
    best = BETA * math.log(math.fsum(q * math.exp(r / BETA) for q, r in zip(Q, R)))
    assert exact.objective(logits, WORLD, BETA).item() == pytest.approx(best, rel=1e-12)
    for seed in range(10):
        assert exact.objective(logits + 0.1 * noise(seed, 1365, 4), WORLD, BETA).item() < best - 1e-4
    assert exact.objective(LOGITS, WORLD, BETA).item() < best


def test_at_the_optimum_every_advantage_and_the_gradient_vanish():
    logits, _ = exact.optimal_policy(WORLD, BETA)
    assert exact.values(logits, WORLD, BETA).advantages.abs().max() < 1e-12
    assert autograd_gradient(logits, BETA).abs().max() < 1e-12
    assert exact.gradient(logits, WORLD, BETA).abs().max() < 1e-12
    assert autograd_gradient(logits, 2 * BETA).abs().max() > 1e-3  # it is the optimum of this beta only


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_without_a_penalty_there_is_no_such_optimum(beta):
    for function in (exact.optimal_policy, exact.optimal_distribution):
        with pytest.raises(ValueError, match="beta must be above 0"):
            function(WORLD, beta)


# --- policy gradients, by enumeration ---


def expected_gradient(advantages):
    """E_π[Σ_t A_t ∇log π(a_t|s_t)]: every string, weighted by its probability. advantages: (4096, 6), constants."""
    logits = LOGITS.clone().requires_grad_()
    weights = torch.tensor(P, dtype=torch.float64).unsqueeze(1)
    loss = (weights * advantages * exact.token_logprobs(logits, STRINGS)).sum()
    return torch.autograd.grad(loss, logits)[0]


def variance_of_gradient(advantages):
    """Trace of the covariance of Σ_t A_t ∇log π(a_t|s_t); states differ along a string, so squares just add."""
    pi = LOGITS.softmax(-1)[exact.prefix_ids(STRINGS)]
    scores = torch.nn.functional.one_hot(STRINGS, 4) - pi
    square = (advantages.unsqueeze(-1) * scores).square().sum((1, 2))
    return (torch.tensor(P, dtype=torch.float64) @ square - expected_gradient(advantages).square().sum()).item()


def rewards(beta=BETA, estimator=k1):
    """Token rewards (4096, 6) of every string, through the package's own functions."""
    divergence = estimator(exact.token_logprobs(LOGITS, STRINGS), exact.token_logprobs(WORLD.ref_logits, STRINGS))
    return token_rewards(WORLD.reward, divergence, torch.ones_like(STRINGS, dtype=torch.bool), beta)


def gae_advantages(critic, lam, gamma=1.0, beta=BETA):
    mask = torch.ones_like(STRINGS, dtype=torch.bool)
    return gae(rewards(beta), critic[exact.prefix_ids(STRINGS)], mask, gamma, lam)[0]


def bias(advantages, beta=BETA):
    """Largest error of the expected gradient, relative to the largest entry of the true one."""
    truth = autograd_gradient(LOGITS, beta)
    return ((expected_gradient(advantages) - truth).abs().max() / truth.abs().max()).item()


UNBIASED, CLEARLY = 1e-9, 0.02


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_reinforce_is_unbiased_with_and_without_a_baseline(beta):
    whole = rewards(beta).sum(1, keepdim=True).expand(-1, 6)
    to_go = rewards(beta).flip(1).cumsum(1).flip(1)
    assert bias(whole, beta) < UNBIASED and bias(to_go, beta) < UNBIASED
    assert bias(whole - 3.0, beta) < UNBIASED  # a constant
    assert bias(to_go - ANY_CRITIC[exact.prefix_ids(STRINGS)], beta) < UNBIASED  # a function of the state


def test_a_baseline_that_sees_the_action_is_biased():
    to_go = rewards().flip(1).cumsum(1).flip(1)
    q = exact.values(LOGITS, WORLD, BETA).q[exact.prefix_ids(STRINGS), STRINGS]
    assert bias(to_go - q) > CLEARLY


def test_a_value_that_has_already_seen_the_token_is_biased():
    after = exact.prefix_ids(STRINGS)[:, 1:]  # values shifted by one: of the state behind each token
    shifted = torch.cat([EXACT_CRITIC[after], torch.zeros(4096, 1, dtype=torch.float64)], dim=1)
    advantages, _ = gae(rewards(), shifted, torch.ones_like(STRINGS, dtype=torch.bool), 1, 1)
    assert bias(advantages) > CLEARLY


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("critic", [ANY_CRITIC, torch.zeros_like(ANY_CRITIC), 10 * ANY_CRITIC])
def test_gae_at_lambda_1_is_unbiased_whatever_the_critic(critic, beta):
    assert bias(gae_advantages(critic, lam=1.0, beta=beta), beta) < UNBIASED


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_the_exact_critic_is_unbiased_at_any_lambda(lam, beta):
    assert bias(gae_advantages(exact.values(LOGITS, WORLD, beta).v, lam, beta=beta), beta) < UNBIASED


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_gae_below_lambda_1_is_biased_when_the_critic_is_wrong(lam):
    assert bias(gae_advantages(ANY_CRITIC, lam)) > CLEARLY
    assert bias(gae_advantages(exact.values(LOGITS, WORLD, 0.0).v, lam)) > 0.2 * CLEARLY  # a critic blind to the KL


def test_discounting_is_a_bias_too():
    assert bias(gae_advantages(EXACT_CRITIC, lam=1.0, gamma=0.9)) > CLEARLY


def test_a_critic_and_a_smaller_lambda_lower_the_variance():
    by_lambda = [variance_of_gradient(gae_advantages(EXACT_CRITIC, lam)) for lam in (1.0, 0.95, 0.5, 0.0)]
    assert by_lambda == sorted(by_lambda, reverse=True)
    assert by_lambda[0] < variance_of_gradient(gae_advantages(torch.zeros_like(EXACT_CRITIC), 1.0))


def test_the_kl_penalty_is_part_of_the_gradient():
    assert bias(gae_advantages(ANY_CRITIC, lam=1.0, beta=0.0), BETA) > CLEARLY  # forgotten
    assert bias(gae_advantages(ANY_CRITIC, lam=1.0, beta=-BETA), BETA) > CLEARLY  # of the wrong sign


def test_k1_in_the_reward_gives_the_gradient_of_the_kl_and_k3_does_not():
    def to_go(estimator):
        return rewards(estimator=estimator).flip(1).cumsum(1).flip(1)

    assert bias(to_go(k1)) < UNBIASED
    assert bias(to_go(k3)) > CLEARLY  # the same mean, but its own derivative, left out, does not average to zero


def test_the_score_on_an_earlier_token_loses_the_credit_of_those_after_it():
    early = rewards(beta=0.0).roll(-1, dims=1)
    advantages, _ = gae(early, torch.zeros(4096, 6, dtype=torch.float64), torch.ones_like(STRINGS).bool(), 1, 1)
    assert bias(advantages, beta=0.0) > CLEARLY


@pytest.mark.parametrize(("critic", "lam"), [(ANY_CRITIC, 1.0), (EXACT_CRITIC, 1.0), (EXACT_CRITIC, 0.5)])
def test_returns_average_to_the_value_of_each_state(critic, lam):
    states, mask = exact.prefix_ids(STRINGS), torch.ones_like(STRINGS, dtype=torch.bool)
    advantages, returns = gae(rewards(), critic[states], mask, 1, lam)
    weights = torch.tensor(P, dtype=torch.float64).unsqueeze(1).expand(-1, 6)

    def mean_by_state(targets):
        total = torch.zeros(1365, dtype=torch.float64).index_add_(0, states.flatten(), (weights * targets).flatten())
        return total / exact.visitation(LOGITS)

    torch.testing.assert_close(mean_by_state(returns), EXACT_CRITIC, atol=1e-9, rtol=0)
    whitened = (advantages - advantages.mean()) / advantages.std()
    assert (mean_by_state(whitened + critic[states]) - EXACT_CRITIC).abs().max() > 0.1  # a critic on the wrong scale


# --- the trainable table ---


def test_a_tabular_policy_evaluates_like_a_language_model():
    policy = exact.TabularPolicy(LOGITS, ANY_CRITIC)
    responses, mask = policy.sample(50, torch.Generator().manual_seed(0))
    assert responses.shape == mask.shape == (50, 6) and mask.dtype == torch.bool and mask.all()
    assert torch.equal(responses, exact.sample(LOGITS, 50, torch.Generator().manual_seed(0)))
    pi, states = python_tables(LOGITS), list(python_tables(LOGITS))
    input_ids = torch.cat([torch.full((50, 3), 99), responses], dim=1)  # the query is not read
    logprobs, values, entropy = policy.evaluate(input_ids, torch.ones_like(input_ids), 6)
    for row in range(50):
        x = tuple(responses[row].tolist())
        for t in range(6):
            p = pi[x[:t]]
            assert logprobs[row, t].item() == pytest.approx(math.log(p[x[t]]), abs=1e-12)
            assert entropy[row, t].item() == pytest.approx(-math.fsum(q * math.log(q) for q in p), abs=1e-12)
            assert values[row, t] == ANY_CRITIC[states.index(x[:t])]
    logits, same_values = policy(input_ids, None, 6)
    assert logits.shape == (50, 6, 4) and torch.equal(values, same_values)
    assert torch.equal(policy.values(input_ids, None, 6), values)


def test_a_tabular_policy_at_a_temperature():
    policy = exact.TabularPolicy(LOGITS)
    logprobs, _, _ = policy.evaluate(STRINGS, temperature=2.0)
    torch.testing.assert_close(logprobs, exact.token_logprobs(LOGITS / 2, STRINGS))


def test_a_tabular_policy_owns_its_tables_and_both_train():
    start = LOGITS.clone()
    policy = exact.TabularPolicy(start)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.SGD(policy.parameter_groups(1.0, 0.5), lr=1.0)
    logprobs, values, entropy = policy.evaluate(STRINGS[:5])
    assert not entropy.requires_grad and policy.evaluate(STRINGS, entropy_grad=True)[2].requires_grad
    (-logprobs.sum() + (values - 1).square().sum()).backward()
    optimizer.step()
    assert (policy.evaluate(STRINGS[:5])[0].sum() > logprobs.sum()) and policy.state_values.abs().max() > 0
    assert torch.equal(start, LOGITS) and torch.equal(reference.logits, LOGITS)
    assert {p.dtype for p in policy.parameters()} == {torch.float64}


def test_gradient_ascent_on_the_exact_gradient_comes_to_the_optimum():
    world = exact.make_world(seed=5)
    policy = exact.TabularPolicy(world.ref_logits)
    optimizer = torch.optim.Adam([policy.logits], lr=0.1)
    best = exact.optimal_policy(world, 1.0)[1][0].item()
    for _ in range(300):
        policy.logits.grad = -exact.gradient(policy.logits.detach(), world, 1.0)
        optimizer.step()
    assert exact.objective(policy.logits, world, 1.0).item() == pytest.approx(best, abs=1e-4)


def test_the_reward_of_text_is_the_reward_of_its_tokens():
    scores = WORLD.reward_fn(["any"] * 4096, exact.as_text(STRINGS))
    assert torch.equal(scores, WORLD.reward)
