"""The reward model: a pre-trained trunk, one scalar head, and losses on comparisons.

Its scores have no zero and no unit until they are normalised: the losses see differences within one query only, so
any constant may be added to every score. Knows texts of query + response and comparisons. Does not know policies, PPO
or where its comparisons come from; text becomes ids in `tokenizer_bridge.encode_pairs` alone, in training as in scoring.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from rlhf_nb_utils import hub, models, ngrams, savings
from rlhf_nb_utils.config import CourseError, MemoryConfig
from rlhf_nb_utils.data import Comparison
from rlhf_nb_utils.tokenizer_bridge import encode_pairs

POOLINGS = ("mean", "first", "last")
LOSSES = ("pairs", "margin", "rankings")
MAX_GRAD_NORM = 1.0
ScoreFn = Callable[[list[str], list[str]], "Tensor | np.ndarray"]


class RewardModelError(CourseError):
    """A trunk, tokenizer, checkpoint, score or loss that a reward model cannot use."""


# --- losses -------------------------------------------------------------------------------------------------------


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """``−log sigmoid(chosen − rejected − margin)``, mean over pairs; chosen, rejected, margin ``(N,)`` -> ``()``.

    Bradley and Terry (1952); the margin is Touvron et al. (2023), eq. 2: the better the choice, the wider the gap asked.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return F.softplus(-difference).mean()


def plackett_luce_loss(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over rows of ``−Σ_k log softmax(s_k, …, s_K)_k``: scores ``(B, K)`` best first, valid ``(B, K)`` bool -> ``()``.

    The likelihood of drawing the ranking one by one without replacement (Plackett 1975; Luce 1959). K = 2 is
    Bradley–Terry; rows may hold fewer than K responses, the rest masked out.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    filled = scores.masked_fill(~valid, -1e30)  # not -inf, whose gradient would be NaN
    remaining = filled.flip(1).logcumsumexp(1).flip(1)
    return (remaining - filled).where(valid, 0.0).sum(1).mean()


def margins(gaps: Tensor, cuts: Tensor) -> Tensor:
    """Margins 0, 1/3, 2/3 or 1 for gold-score gaps of any shape, by the quartiles ``cuts (3,)`` of the training gaps.

    Touvron et al. (2023, table 27, "small") ask annotators how much better the choice is, in four grades; here the
    quartile of the gap answers. A label that contradicts the gold score (gap < 0) asks for no margin.
    """
    return torch.where(gaps > 0, torch.bucketize(gaps, cuts, right=True), 0).float() / 3


# --- the model ----------------------------------------------------------------------------------------------------


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector a text: hidden ``(B, L, d)``, attention_mask ``(B, L)`` -> ``(B, d)``; padding may be on either side.

    ``last`` is the last position whose *mask* is 1. Looking for the first pad id instead would take a real EOS for
    padding wherever the two share an id.
    """
    mask = attention_mask.to(hidden.dtype)
    if pooling == "mean":
        return torch.einsum("bld,bl->bd", hidden, mask) / mask.sum(1, keepdim=True).clamp(min=1)
    index = mask.argmax(1) if pooling == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


class RewardModel(nn.Module):
    """A trunk (encoder or causal), pooling, a linear head without bias, at first of variance 1/(d + 1) (Stiennon et al. 2020).

    A bias would cancel in every comparison. ``score_mean`` and ``score_std`` are buffers, NaN until `set_normalisation`.
    """

    def __init__(self, backbone: nn.Module, tokenizer, pooling: str, max_length: int, dropout: bool = False, seed=0):
        super().__init__()
        config = backbone.config
        # An encoder of the BERT kind has a masked-LM form; what has none reads from left to right.
        self.causal = type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        _check_parts(config, tokenizer, pooling, max_length, self.causal)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # the tanh layer of BERT's first token: never read here, so never trained
        self.backbone = backbone if dropout else models.disable_dropout(backbone)
        self.tokenizer, self.pooling, self.max_length, self.dropout = tokenizer, pooling, max_length, dropout
        self.checkpointed = False  # whether layers keep their input alone, and compute the rest again
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # opt-350m projects its last state down
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("score_mean", torch.tensor(float("nan")))
        self.register_buffer("score_std", torch.tensor(float("nan")))

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | nn.Module,
        tokenizer=None,
        pooling: str = "mean",
        max_length: int = 96,
        dropout: bool = False,
        seed: int = 0,
    ) -> RewardModel:
        """A fresh head on the trunk of a model name, a folder (a policy's, say) or a module, in fp32.

        ``tokenizer``: one, or None for the one that lies with the weights. Raises `RewardModelError` for a checkpoint
        that classifies into several labels, a tokenizer without pad token (encoders), ids beyond the embeddings, a
        ``max_length`` beyond the positions, and ``first`` on a causal trunk, whose first token has read nothing.
        """
        if isinstance(source, nn.Module):
            if tokenizer is None:
                raise RewardModelError("a trunk given as a module needs its tokenizer: pass tokenizer=")
            return cls(source.base_model, tokenizer, pooling, max_length, dropout, seed)
        path = hub.model_dir(str(source))
        _check_labels(models.read_config(path), source)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir(str(source)), trust_remote_code=False)
        backbone = models.load_weights(AutoModel, path)
        return cls(backbone, tokenizer, pooling, max_length, dropout, seed)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores ``(B,)`` fp32 of input_ids, attention_mask ``(B, L)``. Head and pooling stay in fp32 under autocast."""
        extra = {"position_ids": models.position_ids(attention_mask), "use_cache": False} if self.causal else {}
        with savings.recomputing(models.layers_of(self.backbone) if self.checkpointed else ()):
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(pool(hidden.float(), attention_mask, self.pooling)).squeeze(-1)

    def encode(self, queries: Sequence[str], responses: Sequence[str]) -> list[Tensor]:
        """Ids ``(L_i,)`` int64 of each query + response, special tokens included: the one way in, for every use."""
        rows = []
        for i in range(0, len(queries), 1024):
            part = slice(i, i + 1024)
            batch = encode_pairs(self.tokenizer, queries[part], responses[part], self.max_length, causal=self.causal)
            rows += [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        return rows

    @torch.no_grad()
    def score(self, queries: list[str], responses: list[str], batch_size: int = 128, autocast: bool = False) -> Tensor:
        """Raw scores ``(B,)`` fp32 on the CPU, in the order given; computed in batches of similar length, dropout off.

        Only differences between responses to one query mean anything; `normalise` makes them a reward.
        """
        if len(queries) != len(responses):
            raise RewardModelError(f"{len(queries)} queries but {len(responses)} responses: give one each")
        rows, training = self.encode(queries, responses), self.training
        self.eval()
        scores = torch.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with savings.at_work(self):
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                with models.autocast(self.device, autocast):
                    scores[part] = self(*_collate([rows[i] for i in part], self.device)).cpu()
        self.train(training)
        bad = (~scores.isfinite()).nonzero().flatten()
        if len(bad):
            raise RewardModelError(f"score {int(bad[0])} is {scores[bad[0]]}: the reward model has diverged, train it again")
        return scores

    def set_normalisation(self, scores: Tensor) -> None:
        """Fix mean and standard deviation from raw scores ``(N,)`` of the *reference's* samples: its mean score becomes 0.

        Without that anchor a score's level is arbitrary, and β, the clip and the missing-EOS penalty mean nothing.
        """
        scores = torch.as_tensor(scores, dtype=torch.float64)
        mean, std = scores.mean(), scores.std(correction=0)
        if len(scores) < 2 or not bool(std > 1e-8 * (1 + mean.abs())):  # NaN fails this too
            raise RewardModelError(f"{len(scores)} score(s) with standard deviation {float(std):g}: nothing to normalise by")
        self.score_mean.copy_(mean)
        self.score_std.copy_(std)

    def normalise(self, scores: Tensor) -> Tensor:
        """``(scores − score_mean) / score_std`` ``(B,)``. Raises `RewardModelError` before `set_normalisation`."""
        if not bool(self.score_std.isfinite()):
            raise RewardModelError("scores have no zero yet: call set_normalisation on the reference's samples first")
        return (scores - self.score_mean.to(scores.device)) / self.score_std.to(scores.device)

    def save(self, folder: str | Path) -> None:
        """Weights and buffers (safetensors), trunk configuration, settings and tokenizer: all that scoring needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, str(folder / "model.safetensors"))
        settings = {"pooling": self.pooling, "max_length": self.max_length, "dropout": self.dropout}
        (folder / "reward_model.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> RewardModel:
        """What `save` wrote, in eval mode. Raises `RewardModelError` where a part is missing or the head is not scalar."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / "reward_model.json").read_text())
            tensors = load_file(str(folder / "model.safetensors"))
            labels = len(tensors["head.weight"])
            if labels == 1:
                backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
                model = cls(backbone, AutoTokenizer.from_pretrained(folder), **settings)
                model.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RewardModelError(f"{folder} is not a complete reward model ({reason}): train it again") from error
        if labels != 1:
            raise RewardModelError(f"{folder}: its head has {labels} labels; a reward model has one scalar: train it anew")
        return model.to(device).eval()


def _check_labels(config, source) -> None:
    kinds = " ".join(getattr(config, "architectures", None) or [])
    if "Classification" in kinds and config.num_labels != 1:
        raise RewardModelError(
            f"{source} classifies into {config.num_labels} labels; a reward model has one scalar: name its base model"
        )


def _check_parts(config, tokenizer, pooling: str, max_length: int, causal: bool) -> None:
    if pooling not in POOLINGS:
        raise RewardModelError(f"unknown pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
    if config.is_encoder_decoder:
        raise RewardModelError(f"{config.model_type} has an encoder and a decoder: take an encoder or a causal model")
    if causal and pooling == "first":
        raise RewardModelError("the first token of a causal model has read nothing: take pooling 'last' or 'mean'")
    if tokenizer.pad_token_id is None and not causal:
        raise RewardModelError("the tokenizer has no pad token: set tokenizer.pad_token before making a reward model")
    if len(tokenizer) > config.vocab_size:
        raise RewardModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the trunk {config.vocab_size} embeddings: take the trunk's own"
        )
    positions = min(getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)
    if max_length > positions:
        raise RewardModelError(f"max_length {max_length} is beyond the trunk's {positions} positions: lower it")


def _collate(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``(L_i,)`` -> input_ids and attention_mask ``(B, L)``, padded right with 0: the mask comes from the lengths."""
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)


# --- training -----------------------------------------------------------------------------------------------------


def train(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    cfg,
    heldout: Sequence[Comparison] = (),
    callback: Callable[[dict], None] | None = None,
) -> dict[str, list[dict]]:
    """Fit to comparisons with ``cfg.reward_model`` (AdamW, warm-up then linear decay, gradient norm clipped at 1).

    Returns ``{"steps": [...], "epochs": [...]}``: loss, accuracy, gap (mean score difference), learning_rate and
    grad_norm of each step; held-out accuracies after each epoch. ``callback`` gets every record as it is made.
    A loss or gradient that is not finite raises `RewardModelError` naming the step, before it touches the weights.
    Rankings under ``pairs`` or ``margin`` give all their K(K − 1)/2 pairs in one batch (Ouyang et al. 2022, §3.5).
    """
    settings = cfg.reward_model
    groups, gold, cuts = _prepare(model, comparisons, settings.loss)
    lengths = [max(map(len, group)) for group in groups]
    generator = torch.Generator().manual_seed(cfg.seed)
    optimizer = _optimizer(model, settings.learning_rate, settings.weight_decay)
    total = settings.epochs * math.ceil(len(groups) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_decay(total, settings.warmup_ratio))
    history: dict[str, list[dict]] = {"steps": [], "epochs": []}

    def record(kind: str, values: dict) -> None:
        history[kind].append(values)
        if callback is not None:
            callback(values)

    for epoch in range(1, settings.epochs + 1):
        model.train()
        for rows in _length_batches(lengths, settings.batch_size, generator):
            step = {"step": len(history["steps"]) + 1, "epoch": epoch}
            batch = [groups[i] for i in rows], [gold[i] for i in rows] if gold else None
            record("steps", step | _step(model, optimizer, schedule, *batch, cuts, cfg, step["step"]))
        model.eval()
        if heldout:
            record("epochs", step | _heldout(model, heldout, cfg.models.autocast))
    return history


def _step(model, optimizer, schedule, batch: list[list[Tensor]], gold, cuts, cfg, number: int) -> dict[str, float]:
    """One optimizer step on a batch of comparisons, each the ids of its responses, best first."""
    # 1. every response of the batch in one forward, then back to (B, K), best first
    device, kind = model.device, cfg.reward_model.loss
    valid = pad_sequence([torch.ones(len(group), dtype=torch.bool) for group in batch], batch_first=True).to(device)
    with models.autocast(device, cfg.models.autocast):
        flat = model(*_collate([ids for group in batch for ids in group], device))
    scores = torch.zeros_like(valid, dtype=flat.dtype).masked_scatter(valid, flat)
    # 2. the loss on differences within each comparison
    gold = pad_sequence(gold, batch_first=True).to(device) if gold else None
    loss, gaps = _loss(scores, valid, kind, gold, cuts)
    # 3. the update, unless something is no longer a number
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    values = {"loss": loss.item(), "grad_norm": grad_norm.item()}
    if not all(map(math.isfinite, values.values())):
        raise RewardModelError(
            f"step {number}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}; stopped before the update: "
            "lower reward_model.learning_rate"
        )
    rate = schedule.get_last_lr()[0]
    optimizer.step()
    schedule.step()
    return values | {"accuracy": float(_share_right(gaps)), "gap": gaps.mean().item(), "learning_rate": rate}


def _heldout(model: RewardModel, heldout: Sequence[Comparison], autocast: bool) -> dict[str, float]:
    scores = score_comparisons(lambda q, r: model.score(q, r, autocast=autocast), heldout)
    accuracy = pairwise_accuracy(scores, heldout)
    found = {"heldout_accuracy": accuracy.labels, "heldout_gold_accuracy": accuracy.gold}
    return found | {"heldout_ece": calibration(scores).ece}


def _prepare(model: RewardModel, comparisons: Sequence[Comparison], loss: str):
    """Ids of every response by comparison, gold scores ``(K,)`` of each, and the cuts of the margins (or None)."""
    if loss not in LOSSES:
        raise RewardModelError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
    if not comparisons or min(len(c.responses) for c in comparisons) < 2:
        raise RewardModelError("training needs at least one comparison, each of two responses or more")
    flat = model.encode(
        [c.query for c in comparisons for _ in c.responses], [response for c in comparisons for response in c.responses]
    )
    rows = iter(flat)
    groups = [[next(rows) for _ in c.responses] for c in comparisons]
    if loss != "margin":
        return groups, None, None
    if any(c.scores is None for c in comparisons):
        raise RewardModelError("loss 'margin' needs the scores of every comparison: take 'pairs', or a set with scores")
    gold = [torch.tensor(c.scores, dtype=torch.float32) for c in comparisons]
    gaps = torch.cat([(g[:, None] - g[None])[tuple(torch.triu_indices(len(g), len(g), 1))] for g in gold])
    return groups, gold, torch.quantile(gaps.abs()[:1_000_000], torch.tensor([0.25, 0.5, 0.75])).to(model.device)


def _loss(scores: Tensor, valid: Tensor, kind: str, gold: Tensor | None, cuts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss ``()`` of scores, valid, gold ``(B, K)`` best first, and the detached score differences of all pairs ``(N,)``."""
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    both = valid[:, better] & valid[:, worse]
    chosen, rejected = scores[:, better][both], scores[:, worse][both]
    if kind == "rankings":
        loss = plackett_luce_loss(scores, valid)
    else:
        margin = margins(gold[:, better][both] - gold[:, worse][both], cuts) if kind == "margin" else None
        loss = bradley_terry_loss(chosen, rejected, margin)
    return loss, (chosen - rejected).detach()


def _optimizer(model: RewardModel, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Fused AdamW; biases and the gains of layer norms are not decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return savings.make_optimizer(groups, MemoryConfig(), lr=learning_rate)


def _warmup_decay(total: int, ratio: float) -> Callable[[int], float]:
    warmup = max(1, round(ratio * total))
    return lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup + 1))


def _length_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Each index once, in batches of similar length in random order: little padding, and no order to learn from.

    Only within pools of 16 batches are lengths sorted, so the batches differ from epoch to epoch.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), 16 * batch_size):
        rows = sorted(order[start : start + 16 * batch_size], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


# --- is it any good? ----------------------------------------------------------------------------------------------


class Accuracy(NamedTuple):
    """Share of pairs in the right order, a tied score counting half: by the sampled ``labels``, and by the noiseless
    ``gold`` preference (nan without scores) over the ``gold_pairs`` that have one."""

    labels: float
    pairs: int
    gold: float
    gold_pairs: int


class Calibration(NamedTuple):
    """Per bin of confidence sigmoid(|difference|): mean confidence, share right (both nan when empty) and pairs; ECE."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    ece: float


def score_comparisons(score: ScoreFn, comparisons: Sequence[Comparison]) -> list[np.ndarray]:
    """Scores ``(K,)`` of every comparison's responses, by ``score(queries, responses) -> (N,)`` (`RewardModel.score`, say)."""
    queries = [c.query for c in comparisons for _ in c.responses]
    flat = np.asarray(score(queries, [r for c in comparisons for r in c.responses]), dtype=np.float64)
    return np.split(flat, np.cumsum([len(c.responses) for c in comparisons])[:-1])


def _gaps(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Differences better − worse ``(N,)`` of all pairs of all rows, each row best first."""
    return np.concatenate([np.subtract.outer(row, row)[np.triu_indices(len(row), 1)] for row in rows])


def _share_right(gaps):
    """Mean of 1 where the gap is positive, 1/2 where it is 0: () for a tensor or an array (N,)."""
    return ((gaps > 0) * 1.0 + (gaps == 0) * 0.5).mean()


def pairwise_accuracy(scores: Sequence[np.ndarray], comparisons: Sequence[Comparison]) -> Accuracy:
    """How often ``scores`` (from `score_comparisons`) put the better response first, over all pairs.

    Sampled labels cap it: against a Bradley–Terry annotator even the gold score is right only so often. Against gold
    there is no cap; pairs whose gold scores tie are left out of that count, and of its denominator.
    """
    if len(scores) != len(comparisons) or not comparisons:
        raise RewardModelError(f"{len(scores)} rows of scores for {len(comparisons)} comparisons: give one each")
    gaps = _gaps([np.asarray(row, float) for row in scores])
    labels = float(_share_right(gaps))
    if any(c.scores is None for c in comparisons):
        return Accuracy(labels, len(gaps), float("nan"), 0)
    gold = _gaps([np.asarray(c.scores) for c in comparisons])
    untied = gold != 0
    right = float(_share_right((gaps * np.sign(gold))[untied])) if untied.any() else float("nan")
    return Accuracy(labels, len(gaps), right, int(untied.sum()))


def calibration(scores: Sequence[np.ndarray], n_bins: int = 10) -> Calibration:
    """Is sigmoid(difference) the probability of being preferred? Reliability bins over 0.5…1 and their ECE.

    Expected calibration error (Guo et al. 2017): |confidence − accuracy| averaged over bins by their number of pairs.
    ``scores``: rows best first by label, from `score_comparisons`.
    """
    gaps = _gaps([np.asarray(row, float) for row in scores])
    confident = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0) + 0.5 * (gaps == 0)
    bins = np.minimum(((confident - 0.5) * 2 * n_bins).astype(int), n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, confident, n_bins) / count
        accuracy = np.bincount(bins, right, n_bins) / count
    ece = np.nansum(np.abs(confidence - accuracy) * count) / len(gaps)
    return Calibration(confidence, accuracy, count, float(ece))


def bag_of_words_baseline(
    train: Sequence[Comparison], heldout: Sequence[Comparison], l2: float = 3e-4
) -> tuple[ngrams.NGramLinear, Accuracy]:
    """Bradley–Terry on hashed words and word pairs: a second's work, and what every neural reward model must beat."""
    pairs = [(c.query + better, c.query + worse) for c in train for better, worse in _ordered_pairs(c.responses)]
    model = ngrams.fit_bradley_terry([chosen for chosen, _ in pairs], [rejected for _, rejected in pairs], l2)
    scores = score_comparisons(lambda q, r: model.score([a + b for a, b in zip(q, r)]), heldout)
    return model, pairwise_accuracy(scores, heldout)


def _ordered_pairs(responses: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((responses[i], responses[j]) for i in range(len(responses)) for j in range(i + 1, len(responses)))
