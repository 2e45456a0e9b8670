"""The recorded plans: what can be chosen is there, and is what the planner would find."""

import json

import pytest

from rlhf_nb_utils import memory, phases, plans
from rlhf_nb_utils.config import ConfigError
from rlhf_nb_utils.course import main
from rlhf_nb_utils.phases import MIB, Sizes

KNOWN = plans.load()


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.setattr(phases, "_found", {})


def test_the_stairs_are_recorded_and_each_step_is_a_switch():
    for name, cfg in plans.stairs():
        missing = [phase for key, phase, *_ in plans.needed(cfg) if key not in KNOWN]
        assert not missing, f"{name}: `python -m rlhf_nb_utils.course record plans`"
    changes = [set(change) for change in plans.STAIRS.values()]
    assert changes[0] == set() and all(changes[1:]) and len(set.union(*changes)) == sum(map(len, changes))


def test_a_replayed_plan_traces_nothing(no_traces, monkeypatch):
    assert plans.replay() == len(KNOWN) > 300
    monkeypatch.setattr(phases, "_trace", None)
    planned = {name: memory.plan(cfg) for name, cfg in plans.stairs()}
    assert planned["no switch"].peak > 24 * 1024 > 8 * 1024 > planned["+ parked models"].peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no switch", "+ chunked head"])
def test_what_is_recorded_is_what_would_be_traced(no_traces, name):
    cfg = dict(plans.stairs())[name]
    for key, phase, own, sizes in plans.needed(cfg):
        assert phases.traced(phase, own, sizes) == pytest.approx(KNOWN[key], abs=1), phase


def test_a_key_names_all_that_a_trace_depends_on():
    cfg = plans.configured("gpt2", 8, 128, 16)
    key = {phase: phases.key_of(phase, cfg, Sizes.of(cfg)) for phase in ("sample", "update")}

    def other(phase, change):
        changed = memory.changed(cfg, change)
        return phases.key_of(phase, changed, Sizes.of(changed)) != key[phase]

    for change in ({"memory.chunked_head": True}, {"memory.lora_rank": 4}, {"ppo.batch_size": 64}, {"models.autocast": False}):
        assert other("update", change), change
    assert not other("update", {"memory.park": True}) and not other("update", {"rollouts.batch_size": 4})
    assert other("sample", {"rollouts.batch_size": 4}) and not other("sample", {"memory.checkpoint_activations": True})


def test_every_point_of_the_grid_is_a_valid_setting():
    points = list(plans.grid())
    assert len(points) == 2 * 3 * 3 * 3 * 2 * 24 and {cfg.models.policy for cfg in points} >= {plans.XL["models.policy"]}
    for cfg in points[:: len(points) // 50]:
        assert Sizes.of(cfg).part * Sizes.of(cfg).parts == plans.STEP
        assert (cfg.models.dtype == "bfloat16") == (cfg.memory.optimizer == "offload")


def test_switches_that_do_not_go_together_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^memory: stream_gradients needs optimizer: offload, which takes the gradients$"):
        plans.configured("gpt2", 8, 128, 16, stream_gradients=True)


def test_the_table_of_the_cards(no_traces, monkeypatch):
    table = {row["name"]: row for row in plans.cards()}
    assert list(table) == list(plans.asked())
    plans.replay()
    monkeypatch.setattr(phases, "_trace", None)
    for name, cfg in plans.asked().items():
        found = memory.plan(cfg)
        assert table[name]["highest"] == found.highest, "`python -m rlhf_nb_utils.course record plans`"
        assert table[name]["GiB"] == pytest.approx(found.total(found.highest) / 1024, abs=0.006)
    for row in table.values():
        assert list(row["cards"]) == [str(card) for card in memory.CARDS]
        for size, card in row["cards"].items():
            assert card["fits"] == (card["GiB"] <= int(size) - memory.RESERVED) and (card["fits"] or card["turn"])
            assert card["turn"] or card["GiB"] == row["GiB"]
            assert len(card["price"]) <= len(card["turn"])
    assert table["gpu-12gb"]["cards"]["12"]["turn"] == {} == table["gpu-12gb-1b"]["cards"]["12"]["turn"]
    assert table["GPT-2 XL, no switch"]["cards"]["24"]["turn"]


def test_a_recording_that_is_not_there(tmp_path):
    with pytest.raises(plans.PlanError, match="git checkout"):
        plans.load(tmp_path / "plans.json")


def test_recording_goes_on_where_it_stopped_and_drops_what_nobody_needs(no_traces, tmp_path, monkeypatch):
    cfg, asked_for = plans.configured("gpt2", 4, 48, 16), []
    monkeypatch.setattr(plans, "stairs", lambda: iter([("one", cfg)]))
    monkeypatch.setattr(plans, "grid", lambda: iter([cfg]))
    monkeypatch.setattr(plans, "asked", dict)
    traced = {line: float(i) for i, line in enumerate(plans.LINES)}
    monkeypatch.setattr(phases, "_trace", lambda phase, *_: asked_for.append(phase) or traced)
    path = plans.record(tmp_path / "plans.json", every=1)
    assert sorted(asked_for) == sorted(phase for _, phase, *_ in plans.needed(cfg))
    content = json.loads(path.read_text())
    dropped = dict(list(content["traces"].items())[1:]) | {"of another day": [0, 0, 0, 0, 0]}
    path.write_text(json.dumps(content | {"traces": dropped}))
    monkeypatch.setattr(phases, "_found", {})
    asked_for.clear()
    plans.record(path)
    assert len(asked_for) == 1 and json.loads(path.read_text())["traces"] == content["traces"]


def test_the_command_takes_no_names_for_plans(capsys):
    assert main(["record", "plans", "--only", "gpt2"]) == 2
    assert "no names" in capsys.readouterr().err


def test_the_hand_count_of_gpt2_xl(no_traces):
    plans.replay()
    planned, weights = memory.plan(dict(plans.stairs())["no switch"]), 1_557_611_200 + 1601
    assert planned.phases["update"]["optimizer"] * MIB == 8 * weights
