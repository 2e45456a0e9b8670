"""Criteria that are rules: how descriptive, how clear, how clean a text is.

Knows the text of query + response and nothing else: no model, no annotator, no noise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np

# Each rule scorer is a weighted sum of shares *per word* (so that length does not buy score), pulled towards its
# usual value by PRIOR imagined words (so that two words are not a verdict), then scaled to mean 0 and standard
# deviation 1 over 50-word pieces of IMDb reviews. The same noise is still not the same for each of them: it is compared
# with differences between responses to one prompt, and those are smaller, by another factor for each rule.
PRIOR = 20
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_SENTENCE = re.compile(r"[.!?]+")
_VOWELS = re.compile(r"[aeiouy]+")
_CLUTTER = re.compile(r"[()\[\]{}<>/\\*#@…~^|=+_\"]|--|\.\.|[!?]{2}|\b[A-Z]{3,}\b")
_SHOUTING = re.compile(r"\b[A-Z]{4,}\b|[!?]{2,}")


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that make a picture: suffixes of adjectives and adverbs, and a few words of colour, sound, light and touch.
DESCRIPTIVE_SUFFIXES = ("ful", "less", "ous", "ive", "ish", "ical", "ly", "esque", "some", "ant", "ic")
DESCRIPTIVE_WORDS = _word_set(
    """red green blue golden silver grey gray pale dark bright bleak grim lush vivid neon murky misty dusty smoky muddy
    wet cold warm icy soft harsh rough smooth sharp loud quiet silent hushed shrill slow sudden eerie gritty grainy raw
    tender fierce brittle hollow crowded empty vast narrow tiny huge ancient rusty wooden sunlit moonlit shadow shadows
    light rain snow fog fire smoke blood street desert forest ocean river city night dawn dusk face eyes hands voice
    music score camera frame frames colour color colours colors costume costumes landscape
    haunting stunning glowing shining gripping chilling charming moving touching boring"""
)
# Ends like a descriptive word, describes nothing.
NOT_DESCRIPTIVE = _word_set(
    """really only family reply early music topic give live have love movie unless arrive drive believe leave receive
    apply supply elephant actually especially probably completely simply truly totally certainly absolutely obviously
    usually particularly mostly definitely finally apparently exactly unfortunately basically possibly nearly highly
    recently previously originally generally hopefully seriously literally honestly clearly easily fully likely
    importantly important want significant public important various previous serious obvious"""
)
MILD = _word_set("damn damned dammit hell crap crappy ass arse piss pissed bloody freaking frigging screwed sucks")
INSULTS = _word_set("stupid idiot idiots idiotic moron morons moronic dumb loser losers imbecile trash scum pathetic")
SLANG = _word_set("gonna gotta wanna ain't dude dudes lol wtf omg yeah nah kinda sorta cuz butt boobs shut")
# Strong swearing and slurs, kept as the first 8 hex digits of their SHA-256 so that nobody has to read them;
# `_digest(word)` tells whether a word is among them.
STRONG = _word_set(
    """
    044eb98b 06a1d8bf 0f28c496 0fcb77e9 11cf8376 120f6e5b 13a465fc 158869a9 16ea09fc 17bde8b4 1e02eec4 262f86db
    26578569 268651b3 2da888fb 2f5f6ce5 30a989af 31506a84 41b4d5e8 45fb7c3b 517ae3f7 522788b6 566f532d 5a9d9dce
    5b3ae48b 63333e4b 6ac3c336 819837a1 85fc17f7 886d51e9 8f5083e3 92a9bf81 937d56e4 986c9900 98b52c4b 9915ba2d
    9ae315a9 a24efab8 acd9193a b04a8a40 b601d5e9 b690cdbe bb61ef40 bd331fb1 bdb1cc25 c1cabb6f c2c3b68b c3de533e
    ccff74c2 d75a838d d95b1fc7 dd92623b e512a055 f1a5fb56 f50c51ed fb96c276
    """
)


def _digest(word: str) -> str:
    return hashlib.sha256(word.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower().replace("’", "'"))


def _share(hits: float, n: int, usual: float) -> float:
    """Share of ``hits`` among ``n`` words, pulled towards ``usual`` by PRIOR words."""
    return (hits + PRIOR * usual) / (n + PRIOR)


def _repeats(words: list[str]) -> int:
    """How many word pairs repeat an earlier one."""
    pairs = list(pairwise(words))
    return len(pairs) - len(set(pairs))


def _descriptive(word: str) -> bool:
    if word in DESCRIPTIVE_WORDS:
        return True
    return len(word) > 4 and word.endswith(DESCRIPTIVE_SUFFIXES) and word not in NOT_DESCRIPTIVE


def descriptiveness(text: str) -> float:
    """Share of *different* descriptive words, plus the mean length of all words; repeated word pairs cost.

    Counting a word once keeps "very, very lovely, lovely" from winning.
    """
    words = _words(text)
    n = len(words)
    hits = _share(len({w for w in words if _descriptive(w)}), n, 0.03)
    letters = _share(sum(map(len, words)), n, 4.44)
    return (18 * hits + 0.9 * letters - 6 * _share(_repeats(words), n, 0.014) - 4.43) / 0.527


def clarity(text: str) -> float:
    """Short plain sentences that end, without clutter: the ingredients of Flesch's (1948) reading ease, two-sided.

    Costs: mean sentence length away from 12 words (in log, so fragments cost too), syllables per word, repeated word
    pairs, clutter (brackets, dashes, ellipses, slashes, words in capitals, stray symbols), a text that stops mid-sentence.
    """
    words = _words(text)
    n = len(words)
    unfinished = not text.rstrip("\"')”’ ").endswith((".", "!", "?", "…"))
    sentences = max(1, len(_SENTENCE.findall(text.replace("...", "…"))) + unfinished)
    syllables = _share(sum(max(1, len(_VOWELS.findall(w))) for w in words), n, 1.56)
    clutter = len(_CLUTTER.findall(text))
    cost = abs(np.log(max(n, 1) / sentences / 12)) + 3 * syllables + 0.5 * unfinished
    return -(cost + 6 * _share(_repeats(words), n, 0.014) + 8 * _share(clutter, n, 0.035) - 5.84) / 0.532


def clean_language(text: str) -> float:
    """No swearing, insults, slang or shouting; ties among clean texts are broken by register (mean word length).

    Per word: strong swearing costs 8, mild 3, an insult 2, slang 1, a word in capitals or "!!" 0.5. Register moves the
    score by at most ±0.25 before scaling, less than one mild word among 50.
    """
    words = _words(text)
    n = len(words)
    cost = sum(8 * (_digest(w) in STRONG) + 3 * (w in MILD) + 2 * (w in INSULTS) + (w in SLANG) for w in words)
    cost += 0.5 * len(_SHOUTING.findall(text))
    register = 0.25 * np.tanh(_share(sum(map(len, words)), n, 4.44) - 4.44)
    return (register - 8 * _share(cost, n, 0.005) + 0.05) / 0.147


RULES: dict[str, Callable[[str], float]] = {
    "descriptiveness": descriptiveness,
    "clarity": clarity,
    "clean-language": clean_language,
}
