"""Every memory switch against the plain path: the same loss, the same gradients, the same training."""

import copy
import time

import pytest
import torch
from test_models import QUERIES, RESPONSES, gpt2, left_padded, llama
from test_ppo import PROMPTS, TOKENIZER, byte_tokenizer, roll, run, same, settings, start, taste, tiny_policy, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model

from rlhf_nb_utils import models, offload, ppo, savings, sft, stages
from rlhf_nb_utils.config import MemoryConfig, SFTConfig, TrainingError
from rlhf_nb_utils.evaluation import exact_kl_per_response
from rlhf_nb_utils.models import ModelError, Policy, frozen_copy, lean
from rlhf_nb_utils.offload import CPUOffloadAdamW
from rlhf_nb_utils.reward_model import RewardModel
from rlhf_nb_utils.rollouts import encode_queries, sample_many
from rlhf_nb_utils.savings import at_work, park

IDS, MASK = left_padded(QUERIES, RESPONSES, width=5)
OFFLOAD = {"memory__optimizer": "offload"}


def switched(policy: Policy, **memory) -> Policy:
    return lean(copy.deepcopy(policy), MemoryConfig(**memory))


def loss_of(policy: Policy, temperature=0.7) -> torch.Tensor:
    """Something that pulls at every output, unequally."""
    logprobs, values, entropy = policy.evaluate(IDS, MASK, 3, temperature, entropy_grad=True)
    pull = torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)
    return (pull * logprobs + pull.flip(0) * entropy).sum() + (values - 1).square().sum()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    loss_of(policy).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def policies():
    for build in (gpt2, llama):
        policy = Policy(build())
        torch.nn.init.normal_(policy.value_head.weight)
        yield policy


# --- what a forward pass keeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switch", [{"chunked_head": True}, {"checkpoint_activations": True}, {"chunked_head": True, "checkpoint_activations": True}]
)
def test_loss_and_gradients_are_the_plain_ones(switch):
    for plain in policies():
        lean_one = switched(plain, **switch)
        assert loss_of(lean_one).item() == pytest.approx(loss_of(plain).item(), rel=1e-6)
        expected, found = gradients(plain), gradients(lean_one)
        assert expected.keys() == found.keys() and len(found) > 10
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        for temperature in (1.0, 0.5):
            torch.testing.assert_close(lean_one.logprobs(IDS, MASK, 3, temperature), plain.logprobs(IDS, MASK, 3, temperature))


def test_layers_compute_twice_with_a_gradient_and_once_without():
    policy, calls = switched(Policy(gpt2()), checkpoint_activations=True), []
    for layer in models.layers_of(policy.lm):
        layer.attn.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(policy).backward()
    assert len(calls) == 4  # two layers, each again in the backward pass
    calls.clear()
    with torch.no_grad():
        policy.evaluate(IDS, MASK, 3)
    assert len(calls) == 2 and not any(layer.training for layer in models.layers_of(policy.lm))


def test_sampling_with_the_switches_on_draws_the_same():
    cfg, policy = settings(), tiny_policy()
    plain, lean_one = roll(policy, cfg), roll(switched(policy, chunked_head=True, checkpoint_activations=True), cfg)
    assert torch.equal(plain.responses, lean_one.responses) and torch.equal(plain.logprobs, lean_one.logprobs)


def test_the_chunked_head_makes_no_logits_and_refuses_a_bias():
    policy = switched(Policy(gpt2()), chunked_head=True)
    head = policy.lm.get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("all logits were computed"))
    loss_of(policy).backward()
    policy.logprobs(IDS, MASK, 3)
    head.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ModelError, match="chunked_head=false"):
        lean(policy, MemoryConfig(chunked_head=True))


# --- the optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["own masters", "apart"])
@pytest.mark.parametrize("stream", [False, True], ids=["kept", "streamed"])
def test_a_run_with_the_offloaded_optimizer_is_the_plain_run(stream, apart, monkeypatch):
    """In fp32, over two iterations of two epochs of two steps in two parts, with clipping; with masters of their own too, as
    fp32 weights on a device have them."""
    if apart:
        monkeypatch.setattr(offload, "_has_master", lambda p: True)
    changes = {"ppo__gradient_accumulation_steps": 2, "ppo__max_grad_norm": 0.3}
    plain, expected = run(settings(**changes))
    cfg = settings(**changes, **OFFLOAD, memory__stream_gradients=stream)
    ours, found = run(cfg)
    assert type(ours.optimizer).__name__ == "CPUOffloadAdamW" and expected[0]["grad_norm"] > 0.3
    assert bool(ours.optimizer._buckets) == apart and not ours.optimizer._pending
    for name, p in weights(plain.policy).items():
        torch.testing.assert_close(weights(ours.policy)[name], p, rtol=1e-5, atol=1e-6, msg=name)
    for key in ("grad_norm", "loss", "kl", "entropy"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-4, abs=1e-6), key


def adamw_by_hand(weight, grads, lr, eps, scale):
    """Steps of AdamW without decay from a fresh start (Kingma & Ba 2015, algorithm 1), float64."""
    m = v = torch.zeros_like(weight, dtype=torch.float64)
    weight = weight.double()
    for t, gradient in enumerate(grads, 1):
        g = gradient.double() / scale[t - 1]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight = weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
    return weight


@pytest.mark.parametrize("stream", [False, True], ids=["kept", "streamed"])
def test_the_master_of_bf16_weights_takes_the_steps_that_fp32_would(stream):
    cfg = settings(**OFFLOAD, memory__stream_gradients=stream, ppo__learning_rate=1e-5)
    state = start(cfg, tiny_policy(dtype=torch.bfloat16))
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, roll(state.policy, cfg), TOKENIZER, cfg)
    name, weight = next((n, p) for n, p in state.policy.named_parameters() if n.endswith("c_fc.weight"))
    before, seen, norms = weight.detach().clone(), [], []
    weight.register_hook(lambda grad: seen.append(grad.clone()))
    for _ in range(3):
        norms.append(ppo.ppo_step(state.policy, state.optimizer, batch, cfg.ppo)["grad_norm"])
    savings.settle(state.optimizer)
    scale = [max(1.0, (norm + 1e-6) / cfg.ppo.max_grad_norm) for norm in norms]
    expected = adamw_by_hand(before, seen, 1e-5, cfg.ppo.adam_eps, scale)
    master = state.optimizer.state[weight]["master"]
    assert len(seen) == 3 and master.dtype == torch.float32
    moved = (expected - before.double()).abs().max()
    assert ((master.double() - expected).abs().max() < 0.02 * moved) and torch.equal(weight, master.bfloat16()), name
    assert (weight == before).float().mean() > 0.5  # which a bf16 weight alone would not have kept


def test_the_loss_of_bf16_weights_and_its_gradient_are_those_of_fp32_up_to_rounding():
    cfg = settings(**OFFLOAD)
    policy = tiny_policy()
    torch.nn.init.normal_(policy.value_head.weight)
    state = start(cfg, policy)
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, roll(policy, cfg), TOKENIZER, cfg)
    batch.logprobs = batch.logprobs + torch.linspace(-0.3, 0.3, batch.mask.numel()).view_as(batch.logprobs)  # some clipped
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = copy.deepcopy(policy)
        own.lm.to(dtype)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.0)
        stats = ppo.ppo_step(own, optimizer, batch, cfg.ppo.model_copy(update={"max_grad_norm": 1e9}))
        found[dtype] = stats, torch.cat([p.grad.float().flatten() for p in own.parameters()])
    (plain, expected), (coarse, gradient) = found.values()
    assert 0.1 < plain["clipfrac"] < 0.9 and coarse["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.999
    assert gradient.norm().item() == pytest.approx(expected.norm().item(), rel=0.01)


def test_of_several_micro_batches_only_the_last_one_is_copied_to_the_host(monkeypatch):
    cfg, copied = settings(**OFFLOAD, ppo__gradient_accumulation_steps=2), []
    state = start(cfg, tiny_policy(dtype=torch.bfloat16))
    batch, _, _ = ppo.make_batch(state, taste, PROMPTS, roll(state.policy, cfg), TOKENIZER, cfg)
    fetch = CPUOffloadAdamW._fetch
    monkeypatch.setattr(CPUOffloadAdamW, "_fetch", lambda self, p: copied.append(id(p)) or fetch(self, p))
    ppo.ppo_step(state.policy, state.optimizer, batch, cfg.ppo)
    assert len(copied) == len(set(copied)) > 10


def test_a_bf16_run_goes_on_from_its_checkpoint_and_its_states_lie_where_the_optimizer_keeps_them(tmp_path):
    cfg = settings(**OFFLOAD, ppo__iterations=4, ppo__checkpoint_interval=2, ppo__lr_schedule="constant")

    def fresh():
        return start(cfg, tiny_policy(dtype=torch.bfloat16))

    straight, _ = run(cfg, fresh(), callbacks=[lambda state, *_: stages.save(state, tmp_path, cfg)])
    stages.checkpoint.shutil.rmtree(sorted((tmp_path / "checkpoints").iterdir())[1])
    resumed = fresh()
    stages.restore(resumed, tmp_path)
    kept = {flat.untyped_storage().data_ptr() for b in resumed.optimizer._buckets for flat in b.flat.values()}
    weight = resumed.policy.lm.transformer.wte.weight
    states = resumed.optimizer.state[weight]
    assert resumed.iteration == 2 and states["step"] == 8 and states["exp_avg"].any()
    assert {states[name].untyped_storage().data_ptr() for name in ("master", "exp_avg", "exp_avg_sq")} <= kept
    run(cfg, resumed)
    assert same(weights(resumed.policy), weights(straight.policy))
    masters = [state.optimizer.state[state.policy.lm.transformer.wte.weight]["master"] for state in (resumed, straight)]
    assert torch.equal(*masters)


def test_bf16_weights_need_that_master_in_sft_too():
    demos, sft_cfg = [(q + " ", "a film") for q in PROMPTS], SFTConfig(max_length=32, batch_size=4, epochs=4, learning_rate=3e-3)
    with pytest.raises(TrainingError, match="memory.optimizer=offload"):
        sft.train(tiny_policy(dtype=torch.bfloat16), TOKENIZER, demos, sft_cfg)
    memory = MemoryConfig(optimizer="offload", stream_gradients=True)
    rows = sft.train(tiny_policy(dtype=torch.bfloat16), TOKENIZER, demos, sft_cfg, memory=memory)
    plain = sft.train(tiny_policy(), TOKENIZER, demos, sft_cfg)
    assert rows[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05) and rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_weights_are_in_their_place_when_fine_tuning_returns(monkeypatch):
    made, make, finish = [], savings.make_optimizer, CPUOffloadAdamW._finish
    monkeypatch.setattr(sft, "make_optimizer", lambda *a, **k: made.append(make(*a, **k)) or made[0])
    monkeypatch.setattr(CPUOffloadAdamW, "_finish", lambda *args: (time.sleep(0.05), finish(*args))[1])
    demos = [("a film", " is good")] * 4
    sft.train(
        tiny_policy(dtype=torch.bfloat16), TOKENIZER, demos, SFTConfig(batch_size=2, epochs=1, max_length=16),
        memory=MemoryConfig(optimizer="offload"),
    )  # fmt: skip
    assert made[0]._worker is not None and not made[0]._pending


@pytest.mark.parametrize("chunked", [True, False])
def test_a_head_that_is_read_past_its_forward_pass_waits_for_the_host_too(chunked, monkeypatch):
    """A Llama's head has weights of its own, which no embedding's forward pass has waited for."""
    finish, found = CPUOffloadAdamW._finish, []
    monkeypatch.setattr("rlhf_nb_utils.offload.BUCKET", 100)  # the head in a bucket of its own
    monkeypatch.setattr(CPUOffloadAdamW, "_finish", lambda *args: (time.sleep(0.02), finish(*args))[1])
    for at_once in (False, True):
        policy = switched(Policy(llama().to(torch.bfloat16)), chunked_head=chunked)
        assert policy.lm.lm_head.weight is not policy.lm.model.embed_tokens.weight
        optimizer = savings.make_optimizer(policy.parameter_groups(0.1, 0.1), MemoryConfig(optimizer="offload"), policy)
        loss_of(policy).backward()
        optimizer.step()
        if at_once:
            assert optimizer._pending
        else:
            savings.settle(optimizer)
        with torch.no_grad():
            found.append((*policy.evaluate(IDS, MASK, 3), policy.logprobs(IDS, MASK, 3)))
        assert not optimizer._pending
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_value_head_is_fp32_beside_bf16_weights():
    policy = tiny_policy(dtype=torch.bfloat16)
    assert policy.value_head.weight.dtype == torch.float32
    torch.nn.init.normal_(policy.value_head.weight)
    with torch.no_grad():
        hidden = policy.lm.base_model(IDS[:, :-1], attention_mask=MASK[:, :-1]).last_hidden_state[:, -1]
    expected = hidden.double() @ policy.value_head.weight[0].double() + policy.value_head.bias.double()
    assert ((policy.value_head(hidden).squeeze(-1) - expected).abs() < 1e-5).all()


# --- waiting on the host ------------------------------------------------------------------------------------------------


def places(module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def test_a_parked_module_works_on_its_device_and_comes_back_as_it_was():
    """Where device and host are both the CPU: a place is an address."""
    policy, seen = Policy(gpt2()), []
    expected = policy.logprobs(IDS, MASK, 3)
    reference = park(frozen_copy(policy), "cpu")
    home = places(reference)
    for layer in models.layers_of(reference.lm):
        layer.register_forward_pre_hook(lambda *_: seen.append(places(reference)))
    assert torch.equal(reference.logprobs(IDS, MASK, 3), expected) and places(reference) == home
    assert seen and not any(set(home) & set(there) for there in seen)
    seen.clear()
    with at_work(reference):
        reference.values(IDS, MASK, 3)  # enters once more, and leaves
        reference(IDS, MASK, 3)
        assert seen == [places(reference)] * 4  # one journey
        assert reference.lm.lm_head.weight is reference.lm.transformer.wte.weight  # still tied
    with pytest.raises(RuntimeError, match="on purpose"), at_work(reference):
        raise RuntimeError("on purpose")
    assert places(reference) == home and same(weights(reference), weights(policy))


def test_a_run_with_a_parked_reference_is_the_plain_run_also_where_the_reference_is_refreshed():
    changes = {"ppo__iterations": 3, "ppo__ref_update_interval": 1}
    plain, expected = run(settings(**changes))
    cfg = settings(**changes)
    policy = tiny_policy()
    state = ppo.prepare(policy, park(frozen_copy(policy), "cpu"), lambda q, r: [len(x) for x in r], PROMPTS, TOKENIZER, cfg)
    state.score_mean, state.score_std = start(cfg).score_mean, start(cfg).score_std
    found = run(cfg, state)[1]
    assert [row["kl"] for row in found] == [row["kl"] for row in expected]
    assert same(weights(state.reference.lm), weights(plain.reference.lm))


def test_a_policy_that_makes_room_is_as_it_was_afterwards_whatever_happens():
    policy = tiny_policy()
    reference, before = park(frozen_copy(policy), "cpu"), weights(policy)
    home = places(reference)
    with pytest.raises(RuntimeError, match="on purpose"), savings.in_place_of(policy, reference):
        assert not set(home) & set(places(reference))  # it is at work
        raise RuntimeError("on purpose")
    assert same(weights(policy), before) and places(reference) == home
    assert policy.lm.lm_head.weight is policy.lm.transformer.wte.weight
    adapted = switched(policy, lora_rank=2)
    with savings.in_place_of(adapted, frozen_copy(adapted)):
        assert all(layer.disable_adapters for layer in savings.adapted(adapted.lm))


def test_the_reward_model_is_on_its_device_while_it_scores(monkeypatch):
    model = park(
        RewardModel.from_backbone(
            GPT2Model(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)), byte_tokenizer(), "last", 16
        ),
        "cpu",
    )
    home, seen, texts, forward = places(model), [], (["a film", "b"], ["is good", "."]), RewardModel.forward
    model.works_on = None
    expected = model.score(*texts)  # at home
    model.works_on = torch.device("cpu")
    monkeypatch.setattr(RewardModel, "forward", lambda self, ids, mask: seen.append(places(self)) or forward(self, ids, mask))
    assert torch.equal(model.score(*texts), expected) and expected.std() > 0
    assert len(seen) == 1 and not set(seen[0]) & set(home) and places(model) == home


# --- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_only_adapters_and_the_critic_train_and_the_reference_stays_the_base(build, dtype):
    base = Policy(build().to(dtype))
    policy = switched(base, lora_rank=2)
    reference, before = frozen_copy(policy), weights(policy)
    assert torch.equal(policy.logprobs(IDS, MASK, 3), base.logprobs(IDS, MASK, 3))  # adapters start at zero
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    optimizer = savings.make_optimizer(policy.parameter_groups(0.05, 0.05), MemoryConfig())
    for _ in range(3):
        loss_of(policy).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name or name.startswith("value_head")}
    assert not torch.allclose(policy.logprobs(IDS, MASK, 3), base.logprobs(IDS, MASK, 3), atol=1e-2)
    assert torch.equal(reference.logprobs(IDS, MASK, 3), base.logprobs(IDS, MASK, 3))
    assert {id(p) for p in reference.parameters()} == {id(p) for p in policy.parameters()}  # it costs nothing
    assert all(p.requires_grad for name, p in policy.named_parameters() if ".lora_" in name)  # after being off


def test_a_run_with_adapters_learns_and_is_measured_against_its_base():
    cfg = settings(memory__lora_rank=4, ppo__iterations=3, ppo__learning_rate=2e-2)
    base = tiny_policy()
    state, rows = run(cfg, start(cfg, switched(base, lora_rank=4)))
    assert abs(rows[0]["kl"]) < 1e-4 < rows[-1]["kl_k3"]
    rollout = roll(state.policy, cfg)
    found = exact_kl_per_response(state.policy, state.reference, rollout)
    torch.testing.assert_close(found, exact_kl_per_response(state.policy, base, rollout))
    assert found.mean() > 0.01


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_gradients_of_adapters_are_those_of_the_weights_by_the_chain_rule(build):
    """W = W₀ + s·B·A (Hu et al. 2022, eq. 3): dA = s·Bᵀ·dW and dB = s·dW·Aᵀ, by the plain path's dW."""
    policy = switched(Policy(build()), lora_rank=2, lora_alpha=3.0)
    torch.nn.init.normal_(policy.value_head.weight)
    for layer in savings.adapted(policy.lm):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    plain = Policy(build())
    plain.lm.load_state_dict(savings.merged_state(policy.lm))
    plain.value_head.load_state_dict(policy.value_head.state_dict())
    assert loss_of(policy).item() == pytest.approx(loss_of(plain).item(), rel=1e-5)
    found, expected = gradients(policy), gradients(plain)
    names = {name for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}
    for name in names:
        d_weight, layer = expected[f"{name}.weight"], policy.get_submodule(name)
        d_weight = d_weight.T if type(layer.base_layer).__name__ == "Conv1D" else d_weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(found[f"{name}.lora_A.default.weight"], 1.5 * b.T @ d_weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[f"{name}.lora_B.default.weight"], 1.5 * d_weight @ a.T, rtol=1e-3, atol=1e-3)
    assert len(found) == 2 * len(names) + 2 and len(names) >= 8
    torch.testing.assert_close(found["value_head.weight"], expected["value_head.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_adapters_are_merged_where_the_policy_is_saved(build, tmp_path):
    policy = switched(Policy(build()), lora_rank=2)
    for name, p in policy.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    expected = policy.logprobs(IDS, MASK, 3)
    policy.save(tmp_path)
    torch.testing.assert_close(models.load_policy(str(tmp_path)).logprobs(IDS, MASK, 3), expected, rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == build().state_dict().keys()
    torch.testing.assert_close(policy.logprobs(IDS, MASK, 3), expected, rtol=0, atol=0)  # saving changes nothing


def test_a_checkpoint_of_adapters_holds_them_alone_and_the_run_goes_on_from_it(tmp_path):
    cfg = settings(memory__lora_rank=2, ppo__iterations=4, ppo__checkpoint_interval=2, ppo__lr_schedule="constant")

    def fresh():
        return start(cfg, switched(tiny_policy(), lora_rank=2))

    straight, _ = run(cfg, fresh(), callbacks=[lambda state, *_: stages.save(state, tmp_path, cfg)])
    last = sorted((tmp_path / "checkpoints").iterdir())
    stored = stages.checkpoint.load(last[0])[0]["policy"]
    assert stored and all(".lora_" in name or name.startswith("value_head") for name in stored)
    resumed = fresh()
    stages.checkpoint.shutil.rmtree(last[1])
    stages.restore(resumed, tmp_path)
    assert resumed.iteration == 2
    run(cfg, resumed)
    assert same(weights(resumed.policy), weights(straight.policy))


def test_a_reward_model_that_recomputes_has_the_gradients_of_one_that_keeps():
    config = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=2, n_head=1)
    model = RewardModel.from_backbone(GPT2Model(config), byte_tokenizer(), "last", 16).train()
    ids, mask, found = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.int64), []
    for model.checkpointed in (False, True):
        model.zero_grad()
        score = model(ids, mask)
        (score * torch.tensor([1.0, -2.0])).sum().backward()
        found.append([score.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, again in zip(*found):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-8)


def test_a_reference_samples_without_the_policys_adapters():
    policy = lean(tiny_policy(), MemoryConfig(lora_rank=4))
    reference = frozen_copy(policy)
    for name, p in policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    cfg = settings().rollouts
    rollout = sample_many(reference, encode_queries(TOKENIZER, PROMPTS), cfg, TOKENIZER, seed=0)
    given = rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1], cfg.temperature
    with torch.no_grad():
        apart = {name: (rollout.logprobs - one.logprobs(*given))[rollout.mask].abs().max() for name, one in
                 (("reference", reference), ("policy", policy))}  # fmt: skip
    assert apart["reference"] < 1e-4 < 1e-2 < apart["policy"]


def test_a_parked_reference_comes_once_for_all_rows_of_an_exact_kl(monkeypatch):
    policy = tiny_policy()
    reference, came = park(frozen_copy(policy), "cpu"), []
    on = savings._on
    monkeypatch.setattr(savings, "_on", lambda *args: came.append(1) or on(*args))
    rollout = sample_many(policy, encode_queries(TOKENIZER, PROMPTS), settings().rollouts, TOKENIZER, seed=0)
    exact_kl_per_response(policy, reference, rollout, rows=1)
    assert len(came) == 1 < len(rollout.mask)


# --- on a CUDA device ---------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_a_device_a_parked_reference_is_pinned_works_there_and_comes_back():
    policy = Policy(gpt2()).cuda()
    given = IDS.cuda(), MASK.cuda(), 3
    expected, reference = policy.logprobs(*given), park(frozen_copy(policy), "cuda")
    assert all(p.device.type == "cpu" and p.is_pinned() for p in reference.parameters())
    assert torch.equal(reference.logprobs(*given), expected)
    assert all(p.device.type == "cpu" for p in reference.parameters())


@pytest.mark.cuda
def test_on_a_device_the_policy_makes_room_for_a_parked_reference_and_comes_back():
    policy, seen = tiny_policy().cuda(), []
    reference = park(frozen_copy(policy), "cuda")
    with savings.in_place_of(policy, reference):
        seen += [policy.device.type, reference.device.type]
    assert seen == ["cpu", "cuda"]
    assert policy.device.type == "cuda" and reference.device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("switch", ["chunked_head", "checkpoint_activations"])
def test_on_a_device_too_loss_and_gradients_are_the_plain_ones(switch, monkeypatch):
    monkeypatch.setitem(globals(), "IDS", IDS.cuda())
    monkeypatch.setitem(globals(), "MASK", MASK.cuda())
    for plain in policies():
        lean_one = switched(plain.cuda(), **{switch: True})
        expected, found = gradients(plain), gradients(lean_one)
        assert expected.keys() == found.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)
