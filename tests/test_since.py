"""This code against an earlier revision's: who is asked what, in which order, and what becomes of the seconds."""

import pytest

from rlhf_nb_utils import bench, since
from rlhf_nb_utils.config import ROOT

TINY = {
    "data.n_sft": 32, "data.n_preferences": 16, "data.n_ppo": 16, "data.n_evaluation": 8, "rollouts.response_length": 4,
    "ppo.iterations": 1, "ppo.batch_size": 16, "evaluation.n_prompts": 4, "evaluation.best_of_prompts": 4,
    "evaluation.best_of_n": 2, "evaluation.bootstrap_samples": 100,
}  # fmt: skip

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")


ORDER: list[tuple[int, str, str]] = []


class Asked:
    """In place of a process: what it was asked, and slower then than now."""

    def __init__(self, folder, runs, threads, overrides):
        self.name, self.closed = ("now" if folder == ROOT else "then"), False

    def seconds(self, stage, seed):
        ORDER.append((seed, stage, self.name))
        return (3.0 if self.name == "then" else 2.0) * (1 + seed) * (1 + since.STAGES.index(stage))

    def close(self):
        self.closed = True


@needs_git
def test_both_build_each_stage_in_turn_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(since, "Side", Asked)
    ORDER.clear()
    trees = since._git("worktree", "list").stdout
    seconds = since.race("HEAD", 5, 2)
    assert len(ORDER) == 6 * 5 * 2 and seconds["now"]["sft"] == [4.0, 6.0, 8.0, 10.0, 12.0]
    pairs = list(zip(ORDER[::2], ORDER[1::2]))
    assert all(one[:2] == other[:2] and {one[2], other[2]} == {"then", "now"} for one, other in pairs)
    assert {one[2] for one, _ in pairs} == {"then", "now"}  # who begins
    text = since.table(seconds)
    assert text.count("1.50× [1.50, 1.50]") == 6 and "| all | 180.0 | 120.0 |" in text
    assert since._git("worktree", "list").stdout == trees


@needs_git
def test_a_revision_that_is_not_there_is_named(capsys):
    with pytest.raises(since.SinceError, match="no revision 'no-such-thing' here"):
        bench.main(["--since", "no-such-thing"])


@needs_git
def test_code_that_stops_says_where_and_why(tmp_path):
    (tmp_path / "rlhf_nb_utils").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "rlhf_nb_utils" / "__init__.py").write_text("raise RuntimeError('older than that')")
    side = since.Side(tmp_path, tmp_path / "runs", 1, {})
    with pytest.raises(since.SinceError, match="stopped at the stage sft: RuntimeError: older than that"):
        side.seconds("sft", 0)
    side.close()


@needs_git
@pytest.mark.slow
def test_this_revision_against_itself():
    seconds = since.race("HEAD", 2, 2, TINY)
    assert all(min(found) > 0 and len(found) == 2 for stages in seconds.values() for found in stages.values())
