import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    OPTConfig,
    OPTModel,
)

from rlhf_nb_utils import models
from rlhf_nb_utils import reward_model as rm
from rlhf_nb_utils.config import DATA, Config
from rlhf_nb_utils.data import Comparison
from rlhf_nb_utils.reward_model import RewardModel, RewardModelError


@pytest.fixture(scope="module")
def wordpiece():
    return AutoTokenizer.from_pretrained(DATA / "models" / "tiny-bert")


@pytest.fixture(scope="module")
def bpe():
    """One special token: bos = eos = pad, as in GPT-2."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "tiny-gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tiny_bert(wordpiece, **changes):
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=len(wordpiece), max_position_embeddings=64, **settings | changes))


def tiny_gpt2_config(bpe):
    return GPT2Config(vocab_size=len(bpe), n_embd=32, n_layer=1, n_head=2, n_positions=64)


@pytest.fixture
def encoder(wordpiece):
    return RewardModel.from_backbone(tiny_bert(wordpiece), wordpiece, "mean", 48)


@pytest.fixture
def causal(bpe):
    torch.manual_seed(0)
    return RewardModel.from_backbone(GPT2Model(tiny_gpt2_config(bpe)), bpe, "last", 48)


def settings(loss="pairs", **changes):
    given = {"loss": loss, "learning_rate": 3e-3, "epochs": 2, "batch_size": 16, "max_length": 48, "warmup_ratio": 0.1}
    return Config(profile="test", seed=changes.pop("seed", 0), device="cpu", reward_model=given | changes)


GOOD, BAD = ["wonderful", "moving", "great"], ["awful", "boring", "terrible"]
FILLER = ["the", "film", "was", "and", "plot", "a", "story", "with", "music", "people", "very", "it"]


def separable(n, k=2, seed=0):
    """Comparisons that one word decides: the more good words among three, the better."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        levels = np.sort(rng.choice(4, k, replace=False))[::-1]
        texts = []
        for level in levels:
            words = [*rng.choice(GOOD, level), *rng.choice(BAD, 3 - level), *rng.choice(FILLER, rng.integers(2, 9))]
            texts.append(" " + " ".join(rng.permutation(words)))
        made.append(Comparison(f"query {i}", tuple(texts), tuple(map(float, levels)), str(i)))
    return made


TEXTS = ["It was", "A film", "The", "Once upon a time", "No", "Then came"]
ENDS = [" fine.", " with a very long and winding story about people and their music", " end", " a", " way", " the rest"]

# --- losses


def test_bradley_terry_equals_the_float64_loop():
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(0, 3, (3, 50))
    for m in (None, margin):
        oracle = 0.0
        for i in range(50):
            difference = chosen[i] - rejected[i] - (0 if m is None else m[i])
            oracle -= math.log(1 / (1 + math.exp(-difference))) / 50
        given = [None if x is None else torch.tensor(x) for x in (chosen, rejected, m)]
        assert rm.bradley_terry_loss(*given).item() == pytest.approx(oracle, abs=1e-12)


def test_a_margin_asks_for_a_wider_gap():
    zero = torch.zeros(1, dtype=torch.float64)
    assert rm.bradley_terry_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert rm.bradley_terry_loss(zero + 1, zero, zero + 1).item() == pytest.approx(math.log(2))
    assert rm.bradley_terry_loss(zero, zero, zero + 1).item() == pytest.approx(math.log(1 + math.e))


def test_huge_differences_neither_overflow_nor_lose_their_gradient():
    rejected = torch.tensor([1e4], requires_grad=True)
    loss = rm.bradley_terry_loss(torch.tensor([-1e4]), rejected)
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and rejected.grad.item() == pytest.approx(1.0)


def plackett_luce_loop(rows):
    total = 0.0
    for row in rows:
        for k in range(len(row)):
            total -= row[k] - math.log(sum(math.exp(s) for s in row[k:]))
    return total / len(rows)


def test_plackett_luce_equals_the_float64_loop_with_rankings_of_different_length():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (5, 4))
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    tensor = torch.tensor(scores, requires_grad=True)
    loss = rm.plackett_luce_loss(tensor, torch.tensor(valid))
    assert loss.item() == pytest.approx(plackett_luce_loop([row[real] for row, real in zip(scores, valid)]), abs=1e-12)
    loss.backward()
    for i, k in itertools.product(range(5), range(4)):
        moved = []
        for step in (1e-5, -1e-5):
            changed = scores.copy()
            changed[i, k] += step
            moved.append(plackett_luce_loop([row[real] for row, real in zip(changed, valid)]))
        assert tensor.grad[i, k].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=1e-8)


def test_the_probabilities_of_all_rankings_add_up_to_one():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    total = sum(math.exp(-rm.plackett_luce_loss(scores[list(p)][None]).item()) for p in itertools.permutations(range(4)))
    assert total == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_of_two_is_bradley_terry():
    scores = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rm.plackett_luce_loss(scores), rm.bradley_terry_loss(scores[:, 0], scores[:, 1]))


def test_losses_see_differences_only():
    scores = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = torch.linspace(-50, 50, 8, dtype=torch.float64)[:, None]  # another constant for each query
    torch.testing.assert_close(rm.plackett_luce_loss(scores + level), rm.plackett_luce_loss(scores))
    pair = [rm.bradley_terry_loss(s[:, 0], s[:, 1]) for s in (scores, scores + level)]
    torch.testing.assert_close(*pair)


def test_margins_are_four_grades_by_quartile_and_none_for_a_label_against_the_gold_score():
    cuts = torch.tensor([1.0, 2.0, 3.0])
    gaps = torch.tensor([-9.0, 0.0, 0.5, 1.0, 1.5, 2.5, 3.0, 50.0])
    torch.testing.assert_close(rm.margins(gaps, cuts), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]) / 3)
    tied = torch.tensor([0.0, 0.0, 0.0, 2.0, -1.0])  # where many pairs tie, their quartiles are 0
    torch.testing.assert_close(rm.margins(tied, torch.tensor([0.0, 0.0, 1.0])), torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]))


# --- pooling and forward


@pytest.mark.parametrize("pooling, rows", [("mean", [1.0, 11.5]), ("first", [0.0, 11.0]), ("last", [2.0, 12.0])])
def test_pooling_reads_real_positions_on_either_side_of_the_padding(pooling, rows):
    hidden = torch.tensor([[0.0, 1, 2, 99], [99, 99, 11, 12]])[..., None]
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    assert rm.pool(hidden, mask, pooling).flatten().tolist() == rows


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_an_encoders_scores_do_not_depend_on_padding_or_batch_order(wordpiece, pooling):
    model = RewardModel.from_backbone(tiny_bert(wordpiece, initializer_range=0.2), wordpiece, pooling, 48)
    together = model.score(TEXTS, ENDS)
    alone = torch.cat([model.score([q], [r]) for q, r in zip(TEXTS, ENDS)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.score(TEXTS[::-1], ENDS[::-1], batch_size=2).flip(0), alone, atol=1e-5, rtol=0)
    assert together.std() > 0.05  # and they are not all alike


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_causal_trunks_scores_do_not_depend_on_padding_or_its_side(causal, pooling):
    causal.pooling = pooling
    alone = torch.cat([causal.score([q], [r]) for q, r in zip(TEXTS, ENDS)])
    torch.testing.assert_close(causal.score(TEXTS, ENDS), alone, atol=1e-5, rtol=0)
    rows = causal.encode(TEXTS, ENDS)
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    torch.testing.assert_close(causal(ids, mask).detach(), alone, atol=1e-5, rtol=0)


def test_last_pooling_reads_the_eos_also_where_pad_is_eos(causal, bpe):
    assert bpe.pad_token_id == bpe.eos_token_id
    scores = causal.score(["The film", "No"], [" was a long and winding road", " way"])
    for i, text in enumerate(["The film was a long and winding road", "No way"]):
        ids = torch.tensor([[bpe.bos_token_id, *bpe(text)["input_ids"], bpe.eos_token_id]])
        states = causal.backbone(input_ids=ids).last_hidden_state[0]
        of_states = (states @ causal.head.weight[0]).tolist()
        assert scores[i].item() == pytest.approx(of_states[-1], abs=1e-5)
        assert abs(of_states[-1] - of_states[-2]) > 1e-3  # reading one token earlier would show


def seen_ids(model, run):
    seen = []

    def note(_, args):
        ids, mask = args
        seen.extend(tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask))

    handle = model.register_forward_pre_hook(note)
    run()
    handle.remove()
    return set(seen)


def test_training_and_scoring_see_the_same_ids_with_the_same_special_tokens(encoder, causal, wordpiece, bpe):
    comparisons = separable(6)
    queries = [c.query for c in comparisons for _ in c.responses]
    responses = [r for c in comparisons for r in c.responses]
    for model in (encoder, causal):
        trained = seen_ids(model, lambda m=model: rm.train(m, comparisons, settings(epochs=1)))
        scored = seen_ids(model, lambda m=model: m.score(queries, responses))
        assert trained == scored
        first, last = (bpe.bos_token_id, bpe.eos_token_id) if model.causal else (wordpiece.cls_token_id, wordpiece.sep_token_id)
        text = model.tokenizer(queries[0] + responses[0], add_special_tokens=False)["input_ids"]
        assert (first, *text, last) in scored


def test_dropout_is_off_unless_asked_for(wordpiece):
    ids, mask = torch.randint(5, 500, (4, 9)), torch.ones(4, 9, dtype=torch.int64)
    for dropout in (False, True):
        model = RewardModel.from_backbone(tiny_bert(wordpiece), wordpiece, "mean", 48, dropout=dropout).train()
        assert torch.equal(model(ids, mask), model(ids, mask)) is not dropout


def test_scoring_has_dropout_off_and_leaves_the_mode_as_it_was(wordpiece):
    model = RewardModel.from_backbone(tiny_bert(wordpiece), wordpiece, "mean", 48, dropout=True).train()
    assert torch.equal(model.score(TEXTS, ENDS), model.score(TEXTS, ENDS))
    assert model.training


def test_the_head_starts_small_and_scalar_and_the_seed_decides():
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "model_max_length": 64, "__len__": lambda _: 10})()
    config = BertConfig(vocab_size=10, hidden_size=4096, num_hidden_layers=0, num_attention_heads=2, intermediate_size=4)
    heads = [RewardModel(BertModel(config), tokenizer, "mean", 48, seed=s).head for s in (0, 0, 1)]
    assert heads[0].weight.shape == (1, 4096) and heads[0].bias is None
    assert heads[0].weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)


def test_an_opt_trunk_that_projects_its_last_state_gets_a_head_of_that_width(bpe):
    config = OPTConfig(
        vocab_size=len(bpe), hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=32, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = RewardModel.from_backbone(OPTModel(config), bpe, "last", 48)
    alone = torch.cat([model.score([q], [r]) for q, r in zip(TEXTS, ENDS)])
    torch.testing.assert_close(model.score(TEXTS, ENDS), alone, atol=1e-5, rtol=0)


def test_scores_are_fp32_under_autocast_and_near_the_full_precision_ones(encoder):
    half, full = encoder.score(TEXTS, ENDS, autocast=True), encoder.score(TEXTS, ENDS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


# --- where trunks come from


def test_a_policys_folder_gives_its_trunk(tmp_path, bpe):
    torch.manual_seed(0)
    policy = models.Policy(GPT2LMHeadModel(tiny_gpt2_config(bpe)))
    policy.save(tmp_path)
    bpe.save_pretrained(tmp_path)
    model = RewardModel.from_backbone(tmp_path, pooling="last", max_length=48)
    assert model.causal
    trunk = policy.lm.transformer.state_dict()
    assert trunk.keys() == model.backbone.state_dict().keys()
    assert all(torch.equal(value, trunk[key]) for key, value in model.backbone.state_dict().items())


def test_weights_are_trained_in_fp32_whatever_the_file_holds(tmp_path, wordpiece):
    tiny_bert(wordpiece).half().save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    model = RewardModel.from_backbone(tmp_path, max_length=48)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path, wordpiece):
    config = tiny_bert(wordpiece).config
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    with pytest.raises(RewardModelError, match="3 labels"):
        RewardModel.from_backbone(tmp_path, max_length=48)


def test_parts_that_do_not_fit_are_named_at_once(wordpiece, bpe):
    bert, gpt2 = tiny_bert(wordpiece), GPT2Model(tiny_gpt2_config(bpe))
    unpadded = AutoTokenizer.from_pretrained(DATA / "models" / "tiny-bert")
    unpadded.pad_token = None
    bart = BartModel(BartConfig(vocab_size=len(bpe), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                                decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8))  # fmt: skip
    for trunk, tokenizer, pooling, length, message in (
        (bert, unpadded, "mean", 48, "no pad token"),
        (gpt2, wordpiece, "last", 48, "take the trunk's own"),
        (bert, wordpiece, "mean", 65, "beyond the trunk's 64 positions"),
        (gpt2, bpe, "first", 48, "read nothing"),
        (bert, wordpiece, "max", 48, "unknown pooling 'max'"),
        (bert, None, "mean", 48, "needs its tokenizer"),
        (bart, bpe, "mean", 48, "an encoder and a decoder"),
    ):
        with pytest.raises(RewardModelError, match=message):
            RewardModel.from_backbone(trunk, tokenizer, pooling, length)


# --- saving


def test_saved_and_loaded_it_scores_and_normalises_the_same(tmp_path, encoder, causal):
    for name, model in (("encoder", encoder), ("causal", causal)):
        scores = model.score(TEXTS, ENDS)
        model.set_normalisation(scores)
        model.save(tmp_path / name)
        loaded = RewardModel.load(tmp_path / name)
        torch.testing.assert_close(loaded.score(TEXTS, ENDS), scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.normalise(scores), model.normalise(scores))
        assert (loaded.pooling, loaded.max_length, loaded.causal) == (model.pooling, model.max_length, model.causal)
        assert not list((tmp_path / name).glob("*.bin")) and not loaded.training


def test_a_broken_folder_gets_one_line(tmp_path, encoder):
    with pytest.raises(RewardModelError, match="train it again"):
        RewardModel.load(tmp_path)
    encoder.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RewardModelError, match="not a complete reward model") as caught:
        RewardModel.load(tmp_path)
    assert "\n" not in str(caught.value)
    state = encoder.state_dict()
    rm.save_file(state | {"head.weight": torch.zeros(2, 32)}, str(weights))
    with pytest.raises(RewardModelError, match="2 labels"):
        RewardModel.load(tmp_path)
    del state["backbone.embeddings.word_embeddings.weight"]
    rm.save_file(state, str(weights))
    with pytest.raises(RewardModelError, match="not a complete reward model") as caught:
        RewardModel.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- normalisation


def test_normalised_scores_of_the_reference_have_mean_zero_and_unit_deviation(encoder):
    raw = torch.tensor([3.0, 5.0, 7.0, 9.0])
    encoder.set_normalisation(raw)
    found = encoder.normalise(raw)
    assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.std(correction=0).item() == pytest.approx(1)
    # Affine, not squashed: a sigmoid of an unanchored score would stop at 1.
    torch.testing.assert_close(encoder.normalise(torch.tensor([6.0 + 100 * math.sqrt(5)])), torch.tensor([100.0]))


def test_a_constant_added_to_every_raw_score_changes_no_reward(encoder):
    raw = torch.tensor([3.0, 5.0, 7.0, 9.0])
    rewards = []
    for level in (0.0, -40.0):
        encoder.set_normalisation(raw + level)
        rewards.append(encoder.normalise(torch.tensor([4.0, 8.0]) + level))
    torch.testing.assert_close(*rewards)


def test_scores_without_an_anchor_are_not_made_a_reward(encoder):
    with pytest.raises(RewardModelError, match="call set_normalisation"):
        encoder.normalise(torch.zeros(2))
    for scores in ([1.0], [2.0, 2.0, 2.0], [1.0, math.nan]):
        with pytest.raises(RewardModelError, match="nothing to normalise by"):
            encoder.set_normalisation(torch.tensor(scores))


# --- training


@pytest.mark.parametrize("loss, k", [("pairs", 2), ("pairs", 3), ("margin", 2), ("rankings", 3)])
def test_an_encoder_learns_a_preference_that_words_decide(encoder, loss, k):
    history = rm.train(encoder, separable(160, k), settings(loss), heldout=separable(60, k, seed=1))
    assert history["epochs"][-1]["heldout_accuracy"] > 0.9
    assert history["steps"][-1]["loss"] < history["steps"][0]["loss"]


def test_a_causal_trunk_learns_it_too(causal):
    history = rm.train(causal, separable(160), settings(epochs=3), heldout=separable(60, seed=1))
    assert history["epochs"][-1]["heldout_gold_accuracy"] > 0.9


def test_before_any_step_the_reported_loss_is_that_of_the_scores_also_with_rankings_of_different_length(encoder):
    comparisons = separable(7, 3) + separable(4, 2, seed=1) + separable(4, 4, seed=2)
    for loss, oracle in (
        ("rankings", plackett_luce_loop),
        ("pairs", lambda rows: np.mean([math.log1p(math.exp(b - a)) for r in rows for a, b in itertools.combinations(r, 2)])),
    ):
        rows = [row.tolist() for row in rm.score_comparisons(encoder.score, comparisons)]
        step = rm.train(encoder, comparisons, settings(loss, learning_rate=1e-12, epochs=1))["steps"][0]
        assert step["loss"] == pytest.approx(oracle(rows), abs=1e-5)
        gaps = [a - b for row in rows for a, b in itertools.combinations(row, 2)]
        assert step["gap"] == pytest.approx(np.mean(gaps), abs=1e-5)
        assert step["accuracy"] == pytest.approx(np.mean([g > 0 for g in gaps]))


def test_the_margin_loss_asks_the_quartiles_of_the_gold_gaps(encoder):
    comparisons = [Comparison(f"q {i}", (" good", " bad"), (gap, 0.0)) for i, gap in enumerate([1.0, 2.0, 3.0, 4.0, -1.0])]
    gaps = [float(a - b) for a, b in rm.score_comparisons(encoder.score, comparisons)]
    wanted = [1 / 3, 2 / 3, 1.0, 1.0, 0.0]  # |gaps| have quartiles 1, 2, 3
    oracle = np.mean([math.log1p(math.exp(m - g)) for g, m in zip(gaps, wanted)])
    step = rm.train(encoder, comparisons, settings("margin", learning_rate=1e-12, epochs=1))["steps"][0]
    assert step["loss"] == pytest.approx(oracle, abs=1e-5)
    with pytest.raises(RewardModelError, match="needs the scores"):
        rm.train(encoder, [Comparison("q", ("a", "b"))], settings("margin"))


def test_the_same_seed_gives_the_same_run_and_the_callback_sees_it_all(wordpiece):
    runs = []
    for seed in (0, 0, 1):
        model, seen = RewardModel.from_backbone(tiny_bert(wordpiece), wordpiece, "mean", 48), []
        history = rm.train(model, separable(40), settings(seed=seed), separable(8, seed=1), seen.append)
        assert len(history["steps"]) == 6 and len(history["epochs"]) == 2
        assert seen == [*history["steps"][:3], history["epochs"][0], *history["steps"][3:], history["epochs"][1]]
        json.dumps(history)
        runs.append(history)
    assert runs[0] == runs[1] != runs[2]
    assert not model.training


def test_the_rate_warms_up_to_its_peak_and_decays_towards_zero(encoder):
    history = rm.train(encoder, separable(40), settings(batch_size=4, warmup_ratio=0.2, epochs=1, learning_rate=1e-3))
    rates = [step["learning_rate"] for step in history["steps"]]
    np.testing.assert_allclose(rates, [5e-4, *(1e-3 * (1 - i / 9) for i in range(9))], rtol=1e-6)


def test_gradients_are_clipped_to_norm_one_once_a_step(encoder, monkeypatch):
    with torch.no_grad():
        encoder.head.weight *= 100
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(g.double().square().sum().item() for g in grads)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    history = rm.train(encoder, separable(20), settings(epochs=1, batch_size=10))
    assert all(record["grad_norm"] > 2 for record in history["steps"])
    assert norms == pytest.approx([1.0, 1.0], abs=1e-4)


def test_layer_norms_and_biases_are_not_decayed_and_nothing_is_left_out(encoder):
    decayed, plain = rm._optimizer(encoder, 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim == 1 for p in plain["params"]) and all(p.ndim == 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(encoder.parameters()))


def test_every_parameter_of_the_trunk_has_a_gradient(encoder):
    """BERT's pooler, say, would otherwise sit in the checkpoint untrained."""
    encoder.train()(*rm._collate(encoder.encode(TEXTS, ENDS), encoder.device)).square().sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None]


def test_batches_hold_every_comparison_once_and_similar_lengths():
    lengths = torch.randint(5, 60, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(rm._length_batches(lengths, 32, torch.Generator().manual_seed(0)))
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)
    assert padding < 0.1 * sum(lengths)
    assert batches != list(rm._length_batches(lengths, 32, torch.Generator().manual_seed(1)))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(encoder, monkeypatch):
    real, calls = rm.bradley_terry_loss, []

    def third_is_nan(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(rm, "bradley_terry_loss", third_is_nan)
    with pytest.raises(RewardModelError, match=r"step 3: loss nan.*learning_rate"):
        rm.train(encoder, separable(64), settings())
    assert all(p.isfinite().all() for p in encoder.parameters())


def test_a_score_that_is_no_number_is_not_handed_on(encoder):
    with torch.no_grad():
        encoder.head.weight[0, 0] = math.nan
    with pytest.raises(RewardModelError, match="score 0 is nan"):
        encoder.score(TEXTS, ENDS)
    with pytest.raises(RewardModelError, match="step 1: loss nan"):
        rm.train(encoder, separable(4), settings())


def test_comparisons_that_cannot_be_trained_on_are_refused(encoder):
    for comparisons in ([], [Comparison("q", ("a",))]):
        with pytest.raises(RewardModelError, match="two responses or more"):
            rm.train(encoder, comparisons, settings())
    with pytest.raises(RewardModelError, match="2 queries but 1 responses"):
        encoder.score(["a", "b"], ["c"])


# --- measures


def test_accuracy_counts_all_pairs_half_for_ties_and_leaves_gold_ties_out():
    comparisons = [
        Comparison("q", ("a", "b"), (2.0, 1.0)),
        Comparison("q", ("a", "b"), (1.0, 2.0)),
        Comparison("q", ("a", "b"), (1.0, 1.0)),
        Comparison("q", ("a", "b", "c"), (3.0, 2.0, 2.0)),
    ]
    scores = [np.array(row) for row in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0, 9.0])]
    found = rm.pairwise_accuracy(scores, comparisons)
    # labels: 1, 1, 0, and of three pairs ½, 0, 0; gold: 1, 0, –, and ½, 0, –
    assert found == rm.Accuracy(labels=2.5 / 6, pairs=6, gold=1.5 / 4, gold_pairs=4)
    unscored = rm.pairwise_accuracy(scores[:1], [Comparison("q", ("a", "b"))])
    assert unscored.labels == 1.0 and math.isnan(unscored.gold) and unscored.gold_pairs == 0
    with pytest.raises(RewardModelError, match="give one each"):
        rm.pairwise_accuracy(scores[:2], comparisons)


def test_scores_of_comparisons_come_back_by_comparison():
    comparisons = separable(5, 3) + separable(5, 2)
    found = rm.score_comparisons(lambda q, r: [float(len(a + b)) for a, b in zip(q, r)], comparisons)
    assert [row.tolist() for row in found] == [[float(len(c.query + r)) for r in c.responses] for c in comparisons]


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_bins_by_hand():
    # Three pairs at confidence 0.78, two of them right, and one at 0.55, wrong.
    gaps = [logit(0.78), logit(0.78), -logit(0.78), -logit(0.55)]
    found = rm.calibration([np.array([g, 0.0]) for g in gaps], n_bins=5)
    assert found.count.tolist() == [1, 0, 3, 0, 0]
    np.testing.assert_allclose(found.confidence, [0.55, math.nan, 0.78, math.nan, math.nan])
    np.testing.assert_allclose(found.accuracy, [0.0, math.nan, 2 / 3, math.nan, math.nan])
    assert found.ece == pytest.approx((0.55 + 3 * (0.78 - 2 / 3)) / 4)
    assert rm.calibration([np.array([0.0, 0.0])]).ece == 0.0


def test_labels_drawn_from_the_scores_are_calibrated_and_doubled_scores_are_not():
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.normal(0, 2, 20_000))
    gaps *= np.where(rng.random(20_000) < 1 / (1 + np.exp(-gaps)), 1, -1)
    rows = np.stack([gaps, np.zeros_like(gaps)], 1)
    assert rm.calibration(rows).ece < 0.015
    assert rm.calibration(2 * rows).ece > 0.05


def test_the_bag_of_words_baseline_learns_what_words_decide():
    words, accuracy = rm.bag_of_words_baseline(separable(150, 3), separable(60, 2, seed=1))
    assert accuracy.labels > 0.9 and accuracy.pairs == 60
    assert words.score(["wonderful"])[0] > words.score(["awful"])[0]
