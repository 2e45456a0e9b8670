"""The two loops write the same; the one of fixed shapes is what a CUDA graph replays."""

import pytest
import torch
from test_models import gpt2, llama
from test_rollouts import QUERIES, Ids, make_policy
from transformers import DynamicCache, FalconConfig, GPT2Config, GPTNeoConfig, LlamaConfig, MistralConfig

from rlhf_nb_utils import decoding, rollouts
from rlhf_nb_utils.config import RolloutsConfig

LENGTH = 20


def likeliest(logits):
    """No chance: the loops draw for different rows, so only a choice without draws can be compared token by token."""
    logprobs, token = logits.log_softmax(-1).max(-1)
    return token, logprobs


def queries():
    return rollouts.pad_queries(QUERIES[:6], Ids.pad_token_id)


@pytest.mark.parametrize(("build", "separate", "temperature"), [(gpt2, False, 1.0), (gpt2, True, 0.7), (llama, False, 1.0)])
@pytest.mark.parametrize("eos_bias", [0.0, 1.5])
def test_both_loops_write_the_same(build, separate, temperature, eos_bias):
    policy = make_policy(build, separate, eos_bias)
    given = policy, *queries(), LENGTH, likeliest, Ids.eos_token_id, 31, temperature
    one, other = decoding.shrinking(*given), decoding.fixed(*given)
    for name in ("responses", "mask", "ended"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("logprobs", "values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    assert (one.values != 0).any() != separate


def test_rows_end_at_their_eos_and_stay_padded_behind_it():
    policy = make_policy()

    def by_turns(logits, calls=[0]):  # noqa: B006
        """Row i writes EOS as its token i + 1, and a 7 before and after."""
        calls[0] += 1
        return torch.where(torch.arange(1, len(logits) + 1) == calls[0], 0, 7), torch.full((len(logits),), -float(calls[0]))

    found = decoding.fixed(policy, *queries(), LENGTH, by_turns, Ids.eos_token_id, 31)
    for row in range(6):
        assert found.responses[row].tolist() == [7] * row + [0] + [31] * (LENGTH - row - 1)
        assert found.mask[row].tolist() == [True] * (row + 1) + [False] * (LENGTH - row - 1)
        assert found.logprobs[row, : row + 1].tolist() == [-float(k) for k in range(1, row + 2)]
        assert (found.logprobs[row, row + 1 :] == 0).all() and (found.values[row, row + 1 :] == 0).all()
    assert found.ended.all()


def test_the_host_asks_only_now_and_then_and_stops_when_all_have_ended(monkeypatch):
    policy, steps, next_token = make_policy(), [], decoding.next_token
    monkeypatch.setattr(decoding, "next_token", lambda *args: steps.append(1) or next_token(*args))
    found = decoding.fixed(
        policy, *queries(), LENGTH, lambda logits: (torch.zeros(len(logits), dtype=torch.int64), logits[:, 0]), 0, 31
    )
    assert found.mask.sum() == 6 and len(steps) == decoding.ASK  # all ended with the first token, seen at the next question


@pytest.mark.parametrize("separate", [False, True])
def test_what_the_fixed_loop_recorded_is_what_a_fresh_forward_says(separate, monkeypatch):
    """Sampled through `rollouts.sample`, as on a CUDA device."""
    monkeypatch.setattr(decoding, "shrinking", lambda *args: decoding.fixed(*args))
    policy = make_policy(separate=separate)
    cfg = RolloutsConfig(response_length=12, temperature=0.8)
    rollout = rollouts.sample(policy, QUERIES, cfg, Ids, torch.Generator().manual_seed(0))
    assert len(set(rollout.lengths.tolist())) > 3
    with torch.no_grad():
        logprobs, values, _ = policy.evaluate(rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1], 0.8)
    torch.testing.assert_close(rollout.logprobs, logprobs * rollout.mask, atol=1e-4, rtol=0)
    torch.testing.assert_close(rollout.values, values * rollout.mask, atol=1e-4, rtol=0)


@pytest.mark.cuda
def test_a_graph_writes_what_single_steps_write(monkeypatch):
    policy = make_policy().cuda()
    given = policy, *(x.cuda() for x in queries()), LENGTH, likeliest, Ids.eos_token_id, 31
    graph = decoding.fixed(*given)
    monkeypatch.setattr(decoding, "WARM", LENGTH)  # never captured
    steps = decoding.fixed(*given)
    assert torch.equal(graph.responses, steps.responses) and torch.equal(graph.mask, steps.mask)
    torch.testing.assert_close(graph.logprobs, steps.logprobs, atol=1e-4, rtol=0)


@pytest.mark.cuda
def test_a_graph_draws_anew_at_every_replay():
    policy = make_policy(eos_bias=-1e4).cuda()
    cfg = RolloutsConfig(response_length=LENGTH)
    draws = [
        rollouts.sample(policy, QUERIES, cfg, Ids, torch.Generator("cuda").manual_seed(seed)).responses for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert (draws[0][:, decoding.WARM + 2 :] != draws[0][:, decoding.WARM + 1 : -1]).any()


def test_a_roomy_cache_holds_what_the_librarys_own_holds():
    config, draw = gpt2().config, torch.Generator().manual_seed(0)
    roomy, plain = decoding.roomy_cache(config, 9), DynamicCache(config=config)
    stay = torch.tensor([0, 2])
    for width in (4, 1, 1, 1):
        if width == 1 and roomy.get_seq_length() == 5:
            roomy.batch_select_indices(stay)
            plain.batch_select_indices(stay)
        rows = 3 if plain.get_seq_length() <= 4 else 2
        for layer in range(2):
            new = [torch.randn(rows, 2, width, 8, generator=draw) for _ in range(2)]
            for ours, theirs in zip(roomy.update(*new, layer), plain.update(*new, layer)):
                assert torch.equal(ours, theirs)
        assert roomy.get_seq_length() == plain.get_seq_length()
    assert roomy.get_seq_length() == 7 and len(roomy.layers[0].keys) == 2


@pytest.mark.parametrize(
    ("config", "fixed"),
    [
        (GPT2Config(attn_implementation="sdpa"), True),
        (LlamaConfig(attn_implementation="sdpa"), True),
        (GPT2Config(attn_implementation="eager"), False),  # adds the mask to the scores, where True is 1
        (GPTNeoConfig(attn_implementation="eager"), False),
        (MistralConfig(attn_implementation="sdpa", sliding_window=6), False),  # a layer that keeps fewer tokens
        (FalconConfig(attn_implementation="sdpa", alibi=True), False),  # counts positions by the mask
    ],
)
def test_a_model_that_reads_the_mask_in_another_way_is_not_sampled_at_one_size(config, fixed):
    assert decoding.can_be_fixed(config) == fixed


def test_with_eager_attention_the_loop_of_one_size_would_be_wrong():
    """Why `can_be_fixed` asks: padding would be attended to."""
    policy = make_policy()
    policy.lm.config._attn_implementation = "eager"
    given = policy, *queries(), LENGTH, likeliest, Ids.eos_token_id, 31
    one, other = decoding.shrinking(*given), decoding.fixed(*given)
    assert (one.logprobs - other.logprobs).abs().max() > 0.1
