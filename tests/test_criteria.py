"""Rule criteria: each prefers what it says, survives any text, hardly ties and does not pay for length."""

import hashlib
import inspect
import re

import numpy as np
import pytest

from rlhf_nb_utils import criteria
from rlhf_nb_utils import preferences as pf
from rlhf_nb_utils.config import Config


@pytest.mark.parametrize(
    "rule, better, worse",
    [
        (
            criteria.descriptiveness,
            " a bleak, misty harbour where pale fishermen whisper in hushed, mournful voices.",
            " a film that I saw with some of my mates and it was one that we had to see.",
        ),
        (
            criteria.descriptiveness,
            " the graceful, colorful score is tender.",
            " the graceful, graceful, graceful score is so so.",
        ),
        (
            criteria.clarity,
            " The plot is simple. A man loses his dog and looks for it all night.",
            " the plot (if one can call it that) -- notwithstanding considerable preparatory elaboration ... and",
        ),
        (criteria.clarity, " I liked the story. It made me laugh a lot.", " I liked the story. It made me laugh a"),
        (criteria.clarity, " I liked the cast and the songs of this show.", " I liked the cast I liked the cast I liked it."),
        (
            criteria.clean_language,
            " This is a bad film and I want my money back.",
            " This is a damn film and I want my money back.",
        ),
        (criteria.clean_language, " Only a fool would watch it.", " ONLY AN IDIOT WOULD WATCH IT!!!"),
    ],
)
def test_a_rule_prefers_what_it_says_it_prefers(rule, better, worse):
    assert rule(better) > rule(worse) + 0.2


@pytest.mark.parametrize("rule", criteria.RULES.values())
def test_a_rule_survives_any_text(rule):
    scores = [rule(text) for text in ("", " ", "...", "\n\t", "é🎬\ud800", "A", "!" * 500, "word " * 500)]
    assert np.isfinite(scores).all()


POOL = ["the", "a", "and", "to", "it", "was", "this", "film", "story", "actor", "gloomy", "short", "quite", "wonderful"]
POOL += ["dreadful", "music", "people", "watched", "laughed", "painful", "ending", "director", "strange", "night", "city"]


@pytest.mark.parametrize("rule", criteria.RULES.values())
def test_ties_are_rare_among_different_texts(rule):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(POOL, rng.integers(20, 50))) + "." for _ in range(300)]
    assert pf.tie_share([rule(text) for text in texts]) < 0.02


@pytest.fixture(scope="module")
def pieces_of_reviews(require_mirror):
    """Words and a place at least 50 words before the end, of some 2,800 reviews."""
    from rlhf_nb_utils.data import load_imdb_role

    rng = np.random.default_rng(0)
    reviews = [text.split() for text in load_imdb_role("evaluator")[1][:3000]]
    return [(words, rng.integers(len(words) - 50)) for words in reviews if len(words) > 60]


@pytest.mark.mirror
@pytest.mark.parametrize("criterion", criteria.RULES)
def test_on_reviews_a_rule_is_standardised_hardly_ties_and_does_not_pay_for_length(criterion, pieces_of_reviews):
    scorer = pf.make_scorer(criterion, Config(profile="test"))
    short, long = (scorer([" ".join(words[i : i + n]) for words, i in pieces_of_reviews]) for n in (15, 50))
    assert abs(long.mean()) < 0.1
    assert 0.85 < long.std() < 1.15
    assert abs(long.mean() - short.mean()) < 0.25
    assert pf.tie_share(long) < 0.01


def test_strong_words_count_and_are_nowhere_spelt(monkeypatch):
    source_words = set(re.findall(r"[a-z]+", inspect.getsource(criteria).lower()))
    digests = {hashlib.sha256(word.encode()).hexdigest()[:8] for word in source_words}
    assert not digests & criteria.STRONG
    before = criteria.clean_language(" what a flurb of a film")
    monkeypatch.setattr(criteria, "STRONG", frozenset({hashlib.sha256(b"flurb").hexdigest()[:8]}))
    assert criteria.clean_language(" what a Flurb of a film") < before - 2
