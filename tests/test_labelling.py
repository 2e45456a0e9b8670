"""Labelling by hand: blinded, on the disk before the next, resumed after a break, undone honestly, simulated headless."""

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from rlhf_nb_utils import labelling, preferences, widgets
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.data import Comparison

SOURCE = Path(labelling.__file__)
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def comparison(i: int, k: int = 2) -> Comparison:
    return Comparison(f"opening {i}", tuple(f" text {i}.{j}" for j in range(k)), tuple(float(-j) for j in range(k)), f"id{i}")


def comparisons(n: int, k: int = 2) -> list[Comparison]:
    return [comparison(i, k) for i in range(n)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "labels.jsonl"


def choose(session: labelling.Session, best: str) -> None:
    """Labels the pair on the screen: the response with this text is better."""
    k = session.current.responses.index(best)
    session.label([k, 1 - k])


# --- what the reader sees


def test_the_screen_shows_neither_ids_nor_scores_nor_which_response_is_which(path):
    session = labelling.Session([Comparison("q", (" x", " y"), (7.25, -3.5), "secret")], path)
    screen = json.dumps(labelling.LabellingWidget(session).screen)
    assert not any(word in screen for word in ("7.25", "-3.5", "secret"))
    assert session.current._fields == ("query", "responses") and set(session.current.responses) == {" x", " y"}


@pytest.mark.parametrize("k", [2, 3])
def test_every_order_is_shown_about_equally_often(k):
    n, orders = 1200, list(permutations(range(k)))
    # A response's name ends in its place in the comparison; each comparison opens a session of its own.
    shown = [labelling.Session([comparison(i, k)], "nowhere.jsonl").current.responses for i in range(n)]
    seen = Counter(tuple(int(text[-1]) for text in texts) for texts in shown)
    expected = n / len(orders)
    assert set(seen) == set(orders)
    assert all(abs(seen[order] - expected) < 4 * expected**0.5 for order in orders)


def test_the_order_follows_from_seed_and_id_alone(path):
    def first_shown(items, seed):
        return {c.id: labelling.Session([c], path, seed).current.responses for c in items}

    items = comparisons(40)
    assert first_shown(items, 1) == first_shown(items[::-1], 1)
    assert first_shown(items, 1) != first_shown(items, 2)


def test_progress_counts_what_is_behind_the_reader(path):
    session = labelling.Session(comparisons(20), path)
    assert str(session.progress) == "0 of 20, 0 skipped"
    session.label([0, 1])
    session.skip()
    session.label([1, 0])
    assert str(session.progress) == "3 of 20, 1 skipped"


# --- what is written


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_ranking_of_what_was_shown_is_written_with_the_scores_that_belong_to_it(path, order):
    session = labelling.Session([comparison(0, 3)], path)
    shown = session.current.responses
    session.label(order)
    (written,) = session.labels()
    assert written.responses == tuple(shown[k] for k in order)
    gold = dict(zip(comparison(0, 3).responses, comparison(0, 3).scores))
    assert written.scores == tuple(gold[text] for text in written.responses)
    assert (written.query, written.id) == ("opening 0", "id0")


def test_a_comparison_without_scores_can_be_labelled(path):
    session = labelling.Session([Comparison("q", ("a", "b"), None, "i")], path)
    choose(session, "b")
    assert session.labels() == preferences.load_labels(path) == [Comparison("q", ("b", "a"), None, "i")]


@pytest.mark.parametrize("order", [[0], [0, 0], [1, 2], [0, 1, 2], ["0", "1"], []])
def test_an_order_that_ranks_nothing_is_refused_and_writes_nothing(path, order):
    session = labelling.Session(comparisons(1), path)
    with pytest.raises(CourseError, match="does not rank 2 responses"):
        session.label(order)
    assert session.progress.done == 0 and not path.exists()


def test_each_choice_is_synced_to_the_disk_before_the_next_is_shown(path, monkeypatch):
    session, seen, sync = labelling.Session(comparisons(3), path), [], os.fsync

    def watched(descriptor):
        sync(descriptor)
        seen.append((session.current.query, len(path.read_bytes().splitlines())))

    monkeypatch.setattr(os, "fsync", watched)
    session.label([0, 1])
    session.skip()
    assert seen == [("opening 0", 1), ("opening 1", 2)]
    session.undo()  # a skip is taken back without a record
    session.undo()  # a label is not
    assert seen[2:] == [("opening 1", 3)]


@pytest.mark.parametrize("choice", ["label", "skip", "undo"])
def test_a_choice_that_cannot_be_saved_is_not_counted(path, monkeypatch, choice):
    session = labelling.Session(comparisons(3), path)
    session.label([0, 1])
    before = session.current, session.progress
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CourseError, match="not saved.*No space left"):
        session.label([0, 1]) if choice == "label" else getattr(session, choice)()
    assert (session.current, session.progress) == before


# --- breaks


def test_a_session_goes_on_where_the_last_one_was_killed(path):
    items, rest = comparisons(4), []
    first = labelling.Session(items, path)
    first.label([0, 1])
    first.skip()
    with open(path, "ab") as file:
        file.write(b'{"id": "id2", "que')  # killed in the middle of a record
    second = labelling.Session(items, path)
    assert str(second.progress) == "2 of 4, 1 skipped" and not second.can_undo
    while second.current:
        rest.append(second.current.query)
        second.label([0, 1])
    assert rest == ["opening 2", "opening 3"]
    assert [c.id for c in second.labels()] == ["id0", "id2", "id3"] and str(second.progress) == "4 of 4, 1 skipped"


def test_labels_of_others_in_the_file_stay_there_and_are_not_counted(path):
    preferences.append_label(path, comparison(99))
    session = labelling.Session(comparisons(2), path)
    assert session.progress.done == 0 and session.labels() == []
    session.label([0, 1])
    assert [c.id for c in session.labels()] == ["id0"]
    assert [c.id for c in preferences.load_labels(path)] == ["id99", "id0"]


# --- second thoughts


def test_undo_goes_back_step_by_step_and_the_last_choice_counts(path):
    session = labelling.Session(comparisons(3), path)
    choose(session, " text 0.0")
    choose(session, " text 1.0")
    session.undo()
    session.undo()
    assert session.current.query == "opening 0" and str(session.progress) == "0 of 3, 0 skipped"
    assert session.labels() == [], "no label stands that was taken back"
    choose(session, " text 0.1")
    session.skip()
    assert [c.responses[0] for c in preferences.load_labels(path)] == [" text 0.1"]
    assert str(session.progress) == "2 of 3, 1 skipped"


def test_a_skip_can_be_undone_into_a_label(path):
    session = labelling.Session(comparisons(1), path)
    session.skip()
    session.undo()
    session.label([0, 1])
    assert len(session.labels()) == 1 and str(session.progress) == "1 of 1, 0 skipped"


def test_a_break_after_undo_leaves_the_comparison_skipped_not_labelled(path):
    session = labelling.Session(comparisons(2), path)
    session.label([0, 1])
    session.undo()
    again = labelling.Session(comparisons(2), path)
    assert again.labels() == [] and str(again.progress) == "1 of 2, 1 skipped"


def test_undo_only_adds_to_the_file(path):
    session = labelling.Session(comparisons(1), path)
    session.label([0, 1])
    before = path.read_bytes()
    session.undo()
    session.label([1, 0])
    assert path.read_bytes().startswith(before) and len(path.read_bytes().splitlines()) == 3


def test_there_is_nothing_to_do_before_the_first_choice_or_after_the_last(path):
    session = labelling.Session(comparisons(1), path)
    with pytest.raises(CourseError, match="nothing to undo"):
        session.undo()
    session.skip()
    assert session.current is None
    for choice in (session.skip, lambda: session.label([0, 1])):
        with pytest.raises(CourseError, match="all comparisons are done"):
            choice()


# --- input that cannot be used


@pytest.mark.parametrize(
    "items, words",
    [
        ([], "nothing to label"),
        ([comparison(0, 4)], "4 response"),
        ([Comparison("q", ("a",), None, "i")], "1 response"),
        ([Comparison("q", ("a", "b"), (1.0,), "i")], "2 responses but 1 scores"),
        ([Comparison("q", ("a", "b"))], "no id"),
        ([comparison(0), Comparison("other", ("a", "b"), None, "id0")], "two comparisons have the id 'id0'"),
        ([comparison(0), Comparison(" opening 0 ", ("a", "b"), None, "i")], "two comparisons have the prompt 'opening 0'"),
    ],
)
def test_comparisons_that_cannot_be_labelled_are_refused_in_one_line(path, items, words):
    for headless in (lambda: labelling.label(items, path), lambda: labelling.Session(items, path)):
        with pytest.raises(CourseError, match=words) as error:
            headless()
        assert "\n" not in str(error.value)
    assert not path.exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("no label\n", "line 1 is not a label"),
        ('{"id": "id0", "query": "opening 0", "responses": 5}\n', "line 1 is not a label"),
        ('{"id": ["id0"], "query": "opening 0", "responses": ["a", "b"]}\n', "line 1 is not a label"),
        ('{"id": "id0", "query": "opening 0", "responses": ["a", "b"]}\n', "labels of other responses, first 'id0'"),
        ('{"id": "id0", "query": "opening 9", "responses": [" text 0.0", " text 0.1"]}\n', "labels of other responses"),
    ],
)
def test_a_file_that_is_damaged_or_of_other_comparisons_is_refused_and_left_as_it_is(path, text, words):
    path.write_text(text)
    with pytest.raises(CourseError, match=words) as error:
        labelling.Session(comparisons(2), path)
    assert "\n" not in str(error.value) and path.read_text() == text


# --- headless


@pytest.mark.parametrize("k", [2, 3])
def test_headless_a_simulated_annotator_labels_and_says_so_in_one_line(path, capsys, k):
    items = comparisons(30, k)
    result = labelling.label(items, path, seed=3)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "simulated annotator labelled 30 comparisons" in said
    assert repr(result) == "30 simulated labels in labels.simulated.jsonl"
    labels = result.labels()
    assert labels == preferences.load_labels(result.path) and len(labels) == 30
    assert [set(c.responses) for c in labels] == [set(c.responses) for c in items]
    assert preferences.agreement(labels).rate > 0.5
    assert labelling.label(items[::-1], path, seed=3).labels()[::-1] == labels
    assert labelling.label(items, path, seed=4).labels() != labels


def test_headless_labels_leave_those_made_by_hand_alone(path, capsys):
    session = labelling.Session(comparisons(2), path)
    session.label([0, 1])
    before = path.read_bytes()
    labelling.label(comparisons(2), path)
    assert path.read_bytes() == before and labelling.Session(comparisons(2), path).progress.done == 1


def test_the_annotator_can_be_chosen(path, capsys):
    assert labelling.label(comparisons(9, 3), path, annotator=labelling.simulated_annotator(noise=0)).labels() == comparisons(
        9, 3
    )
    (one,) = labelling.label([comparison(0)], path, annotator=lambda c: [1, 0]).labels()
    assert one.responses == (" text 0.1", " text 0.0") and one.scores == (-1.0, 0.0)
    with pytest.raises(CourseError, match="does not rank"):
        labelling.label([comparison(0)], path, annotator=lambda c: [1])


def test_headless_labels_are_as_noisy_as_the_caller_says(path, capsys):
    items = comparisons(2000)
    assert labelling.label(items[:40], path, noise=0.0).labels() == items[:40]
    for noise, law in ((0.5, 0.8808), (3.0, 0.5826)):  # sigmoid(2), sigmoid(1 / 3)
        labels = labelling.label(items, path, seed=1, noise=noise).labels()
        share = sum(found == given for found, given in zip(labels, items)) / len(items)
        assert abs(share - law) < 4 * (law * (1 - law) / len(items)) ** 0.5


def test_simulated_labels_follow_the_law_of_the_annotator():
    annotator, n = labelling.simulated_annotator(noise=2.0, seed=0), 2000
    share = sum(annotator(c)[0] == 0 for c in comparisons(n)) / n
    assert abs(share - 0.6225) < 4 * (0.6225 * 0.3775 / n) ** 0.5  # sigmoid(1 / 2)


def test_without_scores_the_simulated_annotator_has_nothing_to_go_by(path):
    with pytest.raises(CourseError, match="no gold scores"):
        labelling.label([Comparison("q", ("a", "b"), None, "i")], path)
    assert os.listdir(path.parent) == []


# --- the widget


@pytest.fixture
def widget(path, monkeypatch, capsys) -> labelling.LabellingWidget:
    monkeypatch.setattr(widgets, "in_browser", lambda: True)
    widget = labelling.label(comparisons(3), path)
    assert isinstance(widget, labelling.LabellingWidget) and capsys.readouterr().out == ""
    return widget


def send(widget: labelling.LabellingWidget, **message) -> None:
    """What JavaScript would send in answer to the present screen."""
    widget._handle_custom_msg({"turn": widget.screen["turn"]} | message, [])


def test_messages_label_skip_and_undo(widget, path):
    shown = widget.screen
    assert (shown["progress"], shown["can_undo"], shown["problem"]) == ("0 of 3, 0 skipped", False, "")
    send(widget, do="label", order=[1, 0])
    assert widget.labels()[0].responses == tuple(shown["responses"][::-1])
    send(widget, do="skip")
    assert widget.screen["query"] == "opening 2" and widget.screen["progress"] == "2 of 3, 1 skipped"
    send(widget, do="undo")
    assert widget.screen["query"] == "opening 1" and widget.screen["can_undo"]
    for _ in range(2):
        send(widget, do="label", order=[0, 1])
    assert widget.screen["responses"] == [] and widget.screen["progress"] == "3 of 3, 0 skipped"
    assert len(preferences.load_labels(path)) == 3


def test_a_choice_made_twice_before_the_next_screen_counts_once(widget):
    for _ in range(2):
        widget._handle_custom_msg({"turn": 0, "do": "label", "order": [0, 1]}, [])
    assert widget.screen["progress"] == "1 of 3, 0 skipped"


@pytest.mark.parametrize("message", [{}, {"do": "label"}, {"do": "label", "order": "01"}, {"do": "dance"}, {"turn": "x"}])
def test_a_message_that_means_nothing_changes_nothing(widget, path, message):
    before = widget.screen
    send(widget, **message)
    widget._handle_custom_msg("text", [])
    assert widget.screen == before and not path.exists()


def test_a_problem_is_shown_and_the_same_comparison_stays(widget):
    send(widget, do="undo")
    assert "nothing to undo" in widget.screen["problem"] and widget.screen["query"] == "opening 0"
    send(widget, do="label", order=[0, 0])
    assert "does not rank" in widget.screen["problem"] and widget.screen["turn"] == 2
    send(widget, do="skip")
    assert widget.screen["problem"] == ""


def test_an_answer_takes_less_than_a_tenth_of_a_second(path):
    for c in comparisons(500, 3):
        path.open("ab").write(preferences._record(c))
    items = [Comparison(c.query, tuple(text * 100 for text in c.responses), c.scores, c.id + "x") for c in comparisons(21, 3)]
    widget, times = labelling.LabellingWidget(labelling.Session(items, path)), []
    for _ in range(20):
        start = time.perf_counter()
        send(widget, do="label", order=[2, 0, 1])
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.1


# --- JavaScript


def run_node(tmp_path, script: str, *options: str) -> None:
    module = tmp_path / "labelling.mjs"  # the ending tells node that this is a module
    shutil.copy(SOURCE.with_suffix(".js"), module)
    (tmp_path / "script.mjs").write_text(script, encoding="utf-8")
    result = subprocess.run([NODE, *options, tmp_path / "script.mjs"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@needs_node
def test_the_script_is_valid(tmp_path):
    run_node(tmp_path, SOURCE.with_suffix(".js").read_text(encoding="utf-8"), "--check")


@needs_node
def test_keys_mean_what_the_screen_says(tmp_path):
    run_node(
        tmp_path,
        """
        import assert from "node:assert/strict";
        import widget, { choose, meaning } from "./labelling.mjs";
        const all = (keys, count) => keys.map((key) => meaning(key, count));
        assert.deepEqual(all(["a", "A", "ArrowLeft", "b", "B", "ArrowRight"], 2), [0, 0, 0, 1, 1, 1]);
        assert.deepEqual(all(["1", "2", "3"], 3), [0, 1, 2]);
        assert.deepEqual(all(["s", "S", "z", "Z"], 3), ["skip", "skip", "undo", "undo"]);
        assert.deepEqual(all(["1", "Enter", "Tab", "x"], 2), [null, null, null, null]);
        assert.deepEqual(all(["a", "ArrowLeft", "4"], 3), [null, null, null]);
        assert.deepEqual(all(["z", "s", "a", "1"], 0), ["undo", null, null, null]);  // all done
        assert.deepEqual([choose([], 0, 2), choose([], 1, 2)], [[0, 1], [1, 0]]);
        assert.deepEqual(choose(choose(choose([], 2, 3), 0, 3), 1, 3), [2, 0, 1]);
        assert.deepEqual(choose([2, 0], 2, 3), [0]);
        assert.equal(typeof widget.render, "function");
        """,
    )


def test_texts_are_set_as_text_and_nothing_is_fetched():
    script, style = (SOURCE.with_suffix(end).read_text(encoding="utf-8") for end in (".js", ".css"))
    assert not any(word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "import "))
    assert not any(word in text for text in (script, style) for word in ("http:", "https:", "fetch(", "@import", "url("))
    assert "background: #ffffff" in style
