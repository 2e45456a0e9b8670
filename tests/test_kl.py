import json
import math

import pytest
import torch

from rlhf_nb_utils import exact
from rlhf_nb_utils.kl import AdaptiveKL, FixedKL, exact_kl, k1, k2, k3

WORLD = exact.make_world(seed=3)
LOGITS = WORLD.ref_logits + torch.randn(
    exact.N_STATES, exact.VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64
)


def categorical(seed, n=9):
    p = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return (p / p.sum()).tolist()


P, Q = categorical(0), categorical(1)  # policy, reference
KL = math.fsum(p * math.log(p / q) for p, q in zip(P, Q))
REVERSE_KL = math.fsum(q * math.log(q / p) for p, q in zip(P, Q))


def expectation(estimator):
    """Mean under the policy of an estimator, over one step with nine tokens: every outcome, weighted by P."""
    samples = estimator(torch.tensor([P], dtype=torch.float64).log(), torch.tensor([Q], dtype=torch.float64).log())
    return math.fsum(p * x for p, x in zip(P, samples[0].tolist()))


# --- estimators ---


def test_by_hand_where_the_policy_likes_the_token_twice_as_much():
    logprobs, ref_logprobs = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2))  # not −log 2
    assert k2(logprobs, ref_logprobs).item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert k3(logprobs, ref_logprobs).item() == pytest.approx(0.5 - 1 + math.log(2))  # not 2 − 1 − log 2


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    assert abs(KL - REVERSE_KL) > 0.01  # else this test could not tell one direction from the other
    assert expectation(estimator) == pytest.approx(KL, rel=1e-12)


def test_k2_is_biased_with_a_known_expectation():
    expected = math.fsum(p * 0.5 * math.log(p / q) ** 2 for p, q in zip(P, Q))
    assert expectation(k2) == pytest.approx(expected, rel=1e-12)
    assert abs(expected - KL) > 0.01 * KL


@pytest.mark.parametrize("estimator", [k1, k3])
def test_over_whole_strings_the_tokens_sum_to_the_exact_kl(estimator):
    strings = exact.all_strings()
    logprobs = exact.token_logprobs(LOGITS, strings)
    ref_logprobs = exact.token_logprobs(WORLD.ref_logits, strings)
    p, q = logprobs.sum(-1).exp(), ref_logprobs.sum(-1).exp()
    of_strings = (p * (p / q).log()).sum().item()
    assert (p * estimator(logprobs, ref_logprobs).sum(-1)).sum().item() == pytest.approx(of_strings, rel=1e-10)
    assert (p * k2(logprobs, ref_logprobs).sum(-1)).sum().item() != pytest.approx(of_strings, rel=0.01)


def test_a_sampled_k1_may_be_negative_but_k2_and_k3_never_are():
    logprobs, ref_logprobs = torch.tensor([P]).log(), torch.tensor([Q]).log()
    assert k1(logprobs, ref_logprobs).min() < 0 < KL
    assert k2(logprobs, ref_logprobs).min() >= 0 and k3(logprobs, ref_logprobs).min() >= 0


def test_k3_varies_less_than_k1_where_the_policies_are_close():
    p = torch.tensor([P], dtype=torch.float64)
    q = p + 0.02 * (torch.tensor([Q], dtype=torch.float64) - p)

    def variance(x):
        return (p * x**2).sum() - (p * x).sum() ** 2

    assert variance(k3(p.log(), q.log())) < 0.01 * variance(k1(p.log(), q.log()))


def test_the_estimators_vanish_where_the_policies_agree():
    logprobs = torch.tensor([P]).log()
    assert all((estimator(logprobs, logprobs) == 0).all() for estimator in (k1, k2, k3))


def test_k3_is_accurate_next_to_ratio_one_in_fp32():
    difference = torch.tensor([[1e-3, -1e-3]])
    assert k3(difference, torch.zeros(1, 2))[0].tolist() == pytest.approx([5e-7, 5e-7], rel=2e-2)


def test_the_log_ratio_is_clamped_to_20():
    near, far = torch.tensor([[-1.0]]), torch.tensor([[-1000.0]])
    assert k1(near, far).item() == 20 and k1(far, near).item() == -20
    assert k2(near, far).item() == 200
    assert k3(near, far).item() == pytest.approx(19) and k3(far, near).item() == pytest.approx(math.exp(20), rel=1e-4)
    assert k1(torch.tensor([[-1.0]]), torch.tensor([[-20.5]])).item() == 19.5


def test_bf16_logprobs_are_compared_in_fp32_and_shapes_must_agree():
    assert k1(torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(1, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="one shape"):
        k1(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="one shape"):
        exact_kl(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))


# --- exact_kl ---


def test_exact_kl_equals_a_float64_loop_in_the_right_direction():
    logits, ref_logits = torch.tensor([[P, Q]]).log() + 5, torch.tensor([[Q, P]]).log() - 3  # logits are not normalised
    got = exact_kl(logits, ref_logits)
    assert got.shape == (1, 2) and got.dtype == torch.float32
    assert got[0].tolist() == pytest.approx([KL, REVERSE_KL], rel=1e-4)


def test_exact_kl_with_impossible_tokens():
    inf = math.inf
    some, all_ = torch.tensor([[[0.0, 0.0, -inf]]]), torch.tensor([[[0.0, 0.0, 0.0]]])
    assert exact_kl(some, all_).item() == pytest.approx(math.log(3 / 2))
    assert exact_kl(some, some).item() == 0
    assert exact_kl(all_, some).item() == inf


def test_exact_kl_does_not_change_with_padding_or_batch_order():
    draw = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 4, 5, generator=draw)
    whole = exact_kl(logits, ref_logits)
    assert torch.equal(exact_kl(logits.flip(0), ref_logits.flip(0)), whole.flip(0))
    torch.testing.assert_close(exact_kl(logits[:, 2:], ref_logits[:, 2:]), whole[:, 2:])


# --- controllers ---


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(kl=100.0, n=10_000)
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "error"), [(6.6, 0.1), (5.4, -0.1), (6.0, 0.0), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2), (7.2, 0.2)]
)
def test_adaptive_kl_moves_by_the_clipped_proportional_error(kl, error):
    controller = AdaptiveKL(0.15, target=6, horizon=10_000)
    controller.update(kl, n=256)
    assert controller.value == pytest.approx(0.15 * (1 + error * 256 / 10_000), rel=1e-12)


def test_adaptive_kl_over_3200_episodes_at_the_usual_horizon_moves_by_seven_percent_at_most():
    controller = AdaptiveKL(0.15, target=6, horizon=10_000)
    for _ in range(50):
        controller.update(kl=1e3, n=64)
    assert 1.06 < controller.value / 0.15 < 1.07


def test_a_batch_far_larger_than_the_horizon_cannot_make_the_coefficient_negative():
    controller = AdaptiveKL(0.15, target=6, horizon=10)
    controller.update(kl=0.0, n=1000)
    assert controller.value == pytest.approx(0.15 * 0.8)


def test_controllers_resume_from_json():
    for build in (lambda: FixedKL(0.1), lambda: AdaptiveKL(0.1, 6, 300)):
        controller, resumed = build(), build()
        controller.update(kl=9.0, n=64)
        resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        controller.update(kl=2.0, n=64)
        resumed.update(kl=2.0, n=64)
        assert resumed.value == controller.value


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_kl_refuses_a_kl_that_is_not_finite(kl):
    controller = AdaptiveKL(0.1, 6, 300)
    with pytest.raises(ValueError, match="diverged"):
        controller.update(kl, n=64)
    assert controller.value == 0.1


def test_controllers_refuse_impossible_settings():
    for build in (lambda: FixedKL(-0.1), lambda: FixedKL(math.nan), lambda: AdaptiveKL(-1, 6, 300)):
        with pytest.raises(ValueError, match="kl_coef"):
            build()
    for settings in ((0, 6, 300), (0.1, 0, 300), (0.1, 6, 0), (0.1, 6, math.nan)):
        with pytest.raises(ValueError, match="above 0"):
            AdaptiveKL(*settings)
