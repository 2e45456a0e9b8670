"""The contests' own arithmetic, and one round of those that need no peer at the smallest size."""

import json

import pytest
import torch

from rlhf_nb_utils import bench


def test_contestants_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    clock, order = [0.0], []

    def contestant(name: str, seconds: float):
        def run():
            order.append(name)
            clock[0] += seconds * len(order)  # slower from round to round

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    seconds = bench.race({"a": contestant("a", 1.0), "b": contestant("b", 10.0)}, 3)
    assert order == ["a", "b"] * (3 + bench.WARM)
    first = 2 * bench.WARM + 1
    assert seconds == {"a": [first, first + 2, first + 4], "b": [10 * (first + 1), 10 * (first + 3), 10 * (first + 5)]}


def test_a_row_is_the_median_of_the_ratios_within_a_round():
    seconds = {"slow": [2.0, 9.0, 40.0, 8.0, 10.0], "fast": [1.0, 3.0, 10.0, 2.0, 2.0]}
    row = bench.Row.of("x", seconds, "slow", "fast", 4.0)
    assert row.ratios == (2.0, 3.0, 4.0, 4.0, 5.0) and row.ratio == 4.0 and row.met
    assert not bench.Row.of("x", seconds, "slow", "fast", 3.9, "≤").met
    assert bench.markdown([row]).splitlines()[-1] == "| x | 4.00× [2.50, 4.50] | ≥ 4× | ✓ |"


def test_both_sides_of_ppo_score_the_same_text_alike():
    """The reward on text, tokenised anew, is the reward model's output on the ids that were sampled."""
    setting = bench.Setting(1, 64, 40)
    tokenizer = bench.word_tokenizer(40)
    ids = [[3, 5, 7, 11], [2, 4]]
    texts = [" ".join(map(str, row)) + " " for row in ids]
    found = bench.scorer(setting, tokenizer)(texts, ["9 ", "1 6 "])
    model = bench.classifier(setting)
    for row, extra, score in zip(ids, ([9], [1, 6]), found):
        with torch.no_grad():
            hidden = model.transformer(input_ids=torch.tensor([row + extra])).last_hidden_state
        assert score.item() == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_our_side_does_one_iteration_at_a_call(critic, monkeypatch):
    seen, train = [], bench.ppo.train

    def counted(state, *rest):
        done = train(state, *rest)
        seen.append(done.iteration)
        return done

    monkeypatch.setattr(bench.ppo, "train", counted)
    run = bench.ours(bench.Setting(1, 64, 40, batch=8, response=4), critic)
    run()
    run()
    assert seen == [1, 2]


def test_the_table_is_printed_and_kept(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path))
    row = bench.Row("a contest", 2.0, "≥", (1.0, 3.0, 3.0))
    monkeypatch.setattr(bench, "contests", lambda repeats: {"optimizer": lambda: [row]})
    threads = torch.get_num_threads()
    assert bench.main(["--only", "optimizer", "--threads", str(threads)]) == 0
    assert "| a contest | 3.00×" in capsys.readouterr().out
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["rows"][0]["ratios"] == [1.0, 3.0, 3.0] and "torch" in kept["machine"]
    with pytest.raises(bench.BenchError, match="at least 5"):
        bench.main(["--repeats", "3"])


def test_gpt2_xl_is_planned_within_what_was_asked_and_has_one_figure_a_phase(monkeypatch):
    rows = bench.memory_rows()
    assert len(rows) == 5 and all(row.met for row in rows)
    phases = {"sample": {"a": 2048.0}, "update": {"a": 7 * 1024.0, "b": 1.0}}
    monkeypatch.setattr(bench.memory, "plan", lambda *_, **__: bench.memory.Plan("", phases))
    small, large = bench.memory_rows()
    assert small.cells()[1:] == ["2.00 GiB", "≤ 9.5 GiB", "✓"] and large.cells()[1:] == ["7.00 GiB", "≤ 7 GiB", "✗"]
