"""The tokenizer bridge, on the embedded tokenizers and (marked `mirror`) on GPT-2's, RoBERTa's and BERT's own."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlhf_nb_utils.config import DATA, CourseError
from rlhf_nb_utils.tokenizer_bridge import (
    AlignedPair,
    _prefix_spans,
    align,
    align_response,
    encode_pairs,
    response_text,
    response_texts,
    rm_spans,
    token_spans,
)

GPT2 = pytest.param("openai-community/gpt2", marks=pytest.mark.mirror)
ROBERTA = pytest.param("FacebookAI/roberta-base", marks=pytest.mark.mirror)
BERT = pytest.param("google-bert/bert-base-uncased", marks=pytest.mark.mirror)
BYTE_LEVEL = ["tiny-gpt2", GPT2]
WORDPIECE = ["tiny-bert", "tiny-judge", BERT]
ENCODERS = [*WORDPIECE, ROBERTA]
EVERY = [*BYTE_LEVEL, *ENCODERS]

policies = pytest.mark.parametrize("policy", BYTE_LEVEL)
encoders = pytest.mark.parametrize("encoder", ENCODERS)
every = pytest.mark.parametrize("name", EVERY)

# Seeds fixed: a test that passes today passes tomorrow. Raise max_examples to search for more.
search = settings(deadline=None, max_examples=int(os.environ.get("RLHF_NB_EXAMPLES", "50")), derandomize=True)

NASTY = """great| film|the|un|believ|able| 10/10|!|é|e\u0301|\u0301|q\u0323\u0307|ñ|👍|👍🏽|👨\u200d👩\u200d👧|🏳\ufe0f\u200d🌈|🇫🇷
|<br />|<b>|&amp;|&#39;|<s>|</s>|<mask>|<pad>|<|endoftext|>|[SEP]|[UNK]|[MASK]|\t|\r\n|  |\u00a0|\u2028|\x00|\x07|\x1b|\x85
|\u200b|\ufeff|\u202e|\xad|中文|한국|가|日|ﬁ|İ|ß|½|'s| n't|\ufffd|\ue000|\U0010ffff|—|“|…"""
NASTY = [piece for line in NASTY.split("\n") for piece in line.split("|") if piece] + ["\n", "\n\n", " ", "<|endoftext|>"]
texts = st.lists(st.sampled_from(NASTY) | st.text(max_size=3), max_size=8).map("".join)
pairs = st.tuples(texts, texts).filter(lambda pair: (pair[0] + pair[1]).strip())


@functools.cache
def load(name):
    if "/" not in name:
        return AutoTokenizer.from_pretrained(DATA / "models" / name)
    mirror = Path(os.environ.get("RLHF_NB_MIRROR") or "/nowhere")
    folder = (mirror if mirror.is_absolute() else DATA.parent / mirror) / name
    if not folder.is_dir():
        # In CI a missing mirror is a fault to be seen, not a reason to test less.
        stop = pytest.fail if os.environ.get("CI", "").lower() in ("1", "true") else pytest.skip
        stop(f"{name} is not in RLHF_NB_MIRROR")
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def llama():
    """A SentencePiece-style tokenizer: transformers' own Llama class (byte fallback, ▁ for a space, which decoding
    strips off the front) with a vocabulary of a few merges."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = ["▁ f", "▁f i", "▁fi l", "▁fil m", "g r", "gr e", "a t", "gre at", "▁ great", "▁ ▁"]
    for piece in [*"▁abcdefghilmnorstu!é", *(merge.replace(" ", "") for merge in merges)]:
        vocab.setdefault(piece, len(vocab))
    return LlamaTokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])


def ids_of(tokenizer, text):
    """Ids of ordinary text: no template, and nothing in it read as a special token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def offsets_of(tokenizer, text):
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
    return encoded["offset_mapping"]


def byte_ids(tokenizer, data):
    """One token for each byte: every byte-level vocabulary has all 256."""
    return [tokenizer.convert_tokens_to_ids(bytes_to_unicode()[byte]) for byte in data]


def covered(spans):
    return {i for start, end in spans for i in range(start, end)}


def assert_cover_in_order(spans, text):
    assert covered(spans) == set(range(len(text)))
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    assert all(0 <= start <= end <= len(text) for start, end in spans)


# --- policy ids -> text ---


@policies
@search
@given(text=texts)
def test_response_text_is_the_text_that_was_encoded(policy, text):
    assert response_text(load(policy), ids_of(load(policy), text)) == text


@policies
def test_response_text_strips_special_tokens_and_masked_ids(policy):
    tokenizer = load(policy)
    eos = tokenizer.eos_token_id
    ids = ids_of(tokenizer, " I 'd see it again .")
    assert response_text(tokenizer, [eos, *ids, eos, eos]) == " I 'd see it again ."
    rows = torch.tensor([[*ids, eos, *ids], [*ids, *ids, eos]])
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[0, : len(ids) + 1] = True  # EOS is real; what stands behind it is not, whatever its id
    mask[1] = True
    assert response_texts(tokenizer, rows, mask) == [" I 'd see it again .", " I 'd see it again ." * 2]
    assert response_text(tokenizer, [eos]) == ""
    assert response_text(tokenizer, []) == ""


def test_special_tokens_without_a_name_are_stripped_too():
    tokenizer = copy.deepcopy(load("tiny-gpt2"))
    tokenizer.backend_tokenizer.add_special_tokens(["<|turn|>"])  # as a tokenizer.json with reserved tokens has them
    tokenizer.add_tokens(["<plot twist é>"])  # an ordinary added token is text, also where it has a blank and an accent
    turn, twist = tokenizer.convert_tokens_to_ids(["<|turn|>", "<plot twist é>"])
    assert turn not in tokenizer.all_special_ids
    ids = [turn, *byte_ids(tokenizer, b"a"), twist]
    assert response_text(tokenizer, ids) == "a<plot twist é>"
    assert token_spans(tokenizer, ids) == [(0, 0), (0, 1), (1, 15)]


@policies
@search
@given(text=texts)
def test_policy_spans_are_the_backends_offsets(policy, text):
    tokenizer = load(policy)
    assert token_spans(tokenizer, ids_of(tokenizer, text)) == offsets_of(tokenizer, text)


@policies
def test_tokens_inside_one_character_share_its_span(policy):
    tokenizer = load(policy)
    eos = tokenizer.eos_token_id
    data = b"a" + "é".encode() + "€".encode()[:2] + b"A" + b"\xff\xc3" + "😀".encode()[:3]
    ids = byte_ids(tokenizer, data)
    assert response_text(tokenizer, ids) == "aé\ufffdA\ufffd\ufffd\ufffd"
    shared = [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (6, 7), (6, 7)]
    assert token_spans(tokenizer, ids) == shared
    # A stripped token between the two halves of é adds nothing and does not part them.
    assert token_spans(tokenizer, [eos, *ids[:2], eos, ids[2], eos]) == [(0, 0), (0, 1), (1, 2), (1, 1), (1, 2), (2, 2)]
    assert token_spans(tokenizer, ids[:3], [True, False, True]) == [(0, 1), (1, 1), (1, 2)]


def spans_of_bytes(pieces):
    """Decode up to each byte in turn: it belongs to the last character there is then, finished or not."""
    data, spans = b"", []
    for piece in pieces:
        touched = []
        for byte in piece:
            data += bytes([byte])
            touched.append(len(data.decode(errors="replace")) - 1)
        spans.append((touched[0], touched[-1] + 1))
    return spans


@policies
@search
@given(data=st.data())
def test_any_ids_at_all_decode_as_the_tokenizer_does_and_have_spans(policy, data):
    """A sampler may stop anywhere, also inside a character, and a padded embedding has ids that no token has."""
    tokenizer = load(policy)
    some_bytes = st.binary(max_size=6).map(lambda b: byte_ids(tokenizer, b))
    some_ids = st.lists(st.integers(0, len(tokenizer) + 5), max_size=6)
    some_text = texts.map(lambda text: ids_of(tokenizer, text))
    cut = st.tuples(some_text, st.integers(0, 5), st.integers(0, 5)).map(lambda x: x[0][x[1] : max(0, len(x[0]) - x[2])])
    ids = [i for part in data.draw(st.lists(some_bytes | some_ids | cut, max_size=4)) for i in part]
    text = response_text(tokenizer, torch.tensor(ids, dtype=torch.int64))
    assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spans = token_spans(tokenizer, ids)
    assert_cover_in_order(spans, text)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    real = [(i, span) for i, span in zip(ids, spans, strict=True) if i not in tokenizer.all_special_ids]
    tokens = [tokenizer.convert_ids_to_tokens(i) or "" for i, _ in real]
    found = [span for token, (_, span) in zip(tokens, real) if token]  # where an empty span stands is shown by hand above
    assert found == spans_of_bytes([bytes(byte_of[c] for c in token) for token in tokens if token])


@policies
@search
@given(text=texts)
def test_prefix_decoding_finds_the_spans_that_bytes_give(policy, text):
    """Two algorithms with nothing in common; a U+FFFD in the text itself is the known limit of prefix decoding."""
    assume("\ufffd" not in text)
    tokenizer = load(policy)
    ids = [tokenizer.eos_token_id, *ids_of(tokenizer, text)]
    kept = [False] + [True] * (len(ids) - 1)
    assert _prefix_spans(tokenizer, ids, kept) == (text, [(0, 0), *offsets_of(tokenizer, text)])


def test_a_sentencepiece_response_keeps_the_space_that_parts_it_from_its_query():
    tokenizer = llama()
    ids = tokenizer("great film", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁great", "▁film"]
    assert tokenizer.decode(ids[1:]) == "film"  # what makes it necessary
    assert response_text(tokenizer, [*ids[1:], tokenizer.eos_token_id]) == " film"
    assert token_spans(tokenizer, [*ids[1:], tokenizer.eos_token_id]) == [(0, 5), (5, 5)]


def test_byte_fallback_tokens_share_their_character():
    tokenizer = llama()
    ids = tokenizer("great€ film", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁great", "<0xE2>", "<0x82>", "<0xAC>", "▁film"]
    assert token_spans(tokenizer, ids[1:]) == [(0, 1), (0, 1), (0, 1), (1, 6)]


@search
@given(text=texts, cut=st.integers(1, 4), end=st.integers(0, 3))
def test_sentencepiece_spans_are_the_backends_offsets_behind_any_query(text, cut, end):
    assume("\ufffd" not in text and "▁" not in text)
    tokenizer = llama()
    text = "great" + text
    ids, offsets = ids_of(tokenizer, text), offsets_of(tokenizer, text)
    begun = offsets[cut - 1][1] if cut <= len(offsets) else len(text)
    if cut >= len(ids) or offsets[cut][0] == begun:  # the query ends at the end of a character
        assert response_text(tokenizer, ids[cut:]) == text[begun:]
        assert token_spans(tokenizer, ids[cut:]) == [(a - begun, b - begun) for a, b in offsets[cut:]]
    part = ids[cut : len(ids) - end]
    assert_cover_in_order(token_spans(tokenizer, part), response_text(tokenizer, part))


# --- text -> reward-model ids ---


def row(batch, i=0):
    return batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()


@encoders
@search
@given(pair=pairs)
def test_encoding_is_that_of_the_concatenated_text(encoder, pair):
    tokenizer = load(encoder)
    expected = tokenizer(pair[0] + pair[1], split_special_tokens=True)["input_ids"]
    assert row(encode_pairs(tokenizer, [pair[0]], [pair[1]], 512)) == expected


@encoders
def test_encoder_gets_the_special_tokens_of_its_own_template(encoder):
    tokenizer = load(encoder)
    ids = row(encode_pairs(tokenizer, ["A film that"], [" I loved."], 64))
    assert ids == tokenizer("A film that I loved.")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@policies
@search
@given(pair=pairs)
def test_causal_encoding_is_bos_text_eos(policy, pair):
    tokenizer = load(policy)
    ids = row(encode_pairs(tokenizer, [pair[0]], [pair[1]], 1024, causal=True))
    assert ids == [tokenizer.bos_token_id, *ids_of(tokenizer, pair[0] + pair[1]), tokenizer.eos_token_id]


def test_causal_encoding_without_bos_starts_with_the_text():
    tokenizer = copy.deepcopy(load("tiny-gpt2"))
    tokenizer.bos_token = None
    ids = row(encode_pairs(tokenizer, ["the"], [" film"], 32, causal=True))
    assert ids == [*ids_of(tokenizer, "the film"), tokenizer.eos_token_id]


@every
@pytest.mark.parametrize("markup", ["<s>", "</s>", "<pad>", "<mask>", "<|endoftext|>", "[CLS]", "[SEP]", "[PAD]"])
def test_text_never_becomes_a_special_token(name, markup):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    plain = row(encode_pairs(tokenizer, ["a"], [" b"], 64, causal=causal))
    marked = row(encode_pairs(tokenizer, [f"a {markup}"], [f" b{markup}"], 64, causal=causal))
    assert sum(i in special for i in marked) == sum(i in special for i in plain) == 2


@every
@search
@given(batch=st.lists(pairs, min_size=2, max_size=5), max_length=st.integers(4, 40))
def test_a_row_does_not_depend_on_the_rest_of_its_batch(name, batch, max_length):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    queries, responses = zip(*batch)
    together = encode_pairs(tokenizer, queries, responses, max_length, causal=causal)
    reverse = encode_pairs(tokenizer, queries[::-1], responses[::-1], max_length, causal=causal)
    alone = [row(encode_pairs(tokenizer, [q], [r], max_length, causal=causal)) for q, r in batch]
    assert [row(together, i) for i in range(len(batch))] == alone
    assert [row(reverse, i) for i in range(len(batch))] == alone[::-1]
    mask = together["attention_mask"]
    assert mask.dtype == together["input_ids"].dtype == torch.int64
    assert mask.shape[1] == mask.sum(1).max()  # no column without a real token
    assert (mask.diff(dim=1) <= 0).all()  # padded on the right


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "!"])
def test_pad_is_never_taken_for_a_real_token_nor_eos_for_pad(pad):
    """Whatever the pad id, and although the texts hold it: the last real token is EOS and every '!' is real."""
    tokenizer = copy.deepcopy(load("tiny-gpt2"))
    tokenizer.pad_token = pad
    responses = [" film!!!", " film", " film that goes on and on and on!"]
    batch = encode_pairs(tokenizer, ["the"] * 3, responses, 64, causal=True)
    lengths = [len(ids_of(load("tiny-gpt2"), "the" + response)) + 2 for response in responses]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert [batch["input_ids"][i, n - 1].item() for i, n in enumerate(lengths)] == [tokenizer.eos_token_id] * 3
    padding = batch["input_ids"][~batch["attention_mask"].bool()]
    assert (padding == (tokenizer.eos_token_id if pad is None else tokenizer.pad_token_id)).all()


@every
def test_a_long_query_is_cut_from_its_left(name):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    query, response = "one two three four five six seven eight", " nine ten"
    body, extra = ids_of(tokenizer, query + response), 2
    n_response = len(body) - len(ids_of(tokenizer, query))
    for room in range(n_response, len(body) + 2):
        ids = row(encode_pairs(tokenizer, [query], [response], room + extra, causal=causal))
        assert ids[1:-1] == body[-room:]
        whole = row(encode_pairs(tokenizer, [query], [response], 64, causal=causal))
        assert (ids[0], ids[-1]) == (whole[0], whole[-1])


@every
def test_a_response_too_long_by_itself_loses_its_right_end(name):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    query, response = "one two", " three four five six seven"
    body = ids_of(tokenizer, query + response)
    n_query = len(ids_of(tokenizer, query))
    for room in range(1, len(body) - n_query):
        ids = row(encode_pairs(tokenizer, [query], [response], room + 2, causal=causal))
        assert ids[1:-1] == body[n_query : n_query + room]
        assert ids[-1] == (tokenizer.eos_token_id if causal else tokenizer.sep_token_id)


@every
def test_a_token_of_both_query_and_response_is_kept_with_the_response(name):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    body = ids_of(tokenizer, "I saw this film again")
    film = ids_of(tokenizer, "I saw this film")[-1]
    assert body[body.index(film) :] == [film, *ids_of(tokenizer, " again")]
    ids = row(encode_pairs(tokenizer, ["I saw this fi"], ["lm again"], 3, causal=causal))
    assert ids[1:-1] == [film]


@every
@search
@given(pair=pairs, max_length=st.integers(3, 24))
def test_cut_rows_keep_special_tokens_and_give_up_the_query_first(name, pair, max_length):
    tokenizer, (query, response) = load(name), pair
    causal = tokenizer.pad_token is None
    batch = encode_pairs(tokenizer, [query], [response], max_length, causal=causal)
    whole = row(encode_pairs(tokenizer, [query], [response], 10_000, causal=causal))
    ids, spans = row(batch), rm_spans(tokenizer, query, response, max_length, causal=causal)
    every_span = rm_spans(tokenizer, query, response, 10_000, causal=causal)
    assert len(ids) == len(spans) == min(max_length, len(whole))
    assert (ids[0], ids[-1]) == (whole[0], whole[-1])
    n_response = sum(end > max(start, len(query)) for start, end in every_span[1:-1])
    n_response_kept = sum(end > max(start, len(query)) for start, end in spans[1:-1])
    assert n_response_kept == min(n_response, max_length - 2)
    body = list(zip(ids, spans))[1:-1]
    full = list(zip(whole, every_span))[1:-1]
    assert any(full[i : i + len(body)] == body for i in range(len(full) + 1))  # one unbroken run


# --- offsets in the reward model's text ---


def wordpiece_drops(character):
    """BERT's normaliser (Devlin et al. 2019) removes controls, formats, unassigned, U+FFFD, and marks once split off."""
    marks = all(unicodedata.category(c) == "Mn" for c in unicodedata.normalize("NFD", character))
    return marks or unicodedata.category(character).startswith("C") or character == "\ufffd"


@every
@search
@given(pair=pairs)
def test_every_visible_character_belongs_to_a_reward_model_token(name, pair):
    tokenizer, text = load(name), pair[0] + pair[1]
    causal = tokenizer.pad_token is None
    spans = rm_spans(tokenizer, *pair, 10_000, causal=causal)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    wordpiece = "##a" in tokenizer.get_vocab()
    must = {i for i, c in enumerate(text) if not wordpiece or not (c.isspace() or wordpiece_drops(c))}
    assert must <= covered(spans) <= set(range(len(text)))
    assert spans[0][0] == spans[0][1] and spans[-1][0] == spans[-1][1]  # special tokens have no characters


@pytest.mark.parametrize("encoder", WORDPIECE)
@search
@given(pair=pairs)
def test_a_wordpiece_token_stands_in_the_text_of_its_span(encoder, pair):
    tokenizer, text = load(encoder), pair[0] + pair[1]
    ids, spans = row(encode_pairs(tokenizer, [pair[0]], [pair[1]], 10_000)), rm_spans(tokenizer, *pair, 10_000)
    for token, (start, end) in list(zip(tokenizer.convert_ids_to_tokens(ids), spans))[1:-1]:
        normalised = tokenizer.backend_tokenizer.normalizer.normalize_str(text[start:end])
        assert token == tokenizer.unk_token or token.removeprefix("##") in normalised


@functools.cache
def trimming():
    """tiny-gpt2 with offsets trimmed as RoBERTa's are."""
    tokenizer = copy.deepcopy(load("tiny-gpt2"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return tokenizer


@pytest.mark.parametrize("encoder", [None, ROBERTA])
@search
@given(pair=pairs)
def test_byte_level_spans_are_the_backends_with_the_white_space_left_on(encoder, pair):
    tokenizer, text = load(encoder) if encoder else trimming(), pair[0] + pair[1]
    spans = rm_spans(tokenizer, *pair, 10_000, causal=not encoder)[1:-1]
    for (start, end), (trimmed, trimmed_end) in zip(spans, offsets_of(tokenizer, text), strict=True):
        if trimmed < trimmed_end and not text[trimmed:trimmed_end].isspace():
            assert start <= trimmed < trimmed_end <= end
            assert set(text[start:trimmed] + text[trimmed_end:end]) <= {" "}
        else:  # where the backend leaves nothing, there is white space
            assert start < end and text[start:end].isspace()


def test_spans_of_a_byte_level_tokenizer_that_normalises_are_in_the_text_as_given():
    tokenizer = copy.deepcopy(load("tiny-gpt2"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("&", "and")
    spans = rm_spans(tokenizer, "A", " & B", 100, causal=True)
    assert_cover_in_order(spans, "A & B")
    assert spans[0] == (0, 0) and spans[-2:] == [(3, 5), (5, 5)]


@every
def test_spans_of_a_cut_pair_point_into_the_whole_text(name):
    tokenizer = load(name)
    causal = tokenizer.pad_token is None
    query, response = "one two three four", " film"
    spans = rm_spans(tokenizer, query, response, 3, causal=causal)
    text = query + response
    assert [text[a:b].strip() for a, b in spans] == ["", "film", ""]
    assert spans[0] == (spans[1][0],) * 2 and spans[2] == (len(text),) * 2


# --- between the two ---

span_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)).map(lambda x: (x[0], x[0] + x[1])), max_size=6)


@search
@given(one=span_lists, other=span_lists)
def test_tokens_are_aligned_when_they_share_a_character_and_both_ways(one, other):
    forth, back = align(one, other), align(other, one)
    shared = {(i, j) for i, a in enumerate(one) for j, b in enumerate(other) if covered([a]) & covered([b])}
    assert {(i, j) for i, js in enumerate(forth) for j in js} == shared
    assert {(i, j) for j, js in enumerate(back) for i in js} == shared


def test_segments_are_the_pieces_both_tokenizers_cut_whole():
    pair = AlignedPair(
        text="A bad café.",
        query_length=1,
        policy_ids=(1, 2, 3, 4, 5, 6),
        policy_spans=((1, 5), (5, 9), (9, 10), (9, 10), (10, 11), (11, 11)),
        policy_pieces=(" bad", " caf", "é", "é", ".", "<eos>"),
        rm_ids=(7, 8, 9, 10, 11, 12),
        rm_spans=((0, 0), (0, 1), (2, 5), (6, 8), (8, 10), (10, 11)),
        rm_pieces=("[CLS]", "A", "bad", "ca", "fé", "."),
    )
    assert pair.policy_to_rm == [[2], [3, 4], [4], [4], [5], []]
    assert pair.rm_to_policy == [[], [], [0], [1], [1, 2, 3], [4]]
    assert pair.segments == [
        ((0, 1), (), (1,)),
        ((1, 5), (0,), (2,)),
        ((5, 10), (1, 2, 3), (3, 4)),
        ((10, 11), (4,), (5,)),
    ]


@policies
@encoders
@search
@given(query=texts.filter(str.strip), response=texts, lost=st.integers(0, 2), max_length=st.sampled_from([6, 500]))
def test_bridge_places_every_policy_token_in_the_reward_models_text(policy, encoder, query, response, lost, max_length):
    writer, reader = load(policy), load(encoder)
    ids = ids_of(writer, response)
    ids = [*ids[: max(0, len(ids) - lost)], writer.eos_token_id]
    mask = [True] * len(ids) + [False] * 2
    pair = align_response(writer, reader, query, torch.tensor(ids + ids[:1] * 2), torch.tensor(mask), max_length=max_length)
    answer = writer.decode(ids, skip_special_tokens=True)
    assert pair.text == query + answer and pair.query_length == len(query)
    assert list(pair.policy_ids) == ids and pair.policy_spans[-1] == (len(pair.text),) * 2
    assert list(pair.rm_ids) == row(encode_pairs(reader, [query], [answer], max_length))
    assert_cover_in_order([(a - len(query), b - len(query)) for a, b in pair.policy_spans], answer)
    seen = covered(pair.rm_spans)
    for (start, end), rm in zip(pair.policy_spans, pair.policy_to_rm, strict=True):
        assert bool(rm) == bool(seen & set(range(start, end)))
    assert pair.policy_pieces[-1] == writer.eos_token and pair.rm_pieces[0] == reader.cls_token
    assert "" not in pair.policy_pieces + pair.rm_pieces


@policies
@encoders
@search
@given(query=texts.filter(str.strip), response=texts)
def test_segments_part_the_text_where_no_token_is_cut(policy, encoder, query, response):
    writer, reader = load(policy), load(encoder)
    pair = align_response(writer, reader, query, ids_of(writer, response), max_length=500)
    spans = [segment.span for segment in pair.segments]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert covered(spans) == covered(pair.policy_spans + pair.rm_spans)
    tokens = [("policy", i, s) for i, s in enumerate(pair.policy_spans)] + [("rm", i, s) for i, s in enumerate(pair.rm_spans)]
    for segment in pair.segments:
        inside = [(side, i) for side, i, s in tokens if covered([s]) & covered([segment.span])]
        assert inside == [("policy", i) for i in segment.policy] + [("rm", i) for i in segment.rm]
        for position in range(segment.span[0] + 1, segment.span[1]):  # a shorter piece would cut a token
            assert any(start < position < end for _, _, (start, end) in tokens)


@policies
def test_a_tokenizer_is_aligned_with_itself_token_by_token(policy):
    tokenizer = load(policy)
    ids = ids_of(tokenizer, "A quiet little film, wasn't it?\n\nYes.")
    pair = align_response(tokenizer, tokenizer, "", [*ids, tokenizer.eos_token_id], max_length=100, causal=True)
    assert pair.policy_to_rm == [[i + 1] for i in range(len(ids))] + [[]]


# --- bad input: one line, says what to do ---


def fails(message, call, *args, **kwargs):
    with pytest.raises(CourseError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_bad_input_gets_one_clear_line():
    bert, gpt2 = load("tiny-bert"), load("tiny-gpt2")
    for empty in [("", ""), (" ", "\n")]:
        fails("pair 1 has no text", encode_pairs, bert, ["a", empty[0]], ["b", empty[1]], 16)
    fails("no text", align_response, gpt2, bert, "", [gpt2.eos_token_id], max_length=16)
    fails("without pad token: pass causal=True", encode_pairs, gpt2, ["a"], ["b"], 16)
    fails("without pad token", rm_spans, gpt2, "a", "b", 16)
    fails("without EOS", encode_pairs, bert, ["a"], ["b"], 16, causal=True)
    fails("without EOS", align_response, gpt2, bert, "a", [5], max_length=16, causal=True)
    fails("leaves no room", encode_pairs, bert, ["a"], ["b"], 2)
    fails("put a single text in a list", encode_pairs, bert, "ab", "cd", 16)
    fails("2 queries and 1 responses", encode_pairs, bert, ["a", "b"], ["c"], 16)
    fails("0 queries and 0 responses", encode_pairs, bert, [], [], 16)
    fails("surrogate", encode_pairs, bert, ["a"], ["\ud83d"], 16)
    fails("row by row", response_text, gpt2, torch.tensor([[1, 2]]))
    fails("a mask of 1", token_spans, gpt2, [1, 2], [True])
    fails("a mask of 1", align_response, gpt2, bert, "a", [1, 2], [True], max_length=16)
    fails("negative token id", response_text, gpt2, [1, -100])
    assert response_text(gpt2, [*byte_ids(gpt2, b"a"), -100], [True, False]) == "a"
    bare = copy.deepcopy(bert)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fails("no token is left", encode_pairs, bare, ["\x07"], [""], 16)
    fails("load the fast tokenizer", encode_pairs, SimpleNamespace(is_fast=False, pad_token_id=0), ["a"], ["b"], 16)


def test_an_empty_response_and_a_query_without_words_are_not_errors():
    """A policy may sample EOS at once; a reward model must score that too."""
    bert = load("tiny-bert")
    assert row(encode_pairs(bert, ["A film"], [""], 16)) == bert("A film")["input_ids"]
    assert row(encode_pairs(bert, ["\x07"], [""], 16)) == [bert.cls_token_id, bert.sep_token_id]


def test_encoding_does_not_change_the_tokenizer():
    tokenizer = copy.deepcopy(load("tiny-bert"))
    before = tokenizer("a [SEP] b")["input_ids"]
    encode_pairs(tokenizer, ["a [SEP]"], [" b"], 8)
    assert tokenizer("a [SEP] b")["input_ids"] == before


def test_a_text_alone_takes_one_decode_and_not_one_for_each_token(monkeypatch):
    """The spans of a tokenizer that is not byte-level take T decodes of growing prefixes: too many for every rollout."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "tiny-bert")
    ids = tokenizer("the film was far too long and i liked it", add_special_tokens=False)["input_ids"]
    calls, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    text = response_text(tokenizer, ids)
    assert len(calls) <= 2
    token_spans(tokenizer, ids)
    assert len(calls) > len(ids) and text.split() == ["the", "film", "was", "far", "too", "long", "and", "i", "liked", "it"]
