"""From the policy's token ids to the reward model's, by way of text, and back by way of character offsets.

The two models need not share a tokenizer. What they share is text, so a *span* ``(start, end)`` in characters is the
common coordinate: a token's span holds every character it contributes to. Byte-level BPE may spread one character over
several tokens; those tokens then all have that character's span. A token that adds no text (EOS, ``[CLS]``) has an
empty span where it stands.

``encode_pairs`` is the only way text reaches a reward model, in training as in scoring, so both see the same special
tokens. Knows tokenizers and text. Does not know models, padding of the policy's own batches, or what a score means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_nb_utils.config import CourseError

Span = tuple[int, int]


class TokenizerError(CourseError):
    """A text, a list of ids or a tokenizer that cannot cross the bridge."""


# --- policy ids -> text ---


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor | Sequence[int], mask=None) -> str:
    """The text one response adds to its query, special tokens stripped.

    ids: (T,) int64; mask: (T,) bool, True on a real token, None for all. Left-over bytes of an unfinished character
    become U+FFFD. A SentencePiece decoder drops the space that opens a text; that space separates a response from its
    query, so it is kept. Raises TokenizerError for negative ids or a mask of another length.
    """
    return _text_and_spans(tokenizer, ids, mask, spans=False)[0]


def response_texts(tokenizer: PreTrainedTokenizerBase, responses: Tensor, mask: Tensor) -> list[str]:
    """``response_text`` of each row. responses: (B, T) int64; mask: (B, T) bool."""
    return [response_text(tokenizer, row, real) for row, real in zip(responses, mask, strict=True)]


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Tensor | Sequence[int], mask=None) -> list[Span]:
    """Span of each of the T ids in ``response_text(tokenizer, ids, mask)``; empty for special and masked tokens.

    Starts never decrease, and together the spans cover the whole text.
    """
    return _text_and_spans(tokenizer, ids, mask)[1]


def _text_and_spans(tokenizer, ids, mask, spans: bool = True) -> tuple[str, list[Span]]:
    ids = _as_list(ids)
    mask = [True] * len(ids) if mask is None else _as_list(mask)
    if len(mask) != len(ids):
        raise TokenizerError(f"{len(ids)} ids but a mask of {len(mask)}: pass the mask of the same response")
    stripped = _special_ids(tokenizer)
    kept = [bool(real) and token not in stripped for token, real in zip(ids, mask)]
    if any(token < 0 for token, keep in zip(ids, kept) if keep):
        raise TokenizerError("negative token id (a label's ignore_index?): pass token ids, or mask them out")
    pieces = _byte_pieces(tokenizer, ids)
    if pieces is None:
        if not spans:
            return _continuing(tokenizer)([token for token, keep in zip(ids, kept) if keep]), []
        return _prefix_spans(tokenizer, ids, kept)
    return _byte_spans([piece if keep else b"" for piece, keep in zip(pieces, kept)])


def _as_list(values) -> list:
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if values and isinstance(values[0], list):
        raise TokenizerError("expected the ids of one response, (T,), not a batch: go through it row by row")
    return values


def _special_ids(tokenizer) -> set[int]:
    # all_special_ids knows the named ones only; a tokenizer may hold others (reserved, tool and chat markers).
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _gpt2_byte_table() -> dict[str, int]:
    """Byte-level BPE writes byte b as a printable character: its Latin-1 one, or the next free one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _gpt2_byte_table()


def _byte_pieces(tokenizer, ids: Sequence[int]) -> list[bytes] | None:
    """The bytes each id stands for, or None if the tokenizer is not a byte-level one (Radford et al. 2019, §2.2)."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return None
    # A padded embedding matrix has more rows than the vocabulary: such an id has no token, and decodes to nothing.
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens([max(i, 0) for i in ids])]
    # A token added by hand may hold characters outside the table: the decoder then takes it as plain text.
    return [bytes(map(_BYTE_OF.get, t)) if _BYTE_OF.keys() >= set(t) else t.encode() for t in tokens]


def _byte_spans(pieces: Sequence[bytes]) -> tuple[str, list[Span]]:
    """Text of the joined pieces and each piece's span: from its first byte's character to its last byte's."""
    text, character_of = _decode_utf8(b"".join(pieces))
    ends = list(accumulate(map(len, pieces)))
    starts = [end - len(piece) for end, piece in zip(ends, pieces)]
    spans = []
    for first, end in zip(starts, ends):
        start = character_of[first]
        spans.append((start, character_of[end - 1] + 1 if end > first else start))
    return text, spans


def _decode_utf8(data: bytes) -> tuple[str, list[int]]:
    """Text of ``data`` and, for each byte, the index of its character (one more entry: the length of the text).

    Malformed bytes become one U+FFFD for each maximal subpart (Unicode 15, §3.9), as every tokenizer here does it.
    """
    characters: list[str] = []
    character_of: list[int] = []
    position = 0
    while position < len(data):
        try:
            good, malformed = data[position:].decode(), 0
        except UnicodeDecodeError as error:
            good, malformed = data[position : position + error.start].decode(), error.end - error.start
        sizes = [len(c.encode()) for c in good] + [malformed] * (malformed > 0)
        for size in sizes:
            character_of += [len(characters)] * size
            characters.append(data[position : position + size].decode(errors="replace"))
            position += size
    return "".join(characters), [*character_of, len(characters)]


def _continuing(tokenizer) -> Callable[[Sequence[int]], str]:
    """Decodes ids as what continues a text: behind one known token, or decoders of SentencePiece models take the space off."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = len(decode(anchor))
    return lambda ids: decode([*anchor, *ids])[before:]


def _prefix_spans(tokenizer, ids: Sequence[int], kept: Sequence[bool]) -> tuple[str, list[Span]]:
    """Text and spans for any other tokenizer, from how far the text of each prefix of the ids agrees with the whole.

    Quadratic in T. Right where a prefix decodes to a prefix of the text, give or take an unfinished last character;
    among malformed bytes (byte fallback) the spans still cover the text in order but may be one character too wide.
    """
    decode = _continuing(tokenizer)
    text, prefix, boundary, spans = decode([token for token, keep in zip(ids, kept) if keep]), [], 0, []
    for token, keep in zip(ids, kept):
        if not keep:
            spans.append((boundary, boundary))
            continue
        prefix.append(token)
        partial = decode(prefix)
        agreed = next((i for i, (c, d) in enumerate(zip(partial, text)) if c != d), min(len(partial), len(text)))
        start, boundary = boundary, max(boundary, agreed)
        # Text that later tokens will change is a character begun and not finished: this token has a part in it.
        spans.append((start, min(len(text), boundary + (agreed < len(partial)))))
    return text, spans


# --- text -> reward-model ids ---


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    *,
    causal: bool = False,
) -> dict[str, Tensor]:
    """Reward-model inputs for the texts query + response, padded on the right to the longest row.

    Encoder: the special tokens of the tokenizer's own template. ``causal=True``: BOS if there is one, the text, and
    EOS as the last real token. Text never becomes a special token, not even an ``<s>`` out of a review's HTML.

    A text over ``max_length`` tokens, special ones included, loses its query from the left; a response that is too
    long by itself loses its right end. Pad may be EOS: the mask comes from the lengths, never from ids.

    Returns ``input_ids`` (B, L) and ``attention_mask`` (B, L), int64, 1 on real tokens. Raises TokenizerError for a
    query + response without text, a tokenizer without pad token (encoder) or EOS (causal), no room in max_length.
    """
    pad = _pad_id(tokenizer, causal)
    rows = [ids for ids, _ in _encode_rows(tokenizer, queries, responses, max_length, causal)]
    input_ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def rm_spans(
    tokenizer: PreTrainedTokenizerBase, query: str, response: str, max_length: int, *, causal: bool = False
) -> list[Span]:
    """Spans in query + response of the real tokens that ``encode_pairs`` makes of this pair, in the same order.

    Characters that no span covers are what the reward model does not see: cut off, or dropped by its normaliser.
    """
    _pad_id(tokenizer, causal)
    return _encode_rows(tokenizer, [query], [response], max_length, causal)[0][1]


def _pad_id(tokenizer, causal: bool) -> int:
    if causal and tokenizer.eos_token_id is None:
        raise TokenizerError("tokenizer without EOS: a causal reward model reads its score there; use an encoder")
    pad = tokenizer.pad_token_id
    if pad is None and not causal:
        raise TokenizerError("tokenizer without pad token: pass causal=True if it is a causal model's, or set one")
    return tokenizer.eos_token_id if pad is None else pad


def _encode_rows(tokenizer, queries, responses, max_length, causal) -> list[tuple[list[int], list[Span]]]:
    """Ids and spans of each pair, special tokens added, cut to ``max_length``."""
    texts = _texts(queries, responses)
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(f"{type(tokenizer).__name__} knows no offsets: load the fast tokenizer (tokenizer.json)")
    encoded = tokenizer(
        texts,
        add_special_tokens=not causal,
        split_special_tokens=True,
        truncation=False,
        padding=False,
        verbose=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    rows = []
    for i, (query, text) in enumerate(zip(queries, texts)):
        ids, offsets = encoded["input_ids"][i], encoded["offset_mapping"][i]
        own = [k for k, special in enumerate(encoded["special_tokens_mask"][i]) if not special]
        first, end = (own[0], own[-1] + 1) if own else (len(ids), len(ids))
        before, body, after = ids[:first], ids[first:end], ids[end:]
        if causal:
            before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            after = [tokenizer.eos_token_id]
        spans = _body_spans(tokenizer, text, body, offsets[first:end])
        rows.append(_fit(before, body, after, spans, text, len(query), max_length))
    return rows


def _fit(before, body, after, spans, text: str, query_length: int, max_length: int) -> tuple[list[int], list[Span]]:
    """One row of at most ``max_length`` tokens: special tokens stay, the query goes first, from its left."""
    room = max_length - len(before) - len(after)
    if room < 1:
        raise TokenizerError(f"max_length={max_length} leaves no room beside the special tokens: raise it")
    kept = _kept(spans, query_length, room)
    ids, spans = before + body[kept] + after, spans[kept]
    if not ids:
        raise TokenizerError(f"no token is left of {text[:40]!r}: the tokenizer drops all of its characters")
    start, stop = (spans[0][0], spans[-1][1]) if spans else (len(text), len(text))
    return ids, [(start, start)] * len(before) + spans + [(stop, stop)] * len(after)


def _texts(queries, responses) -> list[str]:
    if isinstance(queries, str) or isinstance(responses, str):
        raise TokenizerError("queries and responses are lists of texts: put a single text in a list")
    if len(queries) != len(responses) or not len(queries):
        raise TokenizerError(f"{len(queries)} queries and {len(responses)} responses: pass as many of one as the other")
    texts = [query + response for query, response in zip(queries, responses)]
    for i, text in enumerate(texts):
        if not text.strip():
            raise TokenizerError(f"pair {i} has no text: query + response must hold more than white space")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise TokenizerError(f"pair {i} holds half a surrogate pair, not text: read the file as UTF-8")
    return texts


def _body_spans(tokenizer, text: str, ids: list[int], offsets: list[Span]) -> list[Span]:
    """Spans of the text's own tokens: the backend's offsets, except for byte-level BPE, where some backends trim the
    white space off (RoBERTa's does) and leave a token of nothing else without characters. A byte-level tokenizer that
    normalises (Qwen's, NFC) or puts a space in front decodes to another text; there the offsets stay."""
    pieces = _byte_pieces(tokenizer, ids)
    if pieces is not None:
        decoded, spans = _byte_spans(pieces)
        if decoded == text:
            return spans
    return [tuple(span) for span in offsets]


def _kept(spans: Sequence[Span], query_length: int, room: int) -> slice:
    """Which tokens fit into ``room``: the query's left goes first, then the response's right.

    A token that holds characters of both belongs to the response.
    """
    first_response = next((i for i, (_, end) in enumerate(spans) if end > query_length), len(spans))
    if len(spans) - first_response > room:
        return slice(first_response, first_response + room)
    return slice(max(0, len(spans) - room), len(spans))


# --- between the two ---


def align(policy_spans: Sequence[Span], rm_spans: Sequence[Span]) -> list[list[int]]:
    """For each policy token, the reward-model tokens with which it shares a character. Swap the arguments for the
    way back. Both in characters of the same text; a token with an empty span shares none."""
    return [
        [j for j, (other, other_end) in enumerate(rm_spans) if max(start, other) < min(end, other_end)]
        for start, end in policy_spans
    ]


class Segment(NamedTuple):
    """A shortest piece of text that both tokenizers cut out whole: one colour in a picture of the two."""

    span: Span
    policy: tuple[int, ...]
    rm: tuple[int, ...]


@dataclass(frozen=True)
class AlignedPair:
    """One query and response as policy and reward model see it. All spans are in characters of ``text``.

    ``policy_*`` are the response's real tokens (EOS included, empty span); ``rm_*`` those of query + response, special
    tokens included. ``*_pieces`` is what to show for a token: its characters (tokens that share one character all show it), or
    its name where it has none.
    """

    text: str
    query_length: int
    policy_ids: tuple[int, ...]
    policy_spans: tuple[Span, ...]
    policy_pieces: tuple[str, ...]
    rm_ids: tuple[int, ...]
    rm_spans: tuple[Span, ...]
    rm_pieces: tuple[str, ...]

    @property
    def policy_to_rm(self) -> list[list[int]]:
        """For each policy token, the reward-model tokens that share a character with it."""
        return align(self.policy_spans, self.rm_spans)

    @property
    def rm_to_policy(self) -> list[list[int]]:
        """For each reward-model token, the policy tokens that share a character with it."""
        return align(self.rm_spans, self.policy_spans)

    @property
    def segments(self) -> list[Segment]:
        """The shortest pieces of text at whose ends no token of either side is cut, from left to right."""
        merged: list[list[int]] = []
        for start, end in sorted(span for span in self.policy_spans + self.rm_spans if span[0] < span[1]):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        sides = (self.policy_spans, self.rm_spans)
        return [
            Segment((a, b), *(tuple(i for i, (s, e) in enumerate(spans) if a <= s < e <= b) for spans in sides))
            for a, b in merged
        ]


def align_response(
    policy_tokenizer: PreTrainedTokenizerBase,
    rm_tokenizer: PreTrainedTokenizerBase,
    query: str,
    response_ids: Tensor | Sequence[int],
    mask=None,
    *,
    max_length: int,
    causal: bool = False,
) -> AlignedPair:
    """The bridge for one response. response_ids: (T,) int64; mask: (T,) bool; the rest as for ``encode_pairs``."""
    ids = _as_list(response_ids)
    if mask is not None:
        _text_and_spans(policy_tokenizer, ids, mask)  # raises for a mask of another length
        ids = [token for token, real in zip(ids, _as_list(mask)) if real]
    response, spans = _text_and_spans(policy_tokenizer, ids, None)
    spans = [(start + len(query), end + len(query)) for start, end in spans]
    _pad_id(rm_tokenizer, causal)
    rm_ids, read = _encode_rows(rm_tokenizer, [query], [response], max_length, causal)[0]
    return AlignedPair(
        text=query + response,
        query_length=len(query),
        policy_ids=tuple(ids),
        policy_spans=tuple(spans),
        policy_pieces=_pieces(policy_tokenizer, query + response, ids, spans),
        rm_ids=tuple(rm_ids),
        rm_spans=tuple(read),
        rm_pieces=_pieces(rm_tokenizer, query + response, rm_ids, read),
    )


def _pieces(tokenizer, text: str, ids: Sequence[int], spans: Sequence[Span]) -> tuple[str, ...]:
    names = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    return tuple(text[start:end] or name or "" for name, (start, end) in zip(names, spans))
