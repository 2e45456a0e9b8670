"""Padded rows are computed without most of their padding: the same numbers, in the same places, and fewer positions."""

import pytest
import torch
from test_models import gpt2, llama

from rlhf_nb_utils import packing
from rlhf_nb_utils.models import Policy, position_ids

QUERIES, RESPONSES = [1, 4, 2, 3], [5, 1, 3, 2]  # real tokens of rows in columns of 4 + 6


def mask_of(queries, responses, width=4, length=6):
    left = torch.arange(width) >= width - torch.tensor(queries)[:, None]
    return torch.cat([left, torch.arange(length) < torch.tensor(responses)[:, None]], 1)


def test_rows_begin_at_their_first_real_token_and_end_with_the_longest():
    mask, ids = mask_of(QUERIES, RESPONSES), torch.arange(40).view(4, 10)
    places = packing.layout(mask, 6)
    assert places.columns.shape == (4, 5)  # the longest has 1 + 5 tokens, and its last predicts none
    for row, real in enumerate(mask):
        expected = ids[row][real][:-1]
        got = ids.gather(1, places.columns)[row][places.attention[row]]
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "mask", [mask_of(QUERIES, RESPONSES), mask_of([4], [6]), mask_of([1, 1], [6, 1]), mask_of([0, 4, 0], [3, 2, 6])]
)
def test_states_stand_before_the_tokens_they_predict(mask):
    ids = torch.arange(mask.numel()).view(mask.shape)  # every token its own name
    places = packing.layout(mask, 6)
    states = ids.gather(1, places.columns).flatten()[places.states]
    assert torch.equal(states + 1, places.labels(ids))
    assert torch.equal(places.labels(ids), ids[:, -6:][mask[:, -6:]])
    spread = places.spread(places.labels(ids))
    assert torch.equal(spread, ids[:, -6:] * mask[:, -6:])


def test_rows_without_padding_need_no_question():
    asked, full = packing.layout(torch.ones(3, 10), 6), packing.full(3, 10, 6)
    assert all(torch.equal(a, b) for a, b in zip(asked[:4], full[:4])) and asked.shape == full.shape


def test_a_spread_table_carries_the_gradient_of_its_entries():
    places, found = packing.layout(mask_of(QUERIES, RESPONSES), 6), torch.ones(11, 2, requires_grad=True)
    table = places.spread(found)
    assert table.shape == (4, 6, 2)
    (table * torch.arange(24.0).view(4, 6, 1)).sum().backward()
    kept = torch.arange(24.0).view(4, 6)[mask_of(QUERIES, RESPONSES)[:, -6:]]
    assert torch.equal(found.grad, kept[:, None].expand(-1, 2))


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_policy_says_of_padded_rows_what_it_says_of_each_alone(build, chunked):
    torch.manual_seed(0)
    policy, mask = Policy(build(), separate=True), mask_of(QUERIES, RESPONSES)
    torch.nn.init.normal_(policy.value_head.weight)
    policy.chunked_head, ids = chunked, torch.randint(0, 9, mask.shape)
    computed = []
    count = lambda _, __, given: computed.append(given["input_ids"].numel())  # noqa: E731
    hook = policy.lm.base_model.register_forward_pre_hook(count, with_kwargs=True)
    logits, _ = policy(ids, mask, 6)
    table = policy.evaluate(ids, mask, 6, 0.7, entropy_grad=True)
    assert torch.equal(table[0], policy.logprobs(ids, mask, 6, 0.7)) and torch.equal(table[1], policy.values(ids, mask, 6))
    hook.remove()
    assert max(computed) == 20  # 4 rows of 5, not of 9
    for row, (queries, responses) in enumerate(zip(QUERIES, RESPONSES)):
        alone = ids[row : row + 1, mask[row]]
        found = policy.evaluate(alone, None, responses, 0.7)
        for whole, part in zip(table, found):
            torch.testing.assert_close(whole[row, :responses], part[0], atol=1e-5, rtol=0)
            assert not whole[row, responses:].any()
        torch.testing.assert_close(logits[row, :responses], policy(alone, None, responses)[0][0], atol=1e-5, rtol=0)
        plain = policy.lm(alone).logits[0, queries - 1 : -1].float() / 0.7
        expected = plain.log_softmax(-1).gather(1, alone[0, queries:, None]).squeeze(1)
        torch.testing.assert_close(table[0][row, :responses], expected, atol=1e-5, rtol=0)


def test_a_mask_that_hides_the_query_still_means_what_it_says():
    """A mistake the course shows: the response mask, made as a view, has emptied the attention mask's query."""
    torch.manual_seed(0)
    policy, ids = Policy(gpt2()), torch.randint(0, 9, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, :4] = mask[1, :6] = mask[2, :2] = mask[2, 8:] = False
    seen = mask[:, :-1].long()
    with torch.no_grad():
        states = policy.lm.base_model(input_ids=ids[:, :-1], attention_mask=seen, position_ids=position_ids(seen))
        logits = policy.lm.lm_head(states.last_hidden_state[:, -6:])
        expected = logits.log_softmax(-1).gather(-1, ids[:, -6:, None]).squeeze(-1)
        torch.testing.assert_close(policy.logprobs(ids, mask, 6), expected * mask[:, -6:], atol=1e-5, rtol=0)
