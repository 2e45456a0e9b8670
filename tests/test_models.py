"""The policy: what it computes at response positions, whatever the padding, and what it refuses to be."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_nb_utils import models
from rlhf_nb_utils.config import DATA, CourseError
from rlhf_nb_utils.models import ModelError, Policy

QUERIES = [[5, 6, 7, 8], [9, 10], [11]]
RESPONSES = [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
PAD = 0


def gpt2(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )
    )  # fmt: skip


def llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def left_padded(queries, responses, width):
    ids = torch.tensor([[PAD] * (width - len(q)) + q + r for q, r in zip(queries, responses)])
    mask = torch.tensor([[0] * (width - len(q)) + [1] * (len(q) + len(r)) for q, r in zip(queries, responses)])
    return ids, mask


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("separate", [False, True])
def test_response_logits_are_those_of_a_plain_forward_without_padding(build, separate):
    policy = Policy(build(), separate)
    torch.nn.init.normal_(policy.value_head.weight)
    ids, mask = left_padded(QUERIES, RESPONSES, width=9)
    logits, values = policy(ids, mask, 3)
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES)):
        plain = policy.lm(torch.tensor([query + response]), output_hidden_states=True)
        first = len(query) - 1  # the state before the first response token
        torch.testing.assert_close(logits[row], plain.logits[0, first : first + 3], atol=2e-6, rtol=1e-5)
        hidden = plain.hidden_states[-1][0, first : first + 3]
        expected = hidden @ policy.value_head.weight[0] + policy.value_head.bias
        torch.testing.assert_close(values[row], expected, atol=2e-6, rtol=1e-5)


def test_padding_and_batch_order_change_nothing():
    policy = Policy(gpt2())
    few, many = (policy(*left_padded(QUERIES, RESPONSES, width), 3)[0] for width in (4, 12))
    torch.testing.assert_close(few, many, atol=2e-6, rtol=1e-5)
    back = policy(*left_padded(QUERIES[::-1], RESPONSES[::-1], 4), 3)[0]
    torch.testing.assert_close(few, back.flip(0), atol=2e-6, rtol=1e-5)


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert models.position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_temperature_divides_the_logits():
    policy = Policy(gpt2())
    ids, mask = left_padded(QUERIES, RESPONSES, 4)
    logits = policy(ids, mask, 3)[0].double()
    expected = torch.log_softmax(logits / 0.5, -1).gather(-1, ids[:, -3:, None])[..., 0]
    logprobs, _, entropy = policy.evaluate(ids, mask, 3, temperature=0.5)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.logprobs(ids, mask, 3, 0.5), logprobs)
    p = torch.softmax(logits / 0.5, -1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)


def test_dropout_is_off_even_in_training_mode():
    policy = Policy(gpt2(dropout=0.5)).train()
    ids, mask = left_padded(QUERIES, RESPONSES, 4)
    torch.testing.assert_close(policy(ids, mask, 3)[0], policy(ids, mask, 3)[0], atol=0, rtol=0)


def test_gpt2s_own_gelu_is_computed_in_one_step_and_is_the_same_function(tmp_path):
    plain = gpt2()
    assert plain.config.activation_function == "gelu_new"
    ids = torch.arange(24).view(2, 12)
    before = plain(ids).logits
    before.logsumexp(-1).sum().backward()
    gradients = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    policy = Policy(plain)
    after = policy.lm(ids).logits
    after.logsumexp(-1).sum().backward()
    torch.testing.assert_close(after, before, atol=2e-6, rtol=1e-5)
    for p, gradient in zip(policy.lm.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, atol=2e-5, rtol=1e-4)
    assert "GeluBackward0" in operations(after) and "TanhBackward0" not in operations(after)
    policy.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == "gelu_new"


def operations(x):
    """Names of all operations behind a tensor."""
    found, wanted = set(), [x.grad_fn]
    while wanted:
        node = wanted.pop()
        if node is not None and node not in found:
            found.add(node)
            wanted += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in found}


def test_a_fresh_value_is_zero_and_the_reference_shares_nothing():
    policy = Policy(gpt2(), separate=True)
    ids, mask = left_padded(QUERIES, RESPONSES, 4)
    assert (policy.values(ids, mask, 3) == 0).all()
    reference = models.frozen_copy(policy)
    assert reference.value_trunk is None and not any(p.requires_grad for p in reference.parameters())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in policy.parameters()}


@pytest.mark.parametrize("separate", [False, True])
def test_the_optimizer_groups_hold_every_parameter_once(separate):
    policy = Policy(gpt2(), separate)
    groups = policy.parameter_groups(1.0, 2.0)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in policy.parameters())
    assert [g["lr"] for g in groups] == [1.0, 2.0]


@pytest.mark.parametrize("separate", [False, True])
def test_saving_keeps_the_critic(tmp_path, separate):
    policy = Policy(gpt2(), separate)
    torch.nn.init.normal_(policy.value_head.weight)
    policy.save(tmp_path)
    again = models.load_policy(str(tmp_path), separate_critic=separate)
    for (name, a), b in zip(policy.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    GPT2LMHeadModel.from_pretrained(tmp_path)  # and plain from_pretrained reads the language model


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-bert", "tiny-judge"])
def test_embedded_weights_are_fp16_files_that_load_as_float32(name):
    folder = DATA / "models" / name
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_the_embedded_policy_survives_a_step_of_adamw():
    policy = models.load_policy("tiny-gpt2")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(policy.lm.parameters(), lr=1e-4)
    ids = torch.randint(1, 4096, (2, 16))
    for _ in range(2):
        loss = policy.lm(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert torch.isfinite(policy.lm(ids, labels=ids).loss)


def test_pad_is_eos_where_there_is_none_and_no_eos_is_refused(tmp_path):
    tokenizer = models.load_tokenizer("tiny-gpt2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0 and tokenizer.padding_side == "left"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "models" / "tiny-bert" / file, tmp_path)
    with pytest.raises(ModelError, match="no EOS"):
        models.load_tokenizer(str(tmp_path))


def test_an_encoder_is_no_policy(tmp_path):
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model"):
        models.load_policy(str(tmp_path))


def test_a_missing_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            models.pick_device("cuda")
    assert models.pick_device("cpu").type == "cpu"


def test_the_judge_scores_log_odds_in_the_order_given():
    judge = models.load_classifier("tiny-judge")
    texts = ["A wonderful, touching film that I loved.", "Awful. " * 40, "The worst, most boring waste of time ever made."]
    scores = judge.score(texts)
    assert scores[0] > 0 > scores[2]
    for text, score in zip(texts, scores):
        batch = judge.tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        logits = judge.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0].double()
        p = torch.softmax(logits, -1)[1]
        assert abs((torch.log(p) - torch.log1p(-p)).item() - score) < 1e-4


def test_weights_that_are_not_safetensors_are_refused_in_one_line(tmp_path):
    gpt2().config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CourseError, match=r"safetensors") as error:
        models.load_policy(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_judge_reads_all_of_a_text_that_is_too_long():
    judge = models.load_classifier("tiny-judge")
    good, bad = "A wonderful and touching film. " * 60, "An awful and boring film. " * 60
    alone = judge.score([good, bad, good + bad, "Awful."])
    ids = judge.tokenizer(good + bad, add_special_tokens=False)["input_ids"]
    size = judge.max_length - 2  # two special tokens stand around each window
    windows = [ids[i : i + size] for i in range(0, len(ids), size)]
    odds, weights = [], []
    for window in windows:
        row = torch.tensor([[judge.tokenizer.cls_token_id, *window, judge.tokenizer.sep_token_id]])
        logits = judge.model(row, attention_mask=torch.ones_like(row)).logits[0].double()
        odds.append((logits[1] - logits[0]).item())
        weights.append(row.shape[1])
    assert len(windows) > 2 and alone[2] == pytest.approx(np.average(odds, weights=weights), abs=1e-4)
    assert alone[0] > alone[2] > alone[1]


def test_a_judge_without_a_positive_label_is_refused():
    with pytest.raises(ModelError, match="positive and a negative"):
        models._sentiment_labels("some/model", {0: "one star", 1: "two stars"})
    assert models._sentiment_labels("some/model", {0: "LABEL_0", 1: "LABEL_1"}) == (1, 0)


def test_the_evaluator_is_another_kind_of_model():
    assert type(models.load_classifier("tiny-evaluator")) is not type(models.load_classifier("tiny-judge"))


def test_values_are_fp32_under_autocast_too():
    policy = Policy(gpt2())
    torch.nn.init.normal_(policy.value_head.weight)
    ids, mask = left_padded(QUERIES, RESPONSES, 4)
    with torch.no_grad(), models.autocast(torch.device("cpu"), True):
        _, values, _ = policy.evaluate(ids, mask, 3)
    assert values.dtype == torch.float32 and (values != values.bfloat16().float()).any()


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
    (tmp_path / "configuration_own.py").write_text(code + "class Own(PretrainedConfig):\n    model_type = 'own'\n")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "configuration_own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(DATA / "models" / "tiny-gpt2" / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match="a kind of model that transformers itself knows"):
        models.load_policy(str(tmp_path))
    assert not asked and not (tmp_path / "ran").exists()
