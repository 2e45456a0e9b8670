"""Make every file of data/ from IMDb: tokenizers, four small models and the sampled reviews.

    python data/build.py --calibrate            tokens/s of each training first, and the time it will take
    python data/build.py [--only lm bert ...]   make them, or the named ones
    python data/build.py --rung lm-16m          a base of another size for the ladder, in runs/build/
    python data/build.py --evaluate             every figure of data/README.md, with its protocol

No text of IMDb is written to data/. What is written there: weights trained on IMDb, tokenizers' vocabularies, and
reviews sampled from a language model, from which every sample sharing 12 consecutive words with IMDb is dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.linalg import svds
from scipy.special import expit
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from rlhf_nb_utils.config import RolloutsConfig
from rlhf_nb_utils.data import Review, clean_text, deal, imdb_roles, short_review
from rlhf_nb_utils.models import Policy, load_classifier, load_policy, load_tokenizer
from rlhf_nb_utils.ngrams import fit_classifier
from rlhf_nb_utils.rollouts import sample_many
from rlhf_nb_utils.tokenizer_bridge import response_texts

ROOT = Path(__file__).resolve().parent
MODELS = ROOT / "models"
WORK = ROOT.parent / "runs" / "build"
FIGURES = ROOT / "figures.json"
SEED = 0
EOT = "<|endoftext|>"
WINDOW = 128  # context of tiny-gpt2
# Attention is "eager" in training: on a CPU, at these lengths, the fused kernel's backward takes half of the step.

LADDER = {
    "lm-1m": {"width": 128, "layers": 4, "tokenizer": "tiny-gpt2", "tokens": 6_000_000},
    "lm-16m": {"width": 512, "layers": 4, "tokenizer": "tiny-gpt2", "tokens": 3_000_000},
    "lm-gpt2-tokens": {"width": 256, "layers": 4, "tokenizer": "openai-community/gpt2", "tokens": 2_000_000},
}
LM = {"tokens": 33_000_000, "batch": 32, "lr_matrix": 0.02, "lr_rest": 3e-3, "warmup": 100, "decay": 0.45}
BERT = {
    "steps": 5_000,
    "batch": 48,
    "length": 64,
    "lr": 1.5e-3,
    "warmup": 200,
    "mask": 0.15,
    "temperature": 0.07,
    "contrast": 0.5,
}
JUDGE = {"steps": 5_500, "batch": 48, "lr_matrix": 0.01, "lr_rest": 1e-3, "warmup": 200, "windows": (32, 64, 128, 256)}
SHARES = (0.2, 0.35, 0.15, 0.3)  # how often each of the judge's windows is used
TEACHER = {"l2": 3e-6}
EVALUATOR = {"l2": 3e-6}
REVIEWS = {"samples": 32_000, "temperature": 0.8}


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def build_tokenizers(roles) -> None:
    """Byte-level BPE (4096) for the policy; WordPiece (8192, lower case) for reward model and judge."""
    texts = roles["language_model"][1]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    )
    fast = GPT2Tokenizer(tokenizer_object=bpe, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=WINDOW)
    fast.save_pretrained(MODELS / "tiny-gpt2")

    piece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    piece.normalizer = normalizers.BertNormalizer(lowercase=True)
    piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    piece.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    piece.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=8192, special_tokens=special, show_progress=False))
    piece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizer(tokenizer_object=piece, model_max_length=128).save_pretrained(MODELS / "tiny-bert")
    DistilBertTokenizer(tokenizer_object=piece, model_max_length=256).save_pretrained(MODELS / "tiny-judge")


def encode(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """Ids of every text without special tokens, as uint16 arrays, by the tokenizer of ``folder``."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    out = []
    for start in range(0, len(texts), 2000):
        batch = tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False)
        out += [np.asarray(encoding.ids, np.uint16) for encoding in batch]
    return out


def export(model, name: str) -> None:
    """Weights as fp16 safetensors; config.json says float32, so that a plain `from_pretrained` trains without NaN."""
    path = MODELS / name
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.half().save_pretrained(path, safe_serialization=True)
    model.float().load_state_dict(state)
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# --- language model -----------------------------------------------------------------------------------------------


def lm_windows(ids: list[np.ndarray], eot: int, rng: np.random.Generator) -> np.ndarray:
    """One pass over the reviews in a new order: EOT before each review, cut into (N, WINDOW + 1) windows."""
    mark = np.full(1, eot, np.uint16)
    stream = np.concatenate([part for i in rng.permutation(len(ids)) for part in (mark, ids[i])])
    n = (len(stream) - 1) // WINDOW
    return np.lib.stride_tricks.sliding_window_view(stream, WINDOW + 1)[: n * WINDOW : WINDOW]


def new_lm(width: int = 256, layers: int = 4, vocabulary: int = 4096, eot: int = 0) -> GPT2LMHeadModel:
    """GPT-2's architecture with heads of 64 dimensions."""
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=WINDOW, n_embd=width, n_layer=layers, n_head=width // 64,
        activation_function="gelu_pytorch_tanh", attn_implementation="eager", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=eot, eos_token_id=eot, pad_token_id=eot,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train_lm(model, ids, tokens: int, decay: float, calibrate: float = 0.0, before_decay=lambda: None) -> float:
    """Next-token training at a constant rate, then a linear decay over the last share ``decay``. Returns tokens/s."""
    rng, config = np.random.default_rng(SEED), model.config
    vectors = ppmi_vectors(ids, config.vocab_size, config.n_embd, std=0.04)
    model.transformer.wte.weight.data.copy_(vectors)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):  # every block starts as the identity
            torch.nn.init.zeros_(parameter)
    say("lm: embeddings started from co-occurrence")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    muon = torch.optim.Muon(matrices, lr=LM["lr_matrix"], momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=LM["lr_rest"], betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    steps = tokens // (LM["batch"] * WINDOW)
    start_decay = int(steps * (1 - decay))
    windows, at, began, losses = lm_windows(ids, config.eos_token_id, rng), 0, time.time(), []
    order = rng.permutation(len(windows))
    for step in range(steps):
        if step == start_decay:
            before_decay()
        scale = min(1.0, (step + 1) / LM["warmup"], (steps - step) / max(1, steps - start_decay))
        for optimizer, lr in ((muon, LM["lr_matrix"]), (adam, LM["lr_rest"])):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        if at + LM["batch"] > len(order):
            windows = lm_windows(ids, config.eos_token_id, rng)
            order, at = rng.permutation(len(windows)), 0
        batch = torch.from_numpy(windows[order[at : at + LM["batch"]]].astype(np.int64))
        at += LM["batch"]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.transformer(batch[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(), adam.step()
        muon.zero_grad(), adam.zero_grad()
        losses.append(loss.item())
        rate = (step + 1) * LM["batch"] * WINDOW / (time.time() - began)
        if calibrate and time.time() - began > calibrate:
            return rate
        if step % 100 == 0 or step == steps - 1:
            left = (steps - step) * LM["batch"] * WINDOW / rate / 60
            say(f"lm: step {step}/{steps} loss {np.mean(losses[-100:]):.3f} {rate:.0f} tokens/s, {left:.0f} min left")
    return rate


def build_lm(roles, calibrate: float = 0.0) -> float:
    """The base is the checkpoint *before* the decay, the twin the one after; the twin is only sampled from."""
    model, ids = new_lm(), encode(MODELS / "tiny-gpt2", roles["language_model"][1])
    keep = lambda: torch.save(model.state_dict(), WORK / "base.pt")  # noqa: E731
    rate = train_lm(model, ids, LM["tokens"], LM["decay"], calibrate, keep)
    if not calibrate:
        torch.save(model.state_dict(), WORK / "twin.pt")
        model.load_state_dict(torch.load(WORK / "base.pt", weights_only=True))
        export(model, "tiny-gpt2")
    return rate


def build_rung(roles, name: str) -> None:
    """A base of another size for the ladder, in runs/build/NAME: never decayed, like tiny-gpt2, and never shipped."""
    rung, path = LADDER[name], WORK / name
    tokenizer = load_tokenizer(rung["tokenizer"])
    tokenizer.save_pretrained(path)
    ids, eot = encode(path, roles["language_model"][1]), tokenizer.eos_token_id
    model = new_lm(rung["width"], rung["layers"], len(tokenizer), eot)
    say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train_lm(model, ids, rung["tokens"], decay=0.0)
    model.save_pretrained(path)
    bits, nats = bits_per_byte(model.eval(), roles["test"][1][:2000], path)
    say(f"{name}: {bits:.3f} bits/byte, {nats:.3f} nats/token on the first 2,000 test reviews")


# --- encoder pre-training without labels --------------------------------------------------------------------------


def bert_batch(ids: list[np.ndarray], long: np.ndarray, rng, cfg) -> torch.Tensor:
    """(2·batch, length) windows: row i and row i + batch are two disjoint windows of the same review."""
    length = cfg["length"]
    rows = np.zeros((2, cfg["batch"], length), np.int64)
    for b, review in enumerate(rng.choice(long, cfg["batch"], replace=False)):
        text = ids[review]
        first = rng.integers(0, len(text) - 2 * (length - 2) + 1)
        second = rng.integers(first + length - 2, len(text) - (length - 2) + 1)
        for half, start in enumerate((first, second) if rng.random() < 0.5 else (second, first)):
            size = int(rng.integers(24, length - 1))
            window = text[start : start + size]
            rows[half, b, 0], rows[half, b, 1 : size + 1], rows[half, b, size + 1] = 2, window, 3
    return torch.from_numpy(rows.reshape(-1, length))


def ppmi_vectors(ids: list[np.ndarray], vocabulary: int, size: int, std: float = 0.05, reach: int = 5) -> torch.Tensor:
    """(vocabulary, size) vectors of the tokens' company: positive pointwise mutual information of tokens within ``reach``
    of each other, factored (Levy and Goldberg 2014, §3). Counted from text alone, like the rest of this pre-training."""
    stream = np.concatenate(ids).astype(np.int64)
    counts = sparse.csr_matrix((vocabulary, vocabulary), dtype=np.float64)
    for gap in range(1, reach + 1):
        pairs, times = np.unique(stream[:-gap] * vocabulary + stream[gap:], return_counts=True)
        counts += sparse.csr_matrix((times / gap, (pairs // vocabulary, pairs % vocabulary)), shape=counts.shape)
    counts = (counts + counts.T).tocoo()
    total, rows = counts.data.sum(), np.asarray(counts.sum(1)).ravel()
    # The 0.75 smooths rare contexts, whose information would be overrated.
    smooth = rows**0.75 / (rows**0.75).sum()
    information = np.log(counts.data / total / (rows[counts.row] / total * smooth[counts.col]))
    keep = information > 0
    table = sparse.csr_matrix((information[keep], (counts.row[keep], counts.col[keep])), shape=counts.shape)
    u, s, _ = svds(table, k=size, random_state=SEED)
    vectors = u * np.sqrt(s)
    return torch.from_numpy(np.ascontiguousarray(vectors / vectors.std() * std)).float()


def build_bert(roles, calibrate: float = 0.0) -> float:
    """Masked-token prediction plus contrast of two windows of one review (InfoNCE, van den Oord et al. 2018).

    No label is used: two windows of one review share its film and its author's mood, and that is the signal.
    """
    cfg, rng = BERT, np.random.default_rng(SEED + 1)
    torch.manual_seed(SEED + 1)
    config = BertConfig(
        vocab_size=8192, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, type_vocab_size=1, pad_token_id=0,
        attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    project = torch.nn.Linear(128, 128, bias=False)
    ids = encode(MODELS / "tiny-bert", roles["language_model"][1])
    model.bert.embeddings.word_embeddings.weight.data.copy_(ppmi_vectors(ids, 8192, config.hidden_size))
    say("bert: embeddings started from co-occurrence")
    long = np.asarray([i for i, x in enumerate(ids) if len(x) >= 2 * (cfg["length"] - 2)])
    params = [*model.parameters(), *project.parameters()]
    optimizer = torch.optim.AdamW(params, lr=cfg["lr"], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began, logs = time.time(), []
    for step in range(cfg["steps"]):
        scale = min((step + 1) / cfg["warmup"], (cfg["steps"] - step) / (cfg["steps"] - cfg["warmup"]))
        optimizer.param_groups[0]["lr"] = cfg["lr"] * scale
        rows = bert_batch(ids, long, rng, cfg)
        attention = (rows != 0).long()
        chosen = (torch.rand(rows.shape) < cfg["mask"]) & (rows > 4)
        noise = torch.rand(rows.shape)
        inputs = torch.where(chosen & (noise < 0.8), 4, rows)
        inputs = torch.where(chosen & (noise > 0.9), torch.randint(5, 8192, rows.shape), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.bert(inputs, attention_mask=attention).last_hidden_state
            logits = model.cls(hidden[chosen])
            pooled = (hidden * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)
            z = F.normalize(project(pooled).float(), dim=-1)
        masked = F.cross_entropy(logits.float(), rows[chosen])
        one, two = z.chunk(2)
        scores = one @ two.T / cfg["temperature"]
        target = torch.arange(len(one))
        contrast = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        (masked + cfg["contrast"] * contrast).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(), optimizer.zero_grad()
        logs.append((masked.item(), contrast.item(), (scores.argmax(1) == target).float().mean().item()))
        rate = (step + 1) * rows.numel() / (time.time() - began)
        if calibrate and time.time() - began > calibrate:
            return rate
        if step % 200 == 0 or step == cfg["steps"] - 1:
            mlm, nce, hit = np.mean(logs[-200:], 0)
            left = (cfg["steps"] - step) * rows.numel() / rate / 60
            say(f"bert: step {step} masked {mlm:.3f} contrast {nce:.3f} hit {hit:.2f} {rate:.0f} tokens/s, {left:.0f} min left")
        if step % 1000 == 999:
            export(model, "tiny-bert")
    export(model, "tiny-bert")
    return rate


# --- judge and evaluator ------------------------------------------------------------------------------------------


def teacher_labels(roles) -> tuple[np.ndarray, float]:
    """Probability of a positive review by a linear model on words and word pairs, for the unlabelled reviews."""
    _, texts, labels = roles["judge"]
    model = fit_classifier(texts, labels, TEACHER["l2"], n_features=2**20, ratios=True)
    _, test, truth = roles["test"]
    accuracy = float(((model.score(test) > 0) == (truth == 1)).mean())
    return expit(model.score(roles["language_model"][1])), accuracy


def build_judge(roles, calibrate: float = 0.0) -> float:
    """A small DistilBERT on windows of several lengths: true labels of its role, soft labels of the unlabelled reviews."""
    cfg, rng = JUDGE, np.random.default_rng(SEED + 2)
    torch.manual_seed(SEED + 2)
    soft, accuracy = teacher_labels(roles)
    say(f"judge: teacher (linear, words and word pairs) {accuracy:.3f} on test reviews")
    ids = encode(MODELS / "tiny-judge", roles["judge"][1]) + encode(MODELS / "tiny-judge", roles["language_model"][1])
    target = np.concatenate([np.where(roles["judge"][2] == 1, 0.97, 0.03), soft])
    config = DistilBertConfig(
        vocab_size=8192, dim=128, n_layers=4, n_heads=4, hidden_dim=512, max_position_embeddings=256, pad_token_id=0,
        attn_implementation="eager", dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config).train()
    # Its own reviews' co-occurrence, not that of tiny-bert's: annotator and reward model share nothing but the tokenizer.
    vectors = ppmi_vectors(ids[: len(roles["judge"][1])], 8192, config.dim)
    model.distilbert.embeddings.word_embeddings.weight.data.copy_(vectors)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layer." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layer." in n)]
    muon = torch.optim.Muon(matrices, lr=cfg["lr_matrix"], momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, lr=cfg["lr_rest"], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    began, tokens, losses = time.time(), 0, []
    for step in range(cfg["steps"]):
        scale = min((step + 1) / cfg["warmup"], (cfg["steps"] - step) / (cfg["steps"] - cfg["warmup"]))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = cfg["lr_matrix"] * scale, cfg["lr_rest"] * scale
        length = int(rng.choice(cfg["windows"], p=SHARES))
        rows = np.zeros((max(16, cfg["batch"] * 64 // length), length), np.int64)
        picked = rng.integers(0, len(ids), len(rows))
        for b, review in enumerate(picked):
            start = int(rng.integers(0, max(1, len(ids[review]) - (length - 2) + 1)))
            window = ids[review][start : start + length - 2]
            rows[b, : len(window) + 2] = np.concatenate([[2], window, [3]])
        batch = torch.from_numpy(rows)
        p = torch.from_numpy(target[picked]).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, attention_mask=(batch != 0).long()).logits.float()
        loss = F.cross_entropy(logits, torch.stack([1 - p, p], 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(), adam.step()
        muon.zero_grad(), adam.zero_grad()
        losses.append(loss.item())
        tokens += rows.size
        rate = tokens / (time.time() - began)
        if calibrate and time.time() - began > calibrate:
            return rate
        if step % 250 == 0 or step == cfg["steps"] - 1:
            left = (cfg["steps"] - step) * (time.time() - began) / (step + 1) / 60
            say(f"judge: step {step} loss {np.mean(losses[-250:]):.3f} {rate:.0f} tokens/s, {left:.0f} min left")
    export(model, "tiny-judge")
    return rate


def build_evaluator(roles, calibrate: float = 0.0) -> float:
    """Logistic regression on hashed words and word pairs, fitted on the evaluator's own reviews and on windows of them."""
    rng = np.random.default_rng(SEED + 3)
    _, texts, labels = roles["evaluator"]
    windows = []
    for text in texts:
        words = text.split()
        start = int(rng.integers(0, max(1, len(words) - 60)))
        windows.append(" ".join(words[start : start + 60]))
    began = time.time()
    model = fit_classifier([*texts, *windows], np.concatenate([labels, labels]), l2=EVALUATOR["l2"], ratios=True)
    model.save(MODELS / "tiny-evaluator", dtype="float16")
    return sum(map(len, texts)) / 4 / (time.time() - began)


# --- reviews ------------------------------------------------------------------------------------------------------


WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def word_stream(texts: list[str], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Word ids of all texts one after the other, and for each position the text it belongs to."""
    lists = [[vocabulary.setdefault(w, len(vocabulary) + 1) for w in WORD.findall(t.lower())] for t in texts]
    owner = np.repeat(np.arange(len(lists)), [len(x) for x in lists])
    return np.fromiter((w for x in lists for w in x), np.uint64), owner


def runs_of_words(stream: np.ndarray, owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every run of ``n`` words within one text, and the text it belongs to."""
    size = len(stream) - n + 1
    hashes, prime = np.zeros(size, np.uint64), np.uint64(0x9E3779B97F4A7C15)
    for k in range(n):
        hashes = (hashes ^ stream[k : k + size]) * prime + (hashes >> np.uint64(29))
    inside = owner[:size] == owner[n - 1 :]
    return hashes[inside], owner[:size][inside]


def copied(texts: list[str], roles, n: int = 12) -> np.ndarray:
    """True for every text that shares a run of ``n`` words, case and punctuation aside, with any review of IMDb."""
    vocabulary: dict[str, int] = {}
    known = np.unique(np.concatenate([runs_of_words(*word_stream(r[1], vocabulary), n)[0] for r in roles.values()]))
    hashes, owner = runs_of_words(*word_stream(texts, vocabulary), n)
    hit = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
    out = np.zeros(len(texts), bool)
    out[owner[hit]] = True
    return out


def degenerate(text: str) -> bool:
    """Repeats itself: a three-word run twice, or one word in a row, or too few different words."""
    words = [w.lower() for w in WORD.findall(text)]
    runs = Counter(zip(words, words[1:], words[2:]))
    return (
        any(count > 1 for count in runs.values()) or any(a == b for a, b in pairwise(words)) or len(set(words)) < 0.6 * len(words)
    )


def build_reviews(roles, calibrate: float = 0.0) -> float:
    """Sample the twin from the document mark alone, cut to short complete reviews, filter, label, deal out the uses."""
    model = new_lm()
    model.load_state_dict(torch.load(WORK / "twin.pt", weights_only=True))
    policy, tokenizer = Policy(model), load_tokenizer("tiny-gpt2")
    cfg = RolloutsConfig(response_length=56, temperature=REVIEWS["temperature"], batch_size=256)
    began, texts, tokens = time.time(), [], 0
    count = 512 if calibrate else REVIEWS["samples"]
    for start in range(0, count, 2048):
        rows = min(2048, count - start)
        rollout = sample_many(policy, [[tokenizer.bos_token_id]] * rows, cfg, tokenizer, seed=SEED + 1 + start)
        texts += response_texts(tokenizer, rollout.responses, rollout.mask)
        tokens += int(rollout.mask.sum())
        say(f"reviews: {len(texts)} sampled, {tokens / (time.time() - began):.0f} tokens/s")
    if calibrate:
        return tokens / (time.time() - began)
    known = Counter(w for role in ("language_model", "judge") for t in roles[role][1] for w in WORD.findall(t.lower()))
    dropped, kept, seen = Counter(), [], set()
    for text in texts:
        short = short_review(clean_text(text))
        length = len(tokenizer(short)["input_ids"]) if short else 0
        reason = (
            "no sentence ends within 10 to 32 words, or an odd opening" if short is None
            else "not 15 to 60 tokens" if not 15 <= length <= 60
            else "characters that are not plain" if not short.isascii() or re.search(r"[#@*_/\\<>{}\[\]=~^|]", short)
            else "unbalanced quotes or brackets" if short.count('"') % 2 or short.count("(") != short.count(")")
            else "an invented word" if any(known[w.lower()] < 5 for w in WORD.findall(short))
            else "repeats itself" if degenerate(short)
            else "a duplicate" if short.lower() in seen
            else None
        )  # fmt: skip
        if reason:
            dropped[reason] += 1
            continue
        seen.add(short.lower())
        kept.append(short)
    copies = copied(kept, roles)
    dropped["12 consecutive words stand in IMDb"] = int(copies.sum())
    kept = [text for text, copy in zip(kept, copies) if not copy]
    for reason, number in dropped.most_common():
        say(f"reviews: dropped {number}: {reason}")
    scores = load_classifier("tiny-judge").score(kept)
    reviews = [Review(f"sampled-{i:05d}", text, int(score > 0)) for i, (text, score) in enumerate(zip(kept, scores))]
    rows = [
        {"id": r.id, "text": r.text, "label": r.label, "score": round(float(scores[int(r.id[-5:])]), 3), "role": role}
        for role, part in deal(reviews).items()
        for r in part
    ]
    pq.write_table(pa.Table.from_pylist(rows), ROOT / "reviews.parquet", compression="zstd")
    say(f"reviews: kept {len(kept)}, {np.mean(scores > 0):.3f} positive by the judge")
    return tokens / (time.time() - began)


# --- figures of the datasheet -------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model, texts: list[str], tokenizer: Path = MODELS / "tiny-gpt2") -> tuple[float, float]:
    """(bits per UTF-8 byte, nats per token): each review on its own behind one EOT, windows of 128 tokens that do not
    overlap (each starts from the last token of the one before), every token of the text scored, nothing else."""
    nats = tokens = 0.0
    for start in range(0, len(texts), 200):
        windows = []
        for ids in encode(tokenizer, texts[start : start + 200]):
            stream = np.concatenate([[model.config.eos_token_id], ids.astype(np.int64)])
            windows += [stream[i : i + WINDOW + 1] for i in range(0, len(stream) - 1, WINDOW)]
        for at in range(0, len(windows), 64):
            rows = np.full((len(windows[at : at + 64]), WINDOW + 1), -100)
            for row, window in zip(rows, windows[at : at + 64]):
                row[: len(window)] = window
            batch = torch.from_numpy(rows)
            logits = model(batch[:, :-1].clamp(min=0)).logits
            nats += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
            tokens += int((batch[:, 1:] != -100).sum())
    return nats / np.log(2) / sum(len(t.encode()) for t in texts), nats / tokens


def word_windows(texts: list[str], tokenizer, tokens: int = 58) -> list[str]:
    """One random window of ``tokens`` WordPiece tokens of each text, as text (seed 0)."""
    rng, out = np.random.default_rng(0), []
    for text in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        first = int(rng.integers(0, max(1, len(offsets) - tokens + 1)))
        window = offsets[first : first + tokens]
        out.append(text[window[0][0] : window[-1][1]])
    return out


def evaluate(roles) -> None:
    """Print every figure of data/README.md with its protocol, and keep those the learning table shows."""
    _, texts, labels = roles["test"]
    figures: dict[str, dict] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name, path in (("tiny-gpt2 (base, shipped)", MODELS / "tiny-gpt2"), ("annealed twin", WORK / "twin.pt")):
        if path.exists():
            model = new_lm() if path.suffix else load_policy("tiny-gpt2").lm
            if path.suffix:
                model.load_state_dict(torch.load(path, weights_only=True))
            bits, nats = bits_per_byte(model.eval(), texts[:2000])
            figures["twin" if path.suffix else "base"] = {"bits_per_byte": round(bits, 4), "nats_per_token": round(nats, 4)}
            print(f"{name}: {bits:.3f} bits/byte, {nats:.3f} nats/token on the first 2,000 test reviews,")
            print("    each on its own behind one EOT, windows of 128 that do not overlap, every token of the text scored")
    judge, evaluator = load_classifier("tiny-judge"), load_classifier("tiny-evaluator")
    windows = word_windows(texts, judge.tokenizer)
    for name, model in (("tiny-judge", judge), ("tiny-evaluator", evaluator)):
        whole, part = (float(((model.score(t) > 0) == (labels == 1)).mean()) for t in (texts, windows))
        print(f"{name}: {whole:.3f} of {len(texts)} whole test reviews (judge: mean of windows of 256), {part:.3f} of one random")
        print("    window of 58 WordPiece tokens of each (seed 0); threshold 0, text cleaned, [CLS] … [SEP] around it")
        figures[name.removeprefix("tiny-")] = {"whole": round(whole, 4), "window": round(part, 4)}
    rows = pq.read_table(ROOT / "reviews.parquet").to_pylist()
    tokenizer = load_tokenizer("tiny-gpt2")
    lengths = [len(tokenizer(r["text"])["input_ids"]) for r in rows]
    uses = ", ".join(f"{use} {count}" for use, count in Counter(r["role"] for r in rows).items())
    agree = np.mean((evaluator.score([r["text"] for r in rows]) > 0) == np.array([r["label"] == 1 for r in rows]))
    positive = np.mean([r["label"] for r in rows])
    print(f"reviews.parquet: {len(rows)} reviews ({uses}); tokens {min(lengths)} to {max(lengths)},")
    print(f"    median {np.median(lengths):.0f}; {positive:.3f} positive by the judge, the evaluator agrees on {agree:.3f};")
    print(f"    {int(copied([r['text'] for r in rows], roles).sum())} share 12 consecutive words with IMDb")
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    size = sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    print(f"data/: {size / 1e6:.1f} MB")


BUILDERS = {"lm": build_lm, "bert": build_bert, "judge": build_judge, "evaluator": build_evaluator, "reviews": build_reviews}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["tokenizers", *BUILDERS], help="make these only")
    parser.add_argument("--rung", choices=sorted(LADDER), help="a base of another size for the ladder, in runs/build/")
    parser.add_argument("--calibrate", action="store_true", help="measure tokens/s of each training and stop")
    parser.add_argument("--evaluate", action="store_true", help="print the figures of data/README.md and stop")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    WORK.mkdir(parents=True, exist_ok=True)
    roles = imdb_roles()
    say("roles: " + ", ".join(f"{name} {len(r[0])}" for name, r in roles.items()))
    if args.evaluate:
        evaluate(roles)
        return 0
    if args.rung:
        build_rung(roles, args.rung)
        return 0
    if args.calibrate:
        work = {
            "lm": LM["tokens"],
            "bert": BERT["steps"] * BERT["batch"] * 2 * BERT["length"],
            "judge": JUDGE["steps"]
            * int(sum(p * n * max(16, JUDGE["batch"] * 64 // n) for p, n in zip(SHARES, JUDGE["windows"]))),
        }
        for name, tokens in work.items():
            rate = BUILDERS[name](roles, calibrate=20)
            say(f"{name}: {rate:.0f} tokens/s, {tokens / rate / 60:.0f} min for {tokens / 1e6:.0f} M tokens")
        return 0
    for name in args.only or ["tokenizers", *BUILDERS]:
        began = time.time()
        build_tokenizers(roles) if name == "tokenizers" else BUILDERS[name](roles)
        say(f"{name}: done in {(time.time() - began) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
