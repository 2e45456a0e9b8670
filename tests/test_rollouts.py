"""Sampling: what is recorded is what a fresh forward says, and masks tell a real EOS from padding."""

import pytest
import torch
from scipy.stats import chisquare
from test_models import gpt2, llama
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_nb_utils import models, rollouts
from rlhf_nb_utils.config import RolloutsConfig
from rlhf_nb_utils.rollouts import Rollout, RolloutError


class Ids:
    bos_token_id = eos_token_id = pad_token_id = 0


QUERIES = [[0, 5, 6, 7], [0, 9], [0], [0, 1, 2, 3, 4, 5]] * 6


def make_policy(build=gpt2, separate=False, eos_bias=2.5):
    policy = models.Policy(build(), separate)
    torch.nn.init.normal_(policy.value_head.weight)
    head = torch.nn.Linear(16, 32)  # a bias makes EOS likely, so that rows finish at different times
    head.weight.data.copy_(policy.lm.get_output_embeddings().weight.data * 20)
    head.bias.data.zero_()
    head.bias.data[0] = eos_bias
    policy.lm.lm_head = head
    return policy


def draw(policy, cfg=None, seed=0, queries=QUERIES):
    cfg = cfg or RolloutsConfig(response_length=12)
    return rollouts.sample(policy, queries, cfg, Ids, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("build", "separate", "temperature"), [(gpt2, False, 1.0), (gpt2, True, 0.7), (llama, False, 1.0)])
def test_what_was_recorded_is_what_a_fresh_forward_says(build, separate, temperature):
    policy = make_policy(build, separate)
    rollout = draw(policy, RolloutsConfig(response_length=12, temperature=temperature))
    assert len(set(rollout.lengths.tolist())) > 4  # rows did leave the batch at different times
    for row in range(len(QUERIES)):
        length = int(rollout.lengths[row])
        ids = torch.tensor([QUERIES[row] + rollout.responses[row, :length].tolist()])
        out = policy.lm(ids, output_hidden_states=True)
        first = len(QUERIES[row]) - 1
        logits = out.logits[0, first : first + length].double() / temperature
        expected = torch.log_softmax(logits, -1).gather(1, rollout.responses[row, :length, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[row, :length].double(), expected, atol=1e-4, rtol=0)
        trunk = policy.value_trunk or policy.lm.base_model
        hidden = trunk(ids).last_hidden_state[0, first : first + length]
        torch.testing.assert_close(rollout.values[row, :length], policy.value_head(hidden)[:, 0], atol=1e-4, rtol=0)
    assert (rollout.logprobs[~rollout.mask] == 0).all() and (rollout.values[~rollout.mask] == 0).all()


def test_the_mask_ends_with_the_first_eos_and_keeps_it():
    rollout = draw(make_policy())
    assert rollout.ended.any() and not rollout.ended.all()
    for response, mask, ended in zip(rollout.responses.tolist(), rollout.mask.tolist(), rollout.ended.tolist()):
        length = response.index(0) + 1 if 0 in response[: sum(mask)] else len(response)
        assert mask == [True] * length + [False] * (len(response) - length)
        assert ended == (0 in response[: sum(mask)])


def test_a_row_that_never_ends_is_marked_as_such():
    rollout = draw(make_policy(eos_bias=-100.0))
    assert not rollout.ended.any() and rollout.mask.all()


def test_first_tokens_follow_the_softmax():
    policy = make_policy(eos_bias=0.0)
    cfg = RolloutsConfig(response_length=1, temperature=0.8)
    tokens = draw(policy, cfg, seed=3, queries=[[0, 5, 6]] * 20_000).responses[:, 0]
    p = torch.softmax(policy.lm(torch.tensor([[0, 5, 6]])).logits[0, -1].double() / 0.8, -1)
    seen = torch.bincount(tokens, minlength=32)
    common = p > 1e-3
    observed = [*seen[common].tolist(), seen[~common].sum().item() + 1e-9]
    expected = [*(p[common] * 20_000).tolist(), p[~common].sum().item() * 20_000 + 1e-9]
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def test_top_k_and_top_p_restrict_what_is_drawn_but_not_what_is_recorded():
    policy = make_policy()
    full = torch.log_softmax(policy.lm(torch.tensor([[0, 5]])).logits[0, -1].double(), -1)
    order = full.argsort(descending=True)
    nucleus = set(order[: int((full[order].exp().cumsum(0) < 0.5).sum()) + 1].tolist())
    for cfg, allowed in (
        (RolloutsConfig(response_length=1, top_k=3), set(order[:3].tolist())),
        (RolloutsConfig(response_length=1, top_p=0.5), nucleus),
    ):
        rollout = draw(policy, cfg, queries=[[0, 5]] * 500)
        assert set(rollout.responses[:, 0].tolist()) == allowed
        torch.testing.assert_close(rollout.logprobs[:, 0].double(), full[rollout.responses[:, 0]], atol=1e-4, rtol=0)


def test_greedy_sampling_agrees_with_generate():
    policy = make_policy(eos_bias=0.0)
    rollout = draw(policy, RolloutsConfig(response_length=8, top_k=1))
    queries, mask = rollouts.pad_queries(QUERIES, 0)
    out = policy.lm.generate(queries, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    generated = torch.nn.functional.pad(out[:, queries.shape[1] :], (0, 8 - (out.shape[1] - queries.shape[1])))
    assert torch.equal(generated * rollout.mask, rollout.responses * rollout.mask)


def test_the_same_seed_gives_the_same_rollout_and_another_another():
    policy = make_policy()
    a, b, c = draw(policy, seed=1), draw(policy, seed=1), draw(policy, seed=2)
    assert torch.equal(a.responses, b.responses) and not torch.equal(a.responses, c.responses)


def test_many_batches_are_one_rollout_in_the_order_of_the_queries():
    policy = make_policy()
    done = []
    cfg = RolloutsConfig(response_length=6, batch_size=5)
    rollout = rollouts.sample_many(policy, QUERIES, cfg, Ids, 0, progress=lambda *x: done.append(x))
    assert done == [(5, 24), (10, 24), (15, 24), (20, 24), (24, 24)]
    for row, query in enumerate(QUERIES):
        assert rollout.queries[row][rollout.query_mask[row]].tolist() == query
    fresh = policy.logprobs(rollout.input_ids, rollout.attention_mask, 6)
    torch.testing.assert_close(rollout.logprobs, fresh.detach() * rollout.mask, atol=1e-4, rtol=0)


class Casts(TorchDispatchMode):
    """Counts how often each of some fp32 weights is cast to bf16."""

    def __init__(self, weights):
        super().__init__()
        self.times = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and args[0].data_ptr() in self.times:
            self.times[args[0].data_ptr()] += 1
        return out


def test_autocast_casts_a_weight_once_for_all_tokens_and_after_a_step_anew():
    policy = make_policy(eos_bias=-9.0)
    cfg, weights = RolloutsConfig(response_length=6), [p for p in policy.lm.parameters() if p.ndim == 2]
    for _ in range(2):
        with Casts(weights) as casts:
            found = rollouts.sample(policy, QUERIES, cfg, Ids, torch.Generator().manual_seed(0), bf16=True)
        assert max(casts.times.values()) == 1 and sum(casts.times.values()) >= 8
        torch.set_autocast_cache_enabled(False)
        try:
            again = rollouts.sample(policy, QUERIES, cfg, Ids, torch.Generator().manual_seed(0), bf16=True)
        finally:
            torch.set_autocast_cache_enabled(True)
        assert torch.equal(found.responses, again.responses) and torch.equal(found.logprobs, again.logprobs)
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_trimmed_rows_lose_only_columns_of_padding():
    policy = make_policy()
    rollout = draw(policy)
    rows = rollout.lengths.argsort()[:5]
    part, trimmed = rollout[rows], rollout[rows].trimmed()
    assert trimmed.mask.shape[1] == part.lengths.max() < part.mask.shape[1]
    assert trimmed.query_mask[:, 0].any() and trimmed.query_mask.sum() == part.query_mask.sum()
    assert trimmed.response_ids() == part.response_ids() and torch.equal(trimmed.ended, part.ended)
    with torch.no_grad():
        long, short = (policy.logprobs(r.input_ids, r.attention_mask, r.mask.shape[1])[r.mask] for r in (part, trimmed))
    torch.testing.assert_close(short, long)


def test_masks_are_no_views_of_each_other():
    rollout = draw(make_policy())
    rollout.attention_mask.zero_()
    assert rollout.mask.any() and rollout.query_mask.any()
    some = rollout[torch.tensor([2, 0])]
    assert isinstance(some, Rollout) and torch.equal(some.responses, rollout.responses[[2, 0]])


@pytest.mark.parametrize(
    ("queries", "wanted"), [([[0], []], "empty prompt"), ([], "empty prompt"), ([[0] * 30], "context of 32")]
)
def test_queries_that_cannot_be_sampled_are_refused(queries, wanted):
    with pytest.raises(RolloutError, match=wanted):
        draw(make_policy(), queries=queries)


def test_logits_that_are_not_finite_are_named():
    policy = make_policy()
    policy.lm.lm_head.bias.data[3] = float("nan")
    with pytest.raises(RolloutError, match="not finite at response token 1"):
        draw(policy)
    with pytest.raises(RolloutError, match="no prompts"):
        rollouts.sample_many(policy, [], RolloutsConfig(), Ids, 0)


def test_openings_get_a_bos_and_must_have_a_word():
    tokenizer = models.load_tokenizer("tiny-gpt2")
    ids = rollouts.encode_queries(tokenizer, ["I liked"])[0]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == "I liked"
    with pytest.raises(RolloutError, match="empty prompt"):
        rollouts.encode_queries(tokenizer, ["I liked", " \n"])


# --- draw -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 37, 4096])
def test_indices_are_drawn_as_often_as_their_probability_says_and_never_where_it_is_0(size):
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(size) % 3 == 1] = -torch.inf
    probs, n = logits.double().softmax(0), 200_000
    found = rollouts.draw(probs.float().expand(n, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(found, minlength=size)
    assert len(counts) == size and counts[probs == 0].sum() == 0
    often = probs * n >= 5
    expected = torch.cat([probs[often], probs[~often].sum()[None]]) * n
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    if (probs > 0).sum() > 1:
        assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_the_ends_of_the_unit_interval_draw_possible_indices(monkeypatch):
    probs = torch.tensor([[0.0, 0.0, 0.25, 0.0, 0.0, 0.5, 0.25, 0.0, 0.0]])
    for u, index in ((0.0, 2), (1.0, 6), (1 - 2**-53, 6), (0.25, 5), (0.25 - 1e-12, 2)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor([[u]], dtype=torch.float64))
        assert rollouts.draw(probs, None).tolist() == [index]
