import pytest
import torch

from rlhf_nb_utils.gae import gae, last_token_index, token_rewards
from rlhf_nb_utils.tensor_ops import whiten

NAN = float("nan")
SETTINGS = [(1.0, 0.95), (1.0, 1.0), (1.0, 0.0), (0.9, 0.8), (0.9, 0.0), (0.0, 0.5)]


def batch(kind="right", seed=0, dtype=torch.float64):
    """rewards, values (6, 7) and a mask: rows of 7, 5, 3, 2, 1 and 0 tokens; padding on the right or left, or holes."""
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 6, 7, generator=draw, dtype=dtype)
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 2, 1, 0]).unsqueeze(1)
    if kind == "left":
        mask = mask.flip(1)
    if kind == "holes":
        mask = mask[:, torch.randperm(7, generator=draw)]
    return rewards, values, mask


def real(row, mask_row):
    return [float(x) for x, keep in zip(row, mask_row) if keep]


def assert_tokens(got, mask, expected):
    """``got`` (B, T) holds the lists ``expected`` on the mask, in order, and 0 off it."""
    for row in range(len(mask)):
        assert real(got[row], mask[row]) == pytest.approx(expected[row], abs=1e-12)
    assert (got[~mask] == 0).all()


def deltas(rewards, values, gamma):
    """One-step TD errors of one episode; nothing follows the last token."""
    after = [*values[1:], 0.0]
    return [r + gamma * n - v for r, v, n in zip(rewards, values, after)]


def advantage_sum(rewards, values, gamma, lam):
    """The O(T²) definition: A_t = Σ_l (γλ)^l δ_{t+l}, for one episode."""
    delta = deltas(rewards, values, gamma)
    steps = range(len(delta))
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in steps if u >= t) for t in steps]


def lambda_return(rewards, values, gamma, lam):
    """The other definition: (1 − λ) Σ_n λ^(n−1) G_n, the last n-step return taking all the weight that is left."""
    returns, steps = [], len(rewards)
    for t in range(steps):
        total, left = 0.0, steps - t
        for n in range(1, left + 1):
            n_step = sum(gamma**i * rewards[t + i] for i in range(n))
            n_step += gamma**n * values[t + n] if n < left else 0.0
            total += (lam ** (n - 1) if n == left else (1 - lam) * lam ** (n - 1)) * n_step
        returns.append(total)
    return returns


# --- gae ---


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_advantages_and_returns_equal_the_quadratic_sums(gamma, lam, kind):
    rewards, values, mask = batch(kind)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    episodes = [(real(r, m), real(v, m)) for r, v, m in zip(rewards, values, mask)]
    assert_tokens(advantages, mask, [advantage_sum(r, v, gamma, lam) for r, v in episodes])
    assert_tokens(returns, mask, [lambda_return(r, v, gamma, lam) for r, v in episodes])


def test_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 0.5, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, True, False]]), gamma=1, lam=0.5)
    assert advantages.tolist() == [[0.0, 0.5, 0.5, 0.0]]  # δ = −0.25, 0.25, 0.5
    assert returns.tolist() == [[0.5, 0.75, 1.0, 0.0]]


@pytest.mark.parametrize("garbage", [1e9, NAN, float("inf")])
def test_nothing_off_the_mask_leaks_in(garbage):
    for kind in ("right", "left", "holes"):
        rewards, values, mask = batch(kind)
        dirty_rewards, dirty_values = rewards.where(mask, garbage), values.where(mask, garbage)
        for clean, dirty in zip(gae(rewards, values, mask, 1, 0.95), gae(dirty_rewards, dirty_values, mask, 1, 0.95)):
            assert torch.equal(clean, dirty)


def test_the_value_after_the_last_real_token_is_zero():
    rewards, values = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.5, 7.0]])
    advantages, _ = gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1, lam=0)
    assert advantages[0, 1].item() == 1.5  # 8.5 with the value of the padding as bootstrap


def test_rows_without_tokens_give_zeros_and_single_tokens_their_own_error():
    rewards, values = torch.tensor([[NAN, NAN], [3.0, NAN]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[False, False], [True, False]]), 1, 0.95)
    assert advantages.tolist() == [[0, 0], [2, 0]] and returns.tolist() == [[0, 0], [3, 0]]


def test_padding_and_batch_order_change_nothing():
    rewards, values, mask = batch()
    whole = gae(rewards, values, mask, 1, 0.95)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    for got, expected in zip(gae(rewards[order], values[order], mask[order], 1, 0.95), whole):
        assert torch.equal(got, expected[order])
    pad = torch.full((6, 2), 5.0, dtype=torch.float64)
    wide = [torch.cat([pad, x, pad], dim=1) for x in (rewards, values)]
    wide_mask = torch.cat([pad < 0, mask, pad < 0], dim=1)
    for got, expected in zip(gae(*wide, wide_mask, 1, 0.95), whole):
        assert torch.equal(got[:, 2:-2], expected)


def test_returns_are_made_before_whitening():
    rewards, values, mask = batch()
    advantages, returns = gae(10 * rewards, 10 * values, mask, 1, 0.95)
    torch.testing.assert_close(returns, torch.where(mask, advantages + 10 * values, 0.0))
    assert (returns - whiten(advantages, mask) - 10 * values)[mask].abs().max() > 1  # the wrong targets are far away
    assert advantages[mask].std() > 2  # gae itself whitens nothing


def test_returns_minus_values_is_the_advantage_and_the_one_step_error_only_at_lambda_0():
    rewards, values, mask = batch()
    one_step = [deltas(real(r, m), real(v, m), 1.0) for r, v, m in zip(rewards, values, mask)]
    for lam in (0.0, 0.5, 0.95, 1.0):
        advantages, returns = gae(rewards, values, mask, 1, lam)
        error = torch.where(mask, returns - values, 0.0)
        torch.testing.assert_close(error, advantages)
        if lam == 0:
            assert_tokens(error, mask, one_step)
        else:
            assert error[0].tolist() != pytest.approx(one_step[0], abs=0.1)


def test_advantages_are_constants_and_at_least_fp32():
    rewards, values, mask = batch(dtype=torch.float32)
    advantages, returns = gae(rewards, values.clone().requires_grad_(), mask, 1, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    for x in gae(rewards.bfloat16(), values.bfloat16(), mask, 1, 0.95):
        assert x.dtype == torch.float32


def test_inputs_are_left_as_they_were():
    rewards, values, mask = batch()
    copies = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, 1, 0.95)
    token_rewards(torch.ones(6, dtype=torch.float64), values, mask, 0.1)
    assert torch.equal(rewards, copies[0]) and torch.equal(values, copies[1]) and torch.equal(mask, copies[2])


def test_bad_input_is_refused():
    rewards, values, mask = batch()
    with pytest.raises(ValueError, match=r"values \(6, 6\)"):
        gae(rewards, values[:, :-1], mask, 1, 0.95)
    for gamma, lam in ((1.1, 0.5), (1, -0.1), (1, NAN)):
        with pytest.raises(ValueError, match="gamma and lam"):
            gae(rewards, values, mask, gamma, lam)
    with pytest.raises(ValueError, match="one per response"):
        token_rewards(torch.zeros(6, 7), values, mask, 0.1)
    with pytest.raises(ValueError, match="at least 1"):
        last_token_index(torch.zeros(3, 0, dtype=torch.bool))


# --- last_token_index, token_rewards ---


def test_last_token_index_under_every_kind_of_padding():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert last_token_index(mask).tolist() == [2, 3, 2, 0, 3, -1]


def test_the_score_lands_on_each_rows_last_real_token():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.zeros(5, 4), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0]]


def test_kl_costs_reward_on_every_real_token_and_nowhere_else():
    kl = torch.tensor([[0.5, -1.0, 2.0, NAN], [1.0, NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 9.8, 0.0], [19.9, 0.0, 0.0, 0.0]]))


def test_rewards_of_a_row_sum_to_score_minus_the_kl_of_the_response():
    _, kl, mask = batch()
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0, 8.0], dtype=torch.float64)
    totals = token_rewards(scores, kl, mask, 0.3).sum(1)
    expected = [s - 0.3 * sum(real(k, m)) for s, k, m in zip(scores.tolist(), kl, mask)]
    assert totals[:5].tolist() == pytest.approx(expected[:5]) and totals[5] == 0


def test_rewards_do_not_change_with_padding_or_batch_order():
    _, kl, mask = batch()
    scores = torch.arange(6, dtype=torch.float64)
    whole = token_rewards(scores, kl, mask, 0.3)
    assert torch.equal(token_rewards(scores.flip(0), kl.flip(0), mask.flip(0), 0.3), whole.flip(0))
    pad = torch.full((6, 3), 5.0, dtype=torch.float64)
    wide = token_rewards(scores, torch.cat([pad, kl, pad], 1), torch.cat([pad < 0, mask, pad < 0], 1), 0.3)
    assert torch.equal(wide[:, 3:-3], whole) and (wide[:, :3] == 0).all() and (wide[:, -3:] == 0).all()


def test_rewards_carry_no_gradient():
    kl = torch.ones(1, 2, requires_grad=True)
    assert not token_rewards(torch.ones(1), kl, torch.ones(1, 2, dtype=torch.bool), 0.1).requires_grad
