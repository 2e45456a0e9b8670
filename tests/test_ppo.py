"""PPO against loops over tokens, enumeration in the exact world, and whole runs of a tiny language model."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_nb_utils import exact, ppo, stages
from rlhf_nb_utils.config import TrainingError, load_config
from rlhf_nb_utils.kl import FixedKL
from rlhf_nb_utils.models import Policy, frozen_copy
from rlhf_nb_utils.rollouts import Rollout, encode_queries, sample

PROMPTS = ["a", "bc", "the film", "d e", "It was", "zz z", "quite a lot", "ok", "No, I", "x y z", "why"]
EOS = 0


# --- a language model of 257 tokens: the bytes, and an end --------------------------------------------------------------


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": EOS} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"  # pad is EOS, as for GPT-2
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


TOKENIZER = byte_tokenizer()


def tiny_policy(seed=0, separate=False, dropout=0.0, dtype=torch.float32):
    """A random GPT-2 that knows its mind (logits of standard deviation 1) and ends a response now and then."""
    config = GPT2Config(
        vocab_size=257, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        initializer_range=0.25, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    torch.manual_seed(seed)
    lm = GPT2LMHeadModel(config)
    with torch.no_grad():
        lm.transformer.ln_f.bias[0] += 1.0
        lm.transformer.wte.weight[EOS, 0] += 2.0  # lifts the logit of EOS
    return Policy(lm.to(dtype), separate)


def settings(**changes):
    """`smoke` with small numbers; ``section__field=value`` changes them."""
    small = {
        "ppo.iterations": 2, "ppo.batch_size": 8, "ppo.num_mini_batches": 2, "ppo.num_ppo_epochs": 2, "ppo.learning_rate": 2e-3,
        "ppo.critic_learning_rate": 2e-3, "rollouts.response_length": 6, "rollouts.batch_size": 8,
    }  # fmt: skip
    return load_config("smoke", overrides=small | {name.replace("__", "."): value for name, value in changes.items()})


def taste(queries, responses):
    """A rule as reward: many different letters are good, and so is length."""
    return [len(set(response)) + 0.3 * len(response) - 0.1 * len(query) for query, response in zip(queries, responses)]


def start(cfg, policy=None, reward_fn=taste):
    policy = policy or tiny_policy(separate=cfg.ppo.critic == "separate")
    return ppo.prepare(policy, frozen_copy(policy), reward_fn, PROMPTS, TOKENIZER, cfg)


def run(cfg, state=None, reward_fn=taste, callbacks=()):
    """The state after ``cfg.ppo.iterations``, and the metrics of each iteration."""
    state, rows = state or start(cfg, reward_fn=reward_fn), []
    ppo.train(state, reward_fn, PROMPTS, TOKENIZER, cfg, [lambda _, metrics, __: rows.append(dict(metrics)), *callbacks])
    return state, rows


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def roll(policy, cfg, seed=0, prompts=PROMPTS):
    generator = torch.Generator().manual_seed(seed)
    return sample(policy, encode_queries(TOKENIZER, prompts), cfg.rollouts, TOKENIZER, generator)


# --- the losses, against loops over tokens ------------------------------------------------------------------------------


def random_step(seed, rows=6, columns=5):
    draw = torch.Generator().manual_seed(seed)
    old, change, advantages = (torch.randn(rows, columns, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(rows, columns, generator=draw) < 0.7
    return old - 2, old - 2 + 0.4 * change, advantages, mask


@pytest.mark.parametrize("stray", [math.nan, math.inf, 1e4])
def test_what_stands_behind_the_end_reaches_neither_loss_nor_gradient(stray):
    old, new, advantages, mask = random_step(7)
    clean, dirty = [], []
    for found, fill in ((clean, 0.0), (dirty, stray)):
        a, b, c = (torch.where(mask, x, fill) for x in (old, new, advantages))
        b.requires_grad_()
        for loss, stats in (
            ppo.policy_loss(b, -a, c, mask, 0.2),
            ppo.value_loss(b, a, c, mask, 0.2),
            ppo.value_loss(b, a, c, mask),
        ):
            (gradient,) = torch.autograd.grad(loss, b)
            found += [loss, gradient, *stats.values()]
    for expected, got in zip(clean, dirty):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("low", "high"), [(0.2, None), (0.2, 0.3), (0.1, 0.05)])
def test_policy_loss_and_its_statistics_equal_a_loop(low, high):
    old, new, advantages, mask = random_step(3)
    total = clipped = approxkl = ratios = worst = count = 0.0
    cases = set()
    for row, column in mask.nonzero().tolist():
        log_ratio = new[row, column].item() - old[row, column].item()
        ratio, advantage = math.exp(log_ratio), advantages[row, column].item()
        bounded = min(max(ratio, 1 - low), 1 + (low if high is None else high))
        total -= min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
        approxkl += ratio - 1 - log_ratio
        ratios, worst, count = ratios + ratio, max(worst, abs(ratio - 1)), count + 1
        if bounded != ratio:
            cases.add((advantage > 0, ratio > 1))
    assert len(cases) == 4  # above and below the range, with either sign of the advantage
    loss, stats = ppo.policy_loss(new, old, advantages, mask, low, high)
    assert loss.item() == pytest.approx(total / count, rel=1e-9)
    expected = {"clipfrac": clipped / count, "approxkl": approxkl / count, "ratio": ratios / count, "ratio_max_deviation": worst}
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1.0, 0.0), (0.5, -1.0, 0.0), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (1.1, 1.0, -1.1), (0.9, -1.0, 0.9)],
)
def test_a_clipped_token_has_no_gradient_and_the_others_that_of_the_ratio(ratio, advantage, slope):
    new = torch.tensor([[math.log(ratio), 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, stats = ppo.policy_loss(new, torch.zeros(1, 2), torch.tensor([[advantage, 3.0]]), mask, 0.2)
    loss.backward()
    assert new.grad[0].tolist() == pytest.approx([slope, 0.0])
    assert stats["clipfrac"].item() == (1.0 if slope == 0 else 0.0)


def test_the_log_ratio_is_bounded():
    loss, stats = ppo.policy_loss(torch.tensor([[500.0]]), torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1).bool(), 0.2)
    assert loss.item() == pytest.approx(math.exp(20)) and math.isfinite(stats["approxkl"].item())


@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_value_loss_equals_a_loop(cliprange):
    old, new, returns, mask = random_step(4)
    total = clipped = count = 0.0
    for row, column in mask.nonzero().tolist():
        v, before, target = (x[row, column].item() for x in (new, old, returns))
        errors = [(v - target) ** 2]
        if cliprange is not None:
            errors.append((min(max(v, before - cliprange), before + cliprange) - target) ** 2)
            clipped += errors[1] > errors[0]
        total, count = total + 0.5 * max(errors), count + 1
    loss, stats = ppo.value_loss(new, old, returns, mask, cliprange)
    assert loss.item() == pytest.approx(total / count, rel=1e-9)
    assert stats["value_clipfrac"].item() == pytest.approx(clipped / count)
    assert cliprange is None or 0 < clipped < count


# --- one step -----------------------------------------------------------------------------------------------------------


def table_batch(seed=0, rows=8, policy=None):
    """A batch of the exact world whose rows have between 1 and 6 tokens, far from evenly divided among its parts."""
    draw = torch.Generator().manual_seed(seed)
    world = exact.make_world(seed)
    policy = policy or exact.TabularPolicy(world.ref_logits, torch.randn(1365, generator=draw))
    responses = exact.sample(policy.logits, rows, draw)
    mask = torch.arange(6) < torch.tensor([6, 6, 5, 6, 1, 1, 2, 1] * (rows // 8)).unsqueeze(1)
    responses = torch.where(mask, responses, 0)
    with torch.no_grad():
        logprobs, values, _ = policy.evaluate(responses)
    noise = torch.randn(4, rows, 6, generator=draw, dtype=torch.float64)
    logprobs, values = (logprobs + 0.3 * noise[0]) * mask, (values + 0.3 * noise[1]) * mask
    return policy, ppo.Batch(responses, mask, mask, logprobs, values, noise[2] * mask, (values + noise[3]) * mask)


def loop_loss(policy, batch, cfg):
    """The token mean of clipped surrogate, clipped value error and entropy, one token at a time."""
    total, tokens = 0.0, batch.mask.nonzero().tolist()
    for row, column in tokens:
        state = 0
        for token in batch.input_ids[row, :column].tolist():
            state = 4 * state + 1 + token
        log_p = policy.logits[state] - policy.logits[state].exp().sum().log()
        ratio = (log_p[batch.input_ids[row, column]] - batch.logprobs[row, column]).exp()
        advantage, before = batch.advantages[row, column], batch.values[row, column]
        bounded = min(max(ratio.item(), 1 - cfg.cliprange), 1 + cfg.cliprange_high)
        surrogate = ratio * advantage if ratio * advantage <= bounded * advantage else bounded * advantage
        value, target = policy.state_values[state], batch.returns[row, column]
        near = before + min(max((value - before).item(), -cfg.cliprange_value), cfg.cliprange_value)
        error = max((value - target) ** 2, (near - target) ** 2)
        entropy = -(log_p.exp() * log_p).sum()
        total = total - surrogate + cfg.vf_coef * 0.5 * error - cfg.entropy_coef * entropy
    return total / len(tokens)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_in_parts_is_the_step_of_the_whole_minibatch(parts, monkeypatch):
    cfg = settings(
        ppo__gradient_accumulation_steps=parts, ppo__num_mini_batches=1, ppo__vf_coef=0.7, ppo__entropy_coef=0.05,
        ppo__cliprange_high=0.28, ppo__max_grad_norm=0.05,
    ).ppo  # fmt: skip
    policy, batch = table_batch()
    expected = {name: p.detach().clone() for name, p in policy.named_parameters()}
    loss = loop_loss(policy, batch, cfg)
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert norm > 2 * cfg.max_grad_norm  # the clip bites
    calls, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: calls.append(1) or clip(*args))
    stats = ppo.ppo_step(policy, torch.optim.SGD(policy.parameters(), lr=10.0), batch, cfg)
    assert len(calls) == 1
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-6) and stats["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for gradient, (name, p) in zip(gradients, policy.named_parameters()):
        step = 10.0 * gradient * cfg.max_grad_norm / (norm + 1e-6)  # torch adds 1e-6
        torch.testing.assert_close(p.detach(), expected[name] - step, atol=1e-6, rtol=0)


def test_parts_hold_every_row_once_rows_of_like_length_together():
    draw, lengths = torch.Generator().manual_seed(3), torch.tensor([3, 1, 5, 2, 5, 4, 1, 3])
    mask, before = torch.arange(6) < lengths[:, None], torch.arange(4) >= torch.tensor([2, 1, 3, 2, 1, 2, 3, 1])[:, None]
    ids = torch.randint(1, 9, (8, 10), generator=draw)
    batch = ppo.Batch(ids, torch.cat([before, mask], 1), mask, *(torch.randn(4, 8, 6, generator=draw) * mask))
    parts = batch.parts(4)
    assert [len(part.mask) for part in parts] == [2, 2, 2, 2]
    lengths = [part.attention_mask.sum(1).tolist() for part in parts]
    assert [n for part in lengths for n in part] == sorted(batch.attention_mask.sum(1).tolist())
    real = sorted(tuple(row[keep].tolist()) for row, keep in zip(batch.input_ids, batch.attention_mask.bool()))
    kept = [tuple(row[keep].tolist()) for part in parts for row, keep in zip(part.input_ids, part.attention_mask.bool())]
    assert sorted(kept) == real
    assert sum(float((p.advantages * p.mask).sum()) for p in parts) == pytest.approx(
        float((batch.advantages * batch.mask).sum()), abs=1e-4
    )


def test_statistics_do_not_depend_on_the_parts():
    rows = []
    for parts in (1, 2, 4):
        policy, batch = table_batch(1)
        cfg = settings(ppo__gradient_accumulation_steps=parts, ppo__num_mini_batches=1).ppo
        rows.append(ppo.ppo_step(policy, torch.optim.SGD(policy.parameters(), lr=0.0), batch, cfg))
    assert rows[0] == pytest.approx(rows[1], rel=1e-6) and rows[0] == pytest.approx(rows[2], rel=1e-6)


def test_the_entropy_bonus_raises_entropy():
    """The only force left: d(−c·mean H)/d logits = c/n · p (log p + H); all 8 rows pass through the empty prefix."""
    policy, batch = table_batch(2)
    batch.advantages.zero_()
    cfg = settings(ppo__entropy_coef=0.5, ppo__vf_coef=0.0, ppo__num_mini_batches=1, ppo__max_grad_norm=100).ppo
    first, before = policy.logits.detach()[0].clone(), policy.evaluate(batch.input_ids)[2][0, 0].item()
    ppo.ppo_step(policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch, cfg)
    p = first.softmax(-1)
    expected = 0.5 * 8 / batch.mask.sum().item() * p * (p.log() - (p * p.log()).sum())
    torch.testing.assert_close(policy.logits.grad[0], expected, atol=1e-9, rtol=0)
    assert policy.evaluate(batch.input_ids)[2][0, 0].item() > before


@pytest.mark.parametrize("field", ["advantages", "returns", "logprobs"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(field):
    policy, batch = table_batch()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    getattr(batch, field)[0, 0] = torch.nan
    before = weights(policy)
    with pytest.raises(TrainingError, match="loss nan"):
        ppo.ppo_step(policy, optimizer, batch, settings().ppo)
    assert same(weights(policy), before) and not optimizer.state


# --- from a rollout to a batch ------------------------------------------------------------------------------------------


class Given:
    """A reference whose logprobs are known; it is asked for some rows at a time, and knows each by its query."""

    def __init__(self, table):
        self.table = table

    def logprobs(self, input_ids, attention_mask, width, temperature):
        assert input_ids.shape == attention_mask.shape and input_ids.shape[1] == 2 + width
        return self.table[input_ids[:, 1]]


MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
ENDED = torch.tensor([True, False, True, True])
RAW = [2.0, 30.0, -30.0, 5.0]  # with mean 1 and std 2: 0.5, 14.5, −15.5, 2.0
# clipped to ±1.5; the second row has no EOS and loses 1 *after* the clip
SCORES = [0.5, 1.5 - 1.0, -1.5, 1.5]


def hand_made(monkeypatch, **changes):
    draw = torch.Generator().manual_seed(7)
    logprobs, ref, values = ((torch.randn(4, 4, generator=draw) - 2) for _ in range(3))
    queries = torch.stack([torch.full((4,), 9), torch.arange(4)], 1)  # the first token is padding
    rollout = Rollout(queries, torch.tensor([[0, 1]] * 4).bool(), torch.ones(4, 4).long(), MASK, ENDED,
                      logprobs * MASK, values * MASK)  # fmt: skip
    cfg = settings(ppo__score_clip=1.5, ppo__gamma=0.9, ppo__lam=0.8, ppo__kl_coef=0.3, **changes)
    state = SimpleNamespace(reference=Given(ref), score_mean=1.0, score_std=2.0, kl_controller=FixedKL(cfg.ppo.kl_coef))
    seen = {}

    def reward_fn(queries, responses):
        seen["queries"], seen["responses"] = queries, responses
        return RAW

    monkeypatch.setattr(ppo, "response_texts", lambda *_: list("abcd"))
    batch, metrics, responses = ppo.make_batch(state, reward_fn, list("wxyz"), rollout, None, cfg)
    assert seen == {"queries": list("wxyz"), "responses": responses == list("abcd") and responses}
    return batch, metrics, rollout, ref, cfg.ppo


def loop_advantages(rollout, ref, cfg):
    """By the definition: Σ (γλ)^l δ of one row at a time; rewards −β·KL on every token, the score on the last real one."""
    advantages, returns = torch.zeros(4, 4), torch.zeros(4, 4)
    for row in range(4):
        length = int(MASK[row].sum())
        difference = [rollout.logprobs[row, t].item() - ref[row, t].item() for t in range(length)]
        kl = difference if cfg.kl_estimator == "k1" else [math.exp(-d) - 1 + d for d in difference]
        rewards = [-0.3 * x for x in kl]
        rewards[-1] += SCORES[row]
        values = [*rollout.values[row, :length].tolist(), 0.0]
        deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((0.9 * 0.8) ** (k - t) * deltas[k] for k in range(t, length))
            returns[row, t] = advantages[row, t] + values[t]
    return advantages, returns


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_scores_become_advantages_by_hand(monkeypatch, estimator):
    """normalise → clip → subtract the missing EOS → last real token; KL on every token; GAE; returns."""
    batch, _, rollout, ref, cfg = hand_made(monkeypatch, ppo__whiten_advantages=False, ppo__kl_estimator=estimator)
    advantages, returns = loop_advantages(rollout, ref, cfg)
    torch.testing.assert_close(batch.advantages, advantages, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.returns, returns, atol=1e-5, rtol=0)
    assert torch.equal(batch.logprobs, rollout.logprobs) and torch.equal(batch.values, rollout.values)


def test_advantages_are_whitened_after_the_returns_are_formed(monkeypatch):
    batch, metrics, rollout, ref, cfg = hand_made(monkeypatch)
    advantages, returns = loop_advantages(rollout, ref, cfg)
    torch.testing.assert_close(batch.returns, returns, atol=1e-5, rtol=0)
    real = [advantages[row, t].item() for row, t in MASK.nonzero().tolist()]
    mean = sum(real) / len(real)
    std = math.sqrt(sum((x - mean) ** 2 for x in real) / len(real))
    torch.testing.assert_close(batch.advantages, torch.where(MASK, (advantages - mean) / std, 0.0), atol=1e-5, rtol=0)
    assert metrics["advantage_std"] == pytest.approx(std, rel=1e-5)


def test_what_is_logged_about_a_batch(monkeypatch):
    _, metrics, rollout, ref, cfg = hand_made(monkeypatch)
    advantages, returns = loop_advantages(rollout, ref, cfg)
    tokens = MASK.nonzero().tolist()
    k1 = [[(rollout.logprobs[r, t] - ref[r, t]).item() for t in range(int(MASK[r].sum()))] for r in range(4)]

    def variance(x):
        real = [x[r, t].item() for r, t in tokens]
        return sum((v - sum(real) / len(real)) ** 2 for v in real) / len(real)

    def mean(x):
        return sum(x[r, t].item() for r, t in tokens) / len(tokens)

    td_errors = []
    for r, t in tokens:
        last = t + 1 == int(MASK[r].sum())
        reward = -0.3 * k1[r][t] + (SCORES[r] if last else 0.0)
        td_errors.append((reward + 0.9 * (0.0 if last else rollout.values[r, t + 1].item()) - rollout.values[r, t].item()) ** 2)
    assert metrics == pytest.approx(
        {
            "score": sum(RAW) / 4,
            "score_normalised": (0.5 + 1.5 - 1.5 + 1.5) / 4,
            "reward": (sum(SCORES) - 0.3 * sum(map(sum, k1))) / 4,
            "kl": sum(map(sum, k1)) / 4,
            "kl_k3": sum(math.exp(-d) - 1 + d for row in k1 for d in row) / 4,
            "kl_coef": 0.3,
            "length": 10 / 4,
            "eos_rate": 0.75,
            "value": mean(rollout.values),
            "return": mean(returns),
            "advantage_std": math.sqrt(variance(advantages)),
            "td_error": sum(td_errors) / len(td_errors),
            "explained_var": 1 - variance(advantages) / variance(returns),
        },
        rel=1e-4,
    )


# --- a fresh run: ratio 1, KL 0 -----------------------------------------------------------------------------------------


def lm_logprobs(policy, rollout, temperature):
    """Logprobs (B, T) in float64, one row at a time, without padding, from the bare language model."""
    lm, out = copy.deepcopy(policy.lm).double().eval(), torch.zeros(rollout.mask.shape, dtype=torch.float64)
    for row in range(len(rollout)):
        query, response = rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][rollout.mask[row]]
        with torch.no_grad():
            logits = lm(torch.cat([query, response])[None]).logits[0] / temperature
        for t, token in enumerate(response.tolist()):
            z = logits[len(query) + t - 1]
            out[row, t] = z[token] - z.logsumexp(0)
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_fresh_run_starts_at_ratio_1_and_kl_0(temperature):
    cfg = settings(rollouts__temperature=temperature, ppo__num_mini_batches=1)
    state = start(cfg)
    rollout = roll(state.policy, cfg)
    assert 0 < rollout.ended.sum() < len(rollout)  # some rows end, some are cut off
    batch, metrics, _ = ppo.make_batch(state, taste, PROMPTS, rollout, TOKENIZER, cfg)
    assert abs(metrics["kl"]) < 1e-4 and metrics["kl_k3"] < 1e-4
    torch.testing.assert_close(rollout.logprobs.double(), lm_logprobs(state.policy, rollout, temperature), atol=1e-4, rtol=0)
    part = batch.parts(1)[0]  # the rows in the order in which a step evaluates them: another one rounds otherwise
    with torch.no_grad():
        recomputed = state.policy.evaluate(part.input_ids, part.attention_mask, part.mask.shape[1], temperature)[0]
    kept = ppo.ppo_step(copy.deepcopy(state.policy), torch.optim.SGD([torch.zeros(1)]), batch, cfg.ppo, temperature)
    again = dataclasses.replace(part, logprobs=recomputed)
    exactly = ppo.ppo_step(copy.deepcopy(state.policy), torch.optim.SGD([torch.zeros(1)]), again, cfg.ppo, temperature)
    assert kept["ratio_max_deviation"] < 1e-4 and exactly["ratio_max_deviation"] < 1e-6
    assert kept["clipfrac"] == 0 and abs(kept["approxkl"]) < 1e-6


def test_the_first_minibatch_of_every_iteration_has_ratio_1():
    """Also with a policy that has moved: it is always the sampling policy that the first step compares with."""
    _, rows = run(settings(ppo__iterations=3))
    assert all(row["first_ratio_deviation"] < 1e-4 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[2]["kl"])


def test_temperature_divides_the_logits_of_policy_and_reference_alike():
    cfg = settings(rollouts__temperature=0.6)
    state = start(cfg)
    state.reference = frozen_copy(tiny_policy(seed=1))
    rollout = roll(state.policy, cfg)
    _, metrics, _ = ppo.make_batch(state, taste, PROMPTS, rollout, TOKENIZER, cfg)
    k1 = (lm_logprobs(state.policy, rollout, 0.6) - lm_logprobs(state.reference, rollout, 0.6)).sum(1).mean().item()
    assert metrics["kl"] == pytest.approx(k1, rel=1e-4) and k1 > 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_dropout_is_off_though_the_configuration_asks_for_it(mode):
    policy = tiny_policy(dropout=0.1)
    assert policy.lm.config.resid_pdrop == 0.1
    getattr(policy, mode)()
    cfg = settings()
    _, rows = run(cfg, start(cfg, policy))
    assert all(row["first_ratio_deviation"] < 1e-4 for row in rows) and abs(rows[0]["kl"]) < 1e-4


def test_the_training_forward_sees_the_prompt_whatever_is_done_to_the_response_mask():
    cfg = settings()
    state = start(cfg)
    rollout = roll(state.policy, cfg)
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, rollout, TOKENIZER, cfg)
    width = rollout.queries.shape[1]
    for row, ids in enumerate(encode_queries(TOKENIZER, PROMPTS)):
        assert batch.attention_mask[row].tolist() == [False] * (width - len(ids)) + [True] * len(ids) + rollout.mask[row].tolist()
    before = batch.attention_mask.clone()
    batch.mask[:] = False
    assert torch.equal(batch.attention_mask, before) and rollout.query_mask.any()


def test_the_real_eos_is_kept_though_it_is_the_pad_and_the_score_lands_on_it():
    cfg = settings(ppo__whiten_advantages=False, ppo__kl_coef=0.0, ppo__lam=1.0)
    state = start(cfg)
    rollout = roll(state.policy, cfg)
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, rollout, TOKENIZER, cfg)
    for row, ids in enumerate(rollout.response_ids()):
        assert (ids[-1] == EOS) == bool(rollout.ended[row]) and EOS not in ids[:-1] and (len(ids) == 6 or rollout.ended[row])
        assert batch.mask[row].tolist() == [True] * len(ids) + [False] * (6 - len(ids))
        score = (taste([PROMPTS[row]], [TOKENIZER.decode(ids, skip_special_tokens=True)])[0] - state.score_mean) / state.score_std
        expected = score - (0.0 if rollout.ended[row] else 1.0)
        # with λ = γ = 1, no price on KL and a critic that knows nothing, every token's return is the score
        assert batch.returns[row, : len(ids)].tolist() == pytest.approx([expected] * len(ids), abs=1e-5)


def test_the_kept_logprobs_are_those_of_the_full_distribution_even_if_the_sampler_is_not():
    policy = tiny_policy()
    cfg = settings(rollouts__top_k=3)
    rollout = roll(policy, cfg)
    torch.testing.assert_close(rollout.logprobs.double(), lm_logprobs(policy, rollout, 1.0), atol=1e-4, rtol=0)


# --- what a run may not do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"rollouts__top_k": 10}, {"rollouts__top_p": 0.9}])
def test_a_truncated_sampler_is_refused(setting):
    with pytest.raises(TrainingError, match="top_k=0 and top_p=1"):
        start(settings(**setting))


def test_bf16_weights_without_a_master_are_refused():
    with pytest.raises(TrainingError, match="fp32 master"):
        start(settings(), tiny_policy(dtype=torch.bfloat16))


def test_under_bf16_autocast_weights_are_fp32_and_nearly_all_move_at_a_small_rate():
    """Rounded to bf16, a step of 1e-6 is lost on all but the smallest weights."""
    cfg = settings(models__autocast=True, ppo__learning_rate=1e-6, ppo__critic_learning_rate=1e-6, ppo__iterations=1)
    state = start(cfg)
    before, pulled = weights(state.policy.lm), {}
    for p in state.policy.lm.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pulled.__setitem__(p, p.grad.ne(0).sum().item()))
    run(cfg, state)
    assert all(p.dtype == torch.float32 for p in state.policy.parameters())
    assert not any(p.grad is not None for p in state.policy.parameters())  # nothing lies there between updates
    after = weights(state.policy.lm)
    moved = sum((after[n] != before[n]).sum().item() for n in before)
    as_bf16 = sum((after[n].bfloat16() != before[n].bfloat16()).sum().item() for n in before)
    assert moved > 0.8 * sum(pulled.values()) and as_bf16 < 0.2 * moved


def test_no_prompts_and_an_adaptive_zero_are_refused():
    policy = tiny_policy()
    with pytest.raises(TrainingError, match="no prompts"):
        ppo.prepare(policy, policy, taste, [], TOKENIZER, settings())
    with pytest.raises(TrainingError, match="cannot start at 0"):
        start(settings(ppo__kl_controller="adaptive", ppo__kl_coef=0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "reward model"])
def test_a_score_that_is_not_finite_stops_the_run_names_the_iteration_and_leaves_the_weights(bad):
    from rlhf_nb_utils.reward_model import RewardModelError

    calls, kept = [], {}

    def reward_fn(queries, responses):
        calls.append(1)
        if len(calls) == 3:  # the reference's samples, iteration 1, iteration 2
            if bad == "reward model":
                raise RewardModelError("score 0 is nan")
            return [*taste(queries, responses)[:-1], bad]
        return taste(queries, responses)

    cfg = settings(ppo__iterations=4)
    state = start(cfg, reward_fn=reward_fn)
    with pytest.raises(TrainingError, match=r"stopped at iteration 2: .*(score nan|score inf|score 0 is nan)") as error:
        run(cfg, state, reward_fn, [lambda state, *_: kept.update(weights(state.policy))])
    assert "\n" not in str(error.value) and state.iteration == 1 and same(weights(state.policy), kept)


@pytest.mark.parametrize("scores", [[1.0], [[1.0]] * 8])
def test_a_wrong_number_of_scores_is_refused(scores):
    cfg = settings()
    with pytest.raises(TrainingError, match="one score each"):
        run(cfg, start(cfg), lambda queries, responses: scores)


def test_a_query_longer_than_the_context_names_the_iteration():
    cfg = settings()
    state = start(cfg)
    with pytest.raises(TrainingError, match=r"iteration 1: a prompt of 61 tokens"):
        ppo.train(state, taste, ["x" * 60], TOKENIZER, cfg)


# --- a run --------------------------------------------------------------------------------------------------------------


def test_the_reference_never_moves():
    cfg = settings(ppo__iterations=3)
    state = start(cfg)
    before, sft = weights(state.reference), weights(state.policy.lm)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    run(cfg, state)
    assert same(weights(state.reference), before) and not same(weights(state.policy.lm), sft)
    assert not any(p.requires_grad or id(p) in held for p in state.reference.parameters())


def test_the_reference_is_refreshed_when_asked_to():
    cfg, moved = settings(ppo__iterations=4, ppo__ref_update_interval=2, ppo__critic="separate"), []
    state = start(cfg)
    run(cfg, state, callbacks=[lambda s, *_: moved.append(same(weights(s.reference.lm), weights(s.policy.lm)))])
    assert moved == [False, True, False, True]


def test_one_rollout_batch_gives_several_updates_and_the_clip_bites():
    steps = []
    cfg = settings(ppo__num_ppo_epochs=3, ppo__cliprange=0.02, ppo__learning_rate=5e-3)
    state = start(cfg)
    state.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    _, rows = run(cfg, state)
    assert len(steps) == 2 * 3 * 2  # iterations × epochs × minibatches
    assert all(row["ppo_epochs"] == 3 and row["clipfrac"] > 0.1 and row["ratio_max_deviation"] > 0.02 for row in rows)
    _, rows = run(settings(ppo__num_ppo_epochs=1, ppo__num_mini_batches=1, ppo__cliprange=0.02, ppo__learning_rate=5e-3))
    assert all(row["clipfrac"] == 0 and row["ratio_max_deviation"] < 1e-4 for row in rows)  # a plain policy gradient


@pytest.mark.parametrize(("target", "epochs"), [(None, 4), (1e-9, 1), (10.0, 4)])
def test_target_kl_stops_the_epochs(target, epochs):
    _, rows = run(settings(ppo__num_ppo_epochs=4, ppo__target_kl=target))
    assert [row["ppo_epochs"] for row in rows] == [epochs, epochs]


def test_the_adaptive_coefficient_follows_the_measured_kl():
    cfg = settings(ppo__kl_controller="adaptive", ppo__kl_target=0.5, ppo__kl_horizon=20, ppo__iterations=4, ppo__kl_coef=0.2)
    state, rows = run(cfg)
    value = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(value, rel=1e-6)
        value *= 1 + min(max(row["kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 20
    assert state.kl_controller.value == pytest.approx(value, rel=1e-6) and value != 0.2
    assert {row["kl_coef"] for row in run(settings(ppo__kl_coef=0.2))[1]} == {0.2}


def test_rates_decay_linearly_to_the_end_and_both_groups_have_their_own():
    cfg, seen = settings(ppo__iterations=4, ppo__critic_learning_rate=8e-3), []
    run(cfg, callbacks=[lambda state, *_: seen.append([group["lr"] for group in state.optimizer.param_groups])])
    assert seen == [pytest.approx([2e-3 * f, 8e-3 * f]) for f in (1, 0.75, 0.5, 0.25)]


def test_a_separate_critic_has_its_own_trunk_group_and_values():
    cfg = settings(ppo__critic="separate", ppo__iterations=3)
    state = start(cfg)
    policy = state.policy
    lm, critic = ([id(p) for p in group["params"]] for group in state.optimizer.param_groups)
    assert set(lm) == {id(p) for p in policy.lm.parameters()}
    assert set(critic) == {id(p) for m in (policy.value_head, policy.value_trunk) for p in m.parameters()}
    assert [group["lr"] for group in state.optimizer.param_groups] == [2e-3, 2e-3] and not set(lm) & set(critic)
    _, rows = run(cfg, state)
    rollout = roll(policy, cfg)
    trunk, head = copy.deepcopy(policy.value_trunk).double(), copy.deepcopy(policy.value_head).double()
    for row in range(len(rollout)):
        query, response = rollout.queries[row][rollout.query_mask[row]], rollout.responses[row][rollout.mask[row]]
        with torch.no_grad():
            states = trunk(torch.cat([query, response])[None]).last_hidden_state[0]
        expected = head(states)[len(query) - 1 : -1, 0]
        torch.testing.assert_close(rollout.values[row, : len(response)].double(), expected, atol=1e-4, rtol=0)
    assert rollout.values[rollout.mask].abs().max() > 0.01 and not rollout.values[~rollout.mask].any()
    assert all(row["first_ratio_deviation"] < 1e-4 for row in rows)


def test_the_critic_does_not_move_the_policy_through_a_separate_trunk():
    cfg = settings(ppo__critic="separate", ppo__num_mini_batches=1)
    state = start(cfg)
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, roll(state.policy, cfg), TOKENIZER, cfg)
    batch.advantages.zero_()
    ppo.ppo_step(state.policy, state.optimizer, batch, cfg.ppo)
    assert all(p.grad is None or not p.grad.any() for p in state.policy.lm.parameters())
    assert state.policy.value_head.weight.grad.any()


def test_a_custom_reward_sees_plain_texts_and_is_learned():
    """A rule instead of a reward model: the share of capital letters. Real learning, through the whole path."""
    calls = []

    def capitals(queries, responses):
        calls.append((queries, responses))
        return [sum(c.isupper() for c in r) for r in responses]

    cfg = settings(
        ppo__iterations=12, ppo__batch_size=32, ppo__learning_rate=1e-2, ppo__kl_coef=0.01, ppo__num_ppo_epochs=4,
        rollouts__batch_size=32,
    )  # fmt: skip
    _, rows = run(cfg, reward_fn=capitals)
    queries, responses = calls[-1]
    assert set(queries) <= set(PROMPTS) and len(queries) == len(responses) == 32
    assert all(type(text) is str and "endoftext" not in text for text in queries + responses)
    assert rows[-1]["score"] > rows[0]["score"] + 1
    assert rows[-1]["kl"] > 0.1


def test_the_scores_unit_is_the_references_own():
    seen = []

    def reward_fn(queries, responses):
        seen.append(taste(queries, responses))
        return seen[-1]

    state = start(settings(), reward_fn=reward_fn)
    scores = seen[0]
    mean = sum(scores) / len(scores)
    assert len(scores) == 32 and state.score_mean == pytest.approx(mean, rel=1e-5)
    assert state.score_std == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)), rel=1e-5)


def test_a_rule_that_never_fired_on_the_reference_keeps_its_own_unit():
    assert start(settings(), reward_fn=lambda queries, responses: [0.1] * len(responses)).score_std == 1.0


def test_a_rollout_batch_is_sampled_in_parts_of_rollouts_batch_size(monkeypatch):
    sizes = []

    def spy(policy, ids, *args):
        sizes.append(len(ids))
        return sample(policy, ids, *args)

    monkeypatch.setattr("rlhf_nb_utils.rollouts.sample", spy)
    _, rows = run(settings(rollouts__batch_size=3, ppo__iterations=1))
    assert sizes[-3:] == [3, 3, 2] and rows[0]["first_ratio_deviation"] < 1e-4


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (5, 8), (7, 7), (3, 10)])
def test_every_prompt_is_used_once_per_pass_and_any_iteration_can_be_asked_for(n, batch):
    order = [row for iteration in range(12) for row in ppo.prompt_rows(n, iteration, batch, seed=4)]
    passes = [order[i : i + n] for i in range(0, len(order) - n + 1, n)]
    assert all(sorted(one) == list(range(n)) for one in passes) and len({tuple(one) for one in passes}) > 1
    torch.manual_seed(99)
    assert ppo.prompt_rows(n, 5, batch, seed=4) == order[5 * batch : 6 * batch]
    assert any(ppo.prompt_rows(n, i, batch, seed=5) != ppo.prompt_rows(n, i, batch, seed=4) for i in range(3))


# --- the exact world ----------------------------------------------------------------------------------------------------


class Table(exact.TabularPolicy):
    """The table also in the part of the reference."""

    def logprobs(self, input_ids, attention_mask, response_length, temperature):
        return self.evaluate(input_ids, attention_mask, response_length, temperature)[0].detach()


def test_ppo_comes_to_the_optimal_policy(monkeypatch):
    """π* ∝ π_ref·exp(r/β) is known: J(π*) = β log Z. Sampled strings, a learned critic, the whole of make_batch."""
    monkeypatch.setattr(ppo, "response_texts", lambda _, responses, __: exact.as_text(responses))
    beta, n, iterations, draw = 0.5, 4096, 50, torch.Generator().manual_seed(0)
    world = exact.make_world(3)
    cfg = settings(
        ppo__kl_coef=beta, ppo__num_ppo_epochs=4, ppo__num_mini_batches=2, ppo__batch_size=n, ppo__vf_coef=1.0,
        ppo__max_grad_norm=100, ppo__cliprange_value=None,
    )  # fmt: skip
    policy = Table(world.ref_logits)
    optimizer = torch.optim.Adam(policy.parameter_groups(0.08, 0.08), fused=True)
    state = ppo.TrainState(policy, copy.deepcopy(policy), optimizer, FixedKL(beta), 0.0, 1.0)
    log_best, log_z = exact.optimal_distribution(world, beta)
    best = beta * log_z.item()
    assert exact.objective(policy.logits, world, beta).item() == pytest.approx(0, abs=1e-9) and best > 0.5
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.08 * (1 - iteration / iterations)
        responses, mask = policy.sample(n, draw)
        with torch.no_grad():
            logprobs, values, _ = policy.evaluate(responses)
        rollout = Rollout(torch.zeros(n, 1).long(), mask[:, :1], responses, mask, mask[:, 0], logprobs, values)
        batch, _, _ = ppo.make_batch(state, world.reward_fn, [""] * n, rollout, None, cfg)
        ppo.update(policy, optimizer, batch, cfg.ppo, draw)
    gap = best - exact.objective(policy.logits, world, beta).item()
    forward_kl = (log_best.exp() * (log_best - exact.sequence_logprobs(policy.logits))).sum().item()
    assert 0 <= gap < 0.02 * best
    assert 0 <= forward_kl < 0.05


# --- a run that was stopped ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"ppo__kl_controller": "fixed"},
        {"ppo__kl_controller": "adaptive", "ppo__kl_target": 0.3, "ppo__kl_horizon": 20, "ppo__critic": "separate"},
        {"ppo__ref_update_interval": 1, "ppo__gradient_accumulation_steps": 2},
    ],
)
def test_two_and_two_iterations_are_four_bit_for_bit(tmp_path, setting):
    cfg = settings(ppo__iterations=4, ppo__checkpoint_interval=2, **setting)

    class Stopped(BaseException):
        pass

    def stop(state, *_):
        stages.save(state, tmp_path, cfg)
        if state.iteration == 3:  # one iteration after the checkpoint: it is lost
            raise Stopped

    straight, rows = run(cfg)
    with pytest.raises(Stopped):
        run(cfg, callbacks=[stop])
    torch.manual_seed(12345)
    resumed = start(cfg)
    sft = weights(resumed.reference)
    stages.restore(resumed, tmp_path)
    assert resumed.iteration == 2 and not same(weights(resumed.policy.lm), weights(tiny_policy().lm))
    if not cfg.ppo.ref_update_interval:
        assert same(weights(resumed.reference), sft)  # the SFT policy, not the trained one
    _, later = run(cfg, resumed)
    timings = {"seconds", "tokens_per_second", "peak_memory_mib"}
    assert [{k: v for k, v in row.items() if k not in timings} for row in later] == [
        {k: v for k, v in row.items() if k not in timings} for row in rows[2:]
    ]
    assert same(weights(resumed.policy), weights(straight.policy))
    assert same(weights(resumed.reference), weights(straight.reference))
    assert resumed.kl_controller.value == straight.kl_controller.value
    moments = [state.optimizer.state_dict()["state"] for state in (resumed, straight)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[1] for k in moments[1][i])
