"""Which text plays which role: nothing of one use stands in another, and what was cut can be put together again."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_nb_utils import data
from rlhf_nb_utils.config import PROFILES, DataConfig, load_config
from rlhf_nb_utils.data import Comparison, DataError, Review

USES = ("sft", "preferences", "ppo", "evaluation")


def test_cleaning_undoes_html_and_white_space():
    assert data.clean_text("One.<br /><br/>Two &amp;\n\tthree  ") == "One. Two & three"


def test_a_short_review_ends_with_its_last_sentence_that_fits():
    twelve = "I liked this film a lot and so did all my friends."
    assert data.short_review(twelve + " And then it went on " + "and on " * 40) == twelve
    assert data.short_review("Too short.") is None
    assert data.short_review("no end " * 30) is None
    assert data.short_review("-SPOILERS--- " + twelve) is None


@given(st.lists(st.text(alphabet="abc'é,", min_size=1, max_size=8), min_size=2, max_size=30), st.text(max_size=5))
def test_query_and_response_are_the_review(words, name):
    review = Review(name, " ".join(words))
    query, response = data.split_opening(review, DataConfig())
    assert query + response == review.text and query and response
    assert 1 <= len(query.split()) <= 8


def test_the_cut_depends_on_the_review_alone():
    cfg = DataConfig(min_opening_words=2, max_opening_words=9)
    reviews = [Review(str(i), " ".join("word" for _ in range(20))) for i in range(200)]
    cuts = [len(data.split_opening(r, cfg)[0].split()) for r in reviews]
    assert cuts == [len(data.split_opening(r, cfg)[0].split()) for r in reversed(reviews)][::-1]
    assert set(cuts) == set(range(2, 10))


def queries(cfg):
    return {use: [data.split_opening(r, cfg)[0].lower() for r in data.load_reviews(cfg, use)] for use in USES}


def assert_disjoint(per_use):
    for use, found in per_use.items():
        assert len(set(found)) == len(found), use
    for a, b in itertools.combinations(per_use, 2):
        assert not set(per_use[a]) & set(per_use[b]), (a, b)


def test_embedded_prompts_of_the_four_uses_are_disjoint_and_enough_for_the_cpu_profile():
    assert_disjoint(queries(load_config("cpu").data))


def test_evaluation_prompts_do_not_move_with_other_settings():
    small = DataConfig(n_sft=16, n_preferences=16, n_ppo=8)
    assert data.load_reviews(small, "evaluation") == data.load_reviews(DataConfig(), "evaluation")


@pytest.mark.mirror
@pytest.mark.parametrize("profile", PROFILES)
def test_imdb_serves_every_profile(profile):
    cfg = load_config(profile, overrides={"data.source": "imdb"}).data
    for use in USES:
        data.load_reviews(cfg, use)


@pytest.mark.mirror
def test_imdb_roles_are_disjoint_and_imdb_serves_the_cpu_profile():
    roles = data.imdb_roles()
    for a, b in itertools.combinations(roles, 2):
        assert not set(roles[a][0]) & set(roles[b][0]) and not set(roles[a][1]) & set(roles[b][1])
    assert set(roles["judge"][2]) == {0, 1} and set(roles["language_model"][2]) == {-1}
    assert_disjoint(queries(load_config("cpu", overrides={"data.source": "imdb"}).data))


def test_asking_for_too_many_reviews_says_how_many_there_are():
    with pytest.raises(DataError, match=r"data.n_sft asks for 50000 .* has \d+"):
        data.load_reviews(DataConfig(n_sft=50_000), "sft")


def test_a_missing_file_says_how_to_get_it_back(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(DataError, match="data/build.py"):
        data.load_reviews(DataConfig(), "sft")


ROWS = [
    {"prompt": "The film", "chosen": " is good.", "rejected": " is bad."},
    {"prompt": "The film", "chosen": "The film is good.", "rejected": " is bad.", "score_chosen": 2, "score_rejected": 1.5},
    {"prompt": "The film", "responses": [" a.", " b.", " c."], "scores": [3, 2, 1]},
    {
        "prompt": [{"role": "user", "content": "Hello"}],
        "chosen": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}],
        "rejected": [{"role": "assistant", "content": "Go."}],
    },
]


def test_comparisons_from_jsonl(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert data.load_comparisons(path) == [
        Comparison("The film", (" is good.", " is bad."), None, "set.jsonl:1"),
        Comparison("The film", (" is good.", " is bad."), (2.0, 1.5), "set.jsonl:2"),
        Comparison("The film", (" a.", " b.", " c."), (3.0, 2.0, 1.0), "set.jsonl:3"),
        Comparison("Hello", ("Good day.", "Go."), None, "set.jsonl:4"),
    ]


def test_comparisons_from_parquet_and_from_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "somebody" / "pairs" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "train.parquet")
    assert data.load_comparisons(folder / "train.parquet")[0].responses == (" is good.", " is bad.")
    monkeypatch.setenv("RLHF_NB_MIRROR", str(tmp_path))
    assert data.load_comparisons("somebody/pairs")[0].responses == (" is good.", " is bad.")
    with pytest.raises(DataError, match="nosuch"):
        data.load_comparisons("somebody/pairs", split="nosuch")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"prompt": "a", "chosen": "b"', "line 1: not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "chosen and rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": " "}', "not empty"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": [1]}', "2 responses but 1 scores"),
        ('{"prompt": "a", "responses": ["b", "c"], "scores": ["x", 1]}', "scores must be numbers"),
        ('{"prompt": "a", "responses": null}', "at least two responses"),
        ("[1, 2]", "must be an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, wanted):
    path = tmp_path / "set.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=wanted):
        data.load_comparisons(path)


def test_a_file_of_another_kind_is_named(tmp_path):
    for name in ("junk.parquet", "junk.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00junk")
        with pytest.raises(DataError, match=name):
            data.load_comparisons(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match=name):
            data.load_comparisons(tmp_path / name)


def test_any_json_text_is_one_line_also_with_a_mark_at_the_start(tmp_path):
    path = tmp_path / "set.jsonl"
    row = {"prompt": "The film", "chosen": " one\u2028two\x85three.", "rejected": " bad."}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8", newline="")
    (comparison,) = data.load_comparisons(path)
    assert comparison.responses == (row["chosen"], row["rejected"])


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity"])
def test_a_score_that_is_no_number_is_refused(tmp_path, score):
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"prompt": "A", "chosen": " b.", "rejected": " c.", "score_chosen": {score}, "score_rejected": 1}}\n')
    with pytest.raises(DataError, match="set.jsonl:1: scores must be finite"):
        data.load_comparisons(path)
