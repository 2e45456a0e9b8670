"""The planner against bytes that are counted while the real phases run, against arithmetic, and against its own full traces."""

import contextlib
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, GPT2Config, LlamaConfig

from rlhf_nb_utils import hub, memory, phases, sft, shapes, tracing
from rlhf_nb_utils.config import PROFILE_DIR, ConfigError, CourseError, MemoryConfig, load_config
from rlhf_nb_utils.course import main
from rlhf_nb_utils.gauges import Live
from rlhf_nb_utils.memory import CARDS, CONTEXT, plan
from rlhf_nb_utils.offload import CPUOffloadAdamW
from rlhf_nb_utils.phases import MIB, PHASES, Sizes

EVERY = {
    "memory.optimizer": "offload", "memory.stream_gradients": True, "memory.checkpoint_activations": True,
    "memory.chunked_head": True, "memory.park": True, "models.dtype": "bfloat16", "models.autocast": False,
}  # fmt: skip
XL = {
    "models.policy": "openai-community/gpt2-xl", "rollouts.response_length": 192, "rollouts.batch_size": 32,
    "ppo.batch_size": 32, "ppo.num_mini_batches": 4,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """Folders of a small GPT-2, a small Llama and a small BERT, and the settings that name the first and the last."""
    shape = {"vocab_size": 700, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    for name, config in {
        "gpt2": GPT2Config(n_embd=96, n_layer=6, n_head=3, n_positions=64, **shape),
        "llama": LlamaConfig(
            hidden_size=96, intermediate_size=200, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, **shape
        ),
        "bert": BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=5, num_attention_heads=2, intermediate_size=128),
    }.items():
        config.save_pretrained(tmp_path / name)
    return {
        "models.policy": str(tmp_path / "gpt2"), "models.reward_backbone": str(tmp_path / "bert"), "ppo.batch_size": 32,
        "ppo.num_mini_batches": 2, "rollouts.batch_size": 16, "rollouts.response_length": 20, "reward_model.max_length": 40,
    }  # fmt: skip


# --- the tracer -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sample", "score", "reference logprobs", "update", "fine-tuning", "reward training"])
@pytest.mark.parametrize(
    "switches", [{}, {"memory.checkpoint_activations": True, "memory.chunked_head": True}], ids=["plain", "lean"]
)
@pytest.mark.parametrize("policy", ["gpt2", "llama"])
def test_few_layers_carried_on_are_a_trace_of_all(tiny, phase, switches, policy, monkeypatch):
    change = {"models.policy": tiny["models.policy"].replace("gpt2", policy), "ppo.gradient_accumulation_steps": 2}
    cfg = load_config("cpu", 0, tiny | change | switches)
    sizes, seen = Sizes.of(cfg, 8), []
    real = tracing._stretches
    monkeypatch.setattr(tracing, "_stretches", lambda *args: seen.append(args[2]) or real(*args))
    carried_on = phases._trace(phase, cfg, sizes)
    assert seen == [3, 4]
    monkeypatch.setattr(tracing, "FEW", (3, 100))
    full = phases._trace(phase, cfg, sizes)
    assert seen[2:] == [5 if phase in ("score", "reward training") else 6]
    assert carried_on == pytest.approx(full)


def test_a_peak_that_moves_with_the_depth_is_found():
    """Activations of 4 units a layer are given up in the backward pass, gradients of 9 come: the highest moment is its end."""

    def stretches(build, run, layers, head):
        one = {"weights": 1.0, "gradients": 0.0}
        return {
            "forward": one | {"activations": 4.0 * layers + 30},
            "backward": one | {"gradients": 9.0 * layers, "activations": 0.0},
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "_stretches", stretches)
        few, many = (tracing.peak(None, None, n)["gradients"] for n in (4, 20))
    assert (few, many) == (0.0, 180.0)


# --- against a real run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"memory.checkpoint_activations": True, "memory.chunked_head": True},
        {"ppo.gradient_accumulation_steps": 4, "ppo.critic": "separate"},
        {"memory.lora_rank": 8},
        {"policy": "llama", "models.autocast": True},
    ],
    ids=["plain", "lean", "accumulated, two trunks", "adapters", "llama, autocast"],
)
def test_the_plan_is_within_a_tenth_of_what_a_run_on_this_cpu_holds(tiny, change):
    change = dict(change)
    tiny["models.policy"] = tiny["models.policy"].replace("gpt2", change.pop("policy", "gpt2"))
    cfg = load_config("cpu", 0, tiny | change)
    with Live() as live:
        found = phases.measure(cfg, 8, live)
    expected = plan(cfg, 8)
    assert list(found) == list(PHASES)
    for phase, lines in found.items():
        assert expected.total(phase) == pytest.approx(sum(lines.values()), rel=0.1), phase
        for line in ("weights", "reference", "reward model", "optimizer"):
            assert expected.phases[phase][line] == pytest.approx(lines[line], rel=0.02, abs=0.02), (phase, line)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_host_holds_what_an_offloaded_optimizer_makes(tiny, parts):
    switches = EVERY | {"memory.park": False, "ppo.gradient_accumulation_steps": parts}
    cfg = load_config("cpu", 0, tiny | switches)
    policy = shapes.policy_of(shapes.config_of(cfg.models.policy), cfg)
    optimizer = CPUOffloadAdamW([p for p in policy.parameters() if p.dtype == torch.bfloat16], stream_gradients=True)
    ids, mask = torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.bool)
    for _ in range(parts):
        policy.evaluate(ids, mask, 4)[0].sum().backward()
    held = [*(flat for b in optimizer._buckets for flat in b.flat.values()), *(b.staging for b in optimizer._buckets)]
    held += [b.sums for b in optimizer._buckets if b.sums is not None]
    # The head of the policy is fp32, 97 numbers: nothing beside its trunk.
    assert plan(cfg, 8).host["optimizer"] == pytest.approx(sum(x.numel() * x.element_size() for x in held) / MIB, rel=1e-2)


# --- the ledger ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("openai-community/gpt2", 124_439_808),
        ("openai-community/gpt2-medium", 354_823_168),
        ("openai-community/gpt2-large", 774_030_080),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        policy = shapes.policy_of(shapes.config_of(name), load_config("cpu"))
    assert sum(p.numel() for p in policy.lm.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    # distilroberta-base has 82,118,400 with BERT's pooler (768 · 769), which no reward model here reads.
    [("facebook/opt-350m", 331_196_416), ("distilbert/distilroberta-base", 82_118_400 - 768 * 769)],
)
def test_known_reward_backbones_too(name, parameters):
    with torch.device("meta"):
        model = shapes.reward_model_of(shapes.config_of(name), load_config("cpu").reward_model)
    assert sum(p.numel() for p in model.backbone.parameters()) == parameters


def test_the_lines_are_the_arithmetic_of_gpt2():
    cfg = load_config("gpu-12gb", 0, {"models.autocast": False})
    found, million = plan(cfg, 16), 124_439_808 + 769
    sample, step = found.phases["sample"], found.phases["optimizer step"]
    assert sample["context"] == CONTEXT
    for line, expected in (("weights", 4), ("reference", 4), ("optimizer", 8)):
        assert sample[line] == pytest.approx(expected * million / MIB, rel=1e-3), line
    assert step["gradients"] == pytest.approx(4 * million / MIB, rel=1e-3) and step["context"] == CONTEXT
    keys = 12 * 2 * 64 * (16 + 48) * 768 * 4  # layers, keys and values, rows, tokens, width, bytes
    assert sample["KV cache"] == pytest.approx(keys / MIB)
    logits = found.phases["update"]["logits"]
    assert logits > 2 * 16 * 48 * 50257 * 4 / MIB  # of a micro-batch, and their gradient


def test_each_switch_moves_its_line():
    base = {"models.policy": "openai-community/gpt2-medium", "models.autocast": False}

    def planned(**switches):
        given = {f"memory.{k}": v for k, v in switches.items()}
        return plan(load_config("gpu-12gb", 0, base | given), 16)

    plain, million = planned(), 354_823_168
    of = "update"
    assert planned(chunked_head=True).phases[of]["logits"] < 0.7 * plain.phases[of]["logits"]
    assert planned(checkpoint_activations=True).phases[of]["activations"] < 0.5 * plain.phases[of]["activations"]
    parked = planned(park=True)
    assert [parked.phases[p]["reference"] > 0 for p in parked.phases] == [False, False, True, False, False]
    assert [parked.phases[p]["reward model"] > 0 for p in parked.phases] == [False, True, False, False, False]
    assert parked.host["waiting"] == pytest.approx((4 * million + 4 * 81_527_808) / MIB, rel=1e-3)
    offloaded = planned(optimizer="offload")
    assert offloaded.phases[of]["optimizer"] == 0 and offloaded.host["optimizer"] == pytest.approx(16 * million / MIB, rel=1e-3)
    assert offloaded.phases["optimizer step"]["gradients"] == pytest.approx(4 * million / MIB, rel=1e-3)
    assert planned(optimizer="offload", stream_gradients=True).phases["optimizer step"]["gradients"] == 64  # LEAVING
    lora = planned(lora_rank=8)
    assert (
        lora.phases["reference logprobs"]["reference"] == 0
        and lora.phases[of]["optimizer"] < 0.05 * plain.phases[of]["optimizer"]
    )


def test_gpt2_xl_fits_with_every_switch():
    found = plan(load_config("gpu-12gb", 0, XL | EVERY), query=64)  # 32 × 192 sampled; 8 × 256 in a micro-batch
    assert found.phases["sample"]["KV cache"] == pytest.approx(32 * 256 * 300 / 1024)  # 300 KiB a token
    assert found.peak <= 9.5 * 1024 and found.total("update") <= 7.0 * 1024
    assert not plan(load_config("gpu-12gb", 0, XL), query=64).fits(24)


@pytest.mark.parametrize("profile", ["gpu-12gb", "gpu-12gb-1b"])
def test_the_profiles_of_a_12_gb_card_fit_it_and_say_so(profile):
    found = plan(profile)
    assert found.fits(12)
    text = (PROFILE_DIR / f"{profile}.yaml").read_text(encoding="utf-8")
    assert f"{found.total(found.highest) / 1024:.1f} GiB on the card" in text and f"PPO {found.peak / 1024:.1f}" in text
    assert "not yet measured" in text


@pytest.mark.slow
def test_what_is_said_to_fit_a_card_fits_it():
    cfg = load_config("gpu-12gb", 0, XL)
    rungs = memory.ladder(cfg, 64)
    peaks = [rung[1].total(rung[1].highest) for rung in rungs]
    assert peaks == sorted(peaks, reverse=True) and rungs[0][0] == []
    for card in CARDS:
        turned, found = memory.fitted(cfg, card, 64, rungs)
        values = {name: value for change, _ in turned for name, value in change.items()}
        again = plan(memory.changed(cfg, values), 64)
        assert again == found and again.fits(card)
        for change, _ in turned:  # nothing is turned in vain
            rest = {name: value for name, value in values.items() if name not in change}
            with contextlib.suppress(ValueError):  # what another switch needs
                assert not plan(memory.changed(cfg, rest), 64).fits(card)
    text = memory.report(cfg, 64)
    assert "memory.optimizer=offload" in text and "does not fit" not in text


@pytest.mark.parametrize(
    "switches", [{}, {"memory.checkpoint_activations": True, "memory.chunked_head": True}], ids=["plain", "lean"]
)
def test_the_trainings_before_ppo_are_within_a_tenth_of_what_they_hold_on_this_cpu(tiny, switches):
    """On texts of the greatest length."""
    cfg = load_config("cpu", 0, tiny | {"sft.max_length": 40, "sft.batch_size": 16, "reward_model.batch_size": 8} | switches)
    ids, mask = torch.zeros(16, 40, dtype=torch.int64), torch.ones(16, 40, dtype=torch.bool)
    batch = {"input_ids": ids, "attention_mask": mask, "mask": mask[:, 1:]}
    with Live() as live:
        policy = shapes.policy_of(shapes.config_of(cfg.models.policy), cfg)
        tuned = stepped(policy, lambda policy: sft.sft_loss(policy, batch), live)
        del policy
        model = shapes.reward_model_of(shapes.config_of(cfg.models.reward_backbone), cfg.reward_model).train()
        model.checkpointed = cfg.memory.checkpoint_activations
        rewarded = stepped(model, lambda model: model(ids, mask.long()).sum(), live)
    assert plan(cfg, 8).before == pytest.approx({"fine-tuning": tuned, "reward training": rewarded}, rel=0.1)


def stepped(module, loss, live) -> float:
    """MiB at the highest moment of the second step of a training."""
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        live.reset()
        loss(module).backward()
        optimizer.step()
    return live.peak / MIB


def test_where_the_annotator_rewards_its_judge_lies_there_all_the_time_and_a_rule_takes_nothing(tiny):
    cfg = load_config("cpu", 0, tiny | {"ppo.reward": "annotator"})
    found = plan(cfg, 8)
    judge = sum(4 * x.numel() for x in load_file(hub.local_dir(cfg.models.judge) / "model.safetensors").values())
    for phase in PHASES:
        assert found.phases[phase]["reward model"] * MIB == pytest.approx(judge, rel=0.01), phase
    with Live() as live:
        measured = phases.measure(cfg, 8, live)
    assert {p: found.total(p) for p in PHASES} == pytest.approx({p: sum(measured[p].values()) for p in PHASES}, rel=0.1)
    large = {"ppo.reward": "annotator", "memory.park": True}  # which parks a reward model only
    assert plan(load_config("gpu-12gb", 0, large)).phases["update"]["reward model"] * MIB == pytest.approx(
        4 * 66_955_010, rel=1e-4
    )
    rule = plan(load_config("cpu", 0, tiny | {"ppo.reward": "annotator", "preferences.criterion": "clarity"}), 8)
    assert "score" not in rule.phases and rule.phases["update"]["reward model"] == 0


@pytest.mark.parametrize(
    ("name", "parameters"), [("lvwerra/distilbert-imdb", 66_955_010), ("textattack/bert-base-uncased-imdb", 109_483_778)]
)
def test_known_judges_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = shapes.classifier_of(shapes.config_of(name))
    assert sum(p.numel() for p in model.parameters()) == parameters and shapes.is_transformer(name)
    assert not shapes.is_transformer("tiny-evaluator")


def test_the_command_prints_the_ledger_and_the_cards(capsys, tiny):
    settings = [f"{name}={value}" for name, value in tiny.items()]
    assert main(["plan", "--profile", "cpu", "--query", "8", "--set", *settings]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("reference logprobs", "KV cache", "peak", "8 GB: fits", "24 GB: fits"))
    assert main(["plan", "--profile", "cpu", "--set", "models.policy=somebody/unknown"]) == 2
    assert "openai-community/gpt2-xl" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["plan", "--profile", "cpu", "--measure"]) == 2
        assert "CUDA" in capsys.readouterr().err


def test_what_the_command_measures_stands_beside_the_plan_with_the_context(monkeypatch, capsys, tiny):
    lines = {phase: {"weights": 70.0, "reference": 0.2, phases.MOVING: 10.0 * i} for i, phase in enumerate(PHASES)}
    monkeypatch.setattr(memory, "measure", lambda cfg, query: lines)
    settings = [f"{name}={value}" for name, value in tiny.items()]
    assert main(["plan", "--profile", "cpu", "--query", "8", "--measure", "--set", *settings]) == 0
    planned, found = capsys.readouterr().out.split("measured:\n")
    rows = [line.split() for line in found.splitlines()[:4]]
    assert rows == [
        ["context", *[f"{CONTEXT}"] * 5], ["weights", *["70"] * 5], ["transient", "0", "10", "20", "30", "40"],
        ["total", "970", "980", "990", "1,000", "1,010"],
    ]  # fmt: skip
    assert "logits" in planned and "peak" in found
    assert "measured" not in plan(load_config("cpu", 0, tiny), 8).table()


def test_bf16_weights_without_a_master_cannot_be_planned():
    with pytest.raises(ConfigError, match="fp32 master"):
        load_config("cpu", 0, {"models.dtype": "bfloat16"})
    with pytest.raises(CourseError, match="not known"):
        plan(load_config("cpu", 0, {"models.policy": "somebody/unknown"}))
    assert MemoryConfig() == load_config("cpu").memory and math.isfinite(plan("smoke").peak)


@pytest.mark.cuda
@pytest.mark.parametrize("switches", [{}, EVERY], ids=["plain", "every switch"])
def test_the_plan_is_within_a_tenth_of_what_a_cuda_device_holds(switches):
    cfg = load_config("gpu-12gb", 0, switches)
    found, expected = phases.measure(cfg), plan(cfg)
    for phase, lines in found.items():
        assert expected.total(phase) - CONTEXT == pytest.approx(sum(lines.values()), rel=0.1), phase
