"""Supervised fine-tuning: which tokens are in the loss, and how they are averaged."""

import pytest
import torch
from test_models import gpt2

from rlhf_nb_utils import models, sft
from rlhf_nb_utils.config import CourseError, SFTConfig, TrainingError
from rlhf_nb_utils.rollouts import encode_queries

DEMOS = [([0, 5, 6], [7, 8, 9, 0]), ([0, 4], [3, 0])]


@pytest.fixture
def policy():
    return models.Policy(gpt2())


def nll(policy, query, response):
    """float64, one token at a time, without padding."""
    total = []
    for t in range(len(response)):
        logits = policy.lm(torch.tensor([query + response[:t]])).logits[0, -1].double()
        total.append(-(logits[response[t]] - torch.logsumexp(logits, 0)).item())
    return total


def test_the_loss_is_the_token_mean_over_responses_with_eos_and_without_prompts(policy):
    expected = [loss for demo in DEMOS for loss in nll(policy, *demo)]
    found = sft.sft_loss(policy, sft.collate(DEMOS, pad_token_id=0))
    assert len(expected) == 6  # both EOS are in it, although EOS is also the pad
    assert abs(found.item() - sum(expected) / len(expected)) < 1e-5


def test_padding_changes_nothing(policy):
    one = sft.response_nll(policy, sft.collate(DEMOS[1:], 0))[0]
    both = sft.response_nll(policy, sft.collate([*DEMOS, ([0] * 9, [1] * 9)], 0))[1, :2]
    torch.testing.assert_close(one, both, atol=2e-6, rtol=1e-5)


def test_the_response_mask_is_no_view_of_the_attention_mask():
    batch = sft.collate(DEMOS, 0)
    before = batch["attention_mask"].clone()
    batch["mask"].zero_()
    assert torch.equal(batch["attention_mask"], before)


def test_prompt_tokens_get_no_gradient_as_targets(policy):
    """A token that occurs only in a prompt is pushed up by no one: its output row moves only as a competitor."""
    policy.lm.lm_head.weight = torch.nn.Parameter(policy.lm.lm_head.weight.detach().clone())  # untie
    sft.sft_loss(policy, sft.collate([([0, 5, 6], [7, 0])], 0)).backward()
    hidden = policy.lm.transformer(torch.tensor([[0, 5, 6, 7]])).last_hidden_state[0].detach()
    logits = hidden @ policy.lm.lm_head.weight.T
    expected = sum(torch.softmax(logits[t], -1)[5] * hidden[t] for t in (2, 3)) / 2
    torch.testing.assert_close(policy.lm.lm_head.weight.grad[5], expected.detach(), atol=1e-5, rtol=1e-4)


def assert_split(tokenizer):
    query, response = "I thought this film", " was good. Très bien 🎬!"
    query_ids, response_ids = sft.encode_demonstration(tokenizer, query, response, 96)
    assert tokenizer.decode(query_ids, skip_special_tokens=True) == query
    assert tokenizer.decode(response_ids, skip_special_tokens=True) == response
    assert query_ids[0] == tokenizer.bos_token_id and response_ids[-1] == tokenizer.eos_token_id
    assert response_ids.count(tokenizer.eos_token_id) == 1


def test_a_demonstration_is_split_where_the_query_ends():
    assert_split(models.load_tokenizer("tiny-gpt2"))


@pytest.mark.mirror
def test_the_same_with_the_tokenizer_of_gpt2():
    assert_split(models.load_tokenizer("openai-community/gpt2"))


def test_a_demonstration_that_is_cut_has_no_eos_and_a_prompt_too_long_is_refused():
    tokenizer = models.load_tokenizer("tiny-gpt2")
    _, response = sft.encode_demonstration(tokenizer, "The film", " is good" * 30, 20)
    assert tokenizer.eos_token_id not in response
    with pytest.raises(CourseError, match="sft.max_length=8"):
        sft.encode_demonstration(tokenizer, "The film " * 9, " is good", 8)


class Letters:
    """A tokenizer of 32 letters: id = 1 + place in the alphabet; 0 is BOS, EOS and pad."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(c) % 30 for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def test_training_lowers_the_loss_and_repeats_itself(policy):
    demos = [("ab", "cde"), ("ba", "edc"), ("aa", "c")] * 8
    cfg = SFTConfig(learning_rate=1e-2, epochs=3, batch_size=5, max_length=16)
    twin = models.Policy(gpt2())
    rows, again = (sft.train(p, Letters(), demos, cfg, seed=1, heldout=demos[:3]) for p in (policy, twin))
    assert rows == again
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["step"] == 15
    assert [r["step"] for r in rows if "heldout_loss" in r] == [5, 10, 15]
    expected = [loss for q, r in demos[:3] for loss in nll(policy, *sft.encode_demonstration(Letters(), q, r, 16))]
    assert abs(rows[-1]["heldout_loss"] - sum(expected) / len(expected)) < 1e-5


def test_a_loss_that_is_not_finite_stops_and_names_the_step(policy):
    policy.lm.transformer.wte.weight.data[3] = float("nan")
    with pytest.raises(TrainingError, match="at step 1"):
        sft.train(policy, Letters(), [("ab", "cd")], SFTConfig(epochs=1, batch_size=1, max_length=16))


def test_bf16_weights_are_refused_because_adamw_keeps_no_master(policy):
    with pytest.raises(TrainingError, match="fp32 master"):
        sft.train(policy.to(torch.bfloat16), Letters(), [("ab", "cd")], SFTConfig(max_length=16))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(policy):
    before = [p.detach().clone() for p in policy.parameters()]
    policy.lm.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="at step 1"):
        sft.train(policy, Letters(), [("ab", "cd")], SFTConfig(epochs=1, batch_size=1, max_length=16))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_the_rate_warms_up_and_decays():
    factors = [sft.linear_warmup_decay(step, 10, 2) for step in range(10)]
    assert factors == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_a_text_never_becomes_a_special_token():
    tokenizer = models.load_tokenizer("tiny-gpt2")
    marker = tokenizer.eos_token
    query, response = sft.encode_demonstration(tokenizer, "A film", f" of{marker} note.", 96)
    assert tokenizer.eos_token_id not in query[1:] + response[:-1] and response[-1] == tokenizer.eos_token_id
    (ids,) = encode_queries(tokenizer, [f"A {marker} film"])
    assert tokenizer.eos_token_id not in ids[1:] and tokenizer.decode(ids[1:]) == f"A {marker} film"


def test_without_demonstrations_nothing_is_trained_or_measured(policy):
    tokenizer = models.load_tokenizer("tiny-gpt2")
    for call in (sft.train, sft.heldout_loss):
        with pytest.raises(CourseError, match="no demonstrations"):
            call(policy, tokenizer, [], SFTConfig())
