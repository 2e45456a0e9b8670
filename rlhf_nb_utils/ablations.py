"""Runs made once and kept: what each choice of the recipe is worth, how it carries over to other sizes, what `learn` found.

A variant changes the profile in one place and is run over the same seeds as the recipe; what is kept of a run is its
figures on the evaluation prompts, its curves, and a few samples of the first seed. They lie in ``data/recorded/``, and the
notebooks replay them. Knows the stages; trains nothing itself. Only runs on the embedded reviews may be recorded with
samples: those of a policy fine-tuned on IMDb may repeat it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_nb_utils import checkpoint, learn, stages, store
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import DATA, ROOT, Config, CourseError, load_config, runs_dir, same_recipe
from rlhf_nb_utils.learn_table import beside, spread

RECORDED = DATA / "recorded"
CURVES = ("score_normalised", "kl", "entropy", "clipfrac", "explained_var", "value_loss", "length", "eos_rate", "kl_coef")
SAMPLES = 4
SOURCES = {"embedded": "embedded", "imdb": "IMDb"}  # as recordings are called, and in words
# What all runs share: half the protocol's prompts, and half the responses an iteration, for twice as many runs.
SHARED = {
    "evaluation.n_prompts": 500, "ppo.batch_size": 64, "ppo.gradient_accumulation_steps": 2, "ppo.evaluation_interval": 13,
}  # fmt: skip

# name -> what it changes. The recipe is the profile as it stands.
# fmt: off
ABLATIONS: dict[str, dict] = {
    "recipe": {},
    "no SFT": {"sft.epochs": 0},
    "no value clip": {"ppo.cliprange_value": None},
    "no whitening": {"ppo.whiten_advantages": False},
    "separate critic": {"ppo.critic": "separate"},
    **{f"β = {beta:g}": {"ppo.kl_coef": beta} for beta in (0.05, 0.1, 0.2, 0.5, 1.0)},
    "no entropy bonus": {"ppo.entropy_coef": 0.0},
    **{f"{n} epoch{'s' * (n > 1)} per batch": {"ppo.num_ppo_epochs": n} for n in (1, 2, 4)},
    "k3 in the reward": {"ppo.kl_estimator": "k3"},
    # A ranking of three is two choices: half the prompts and half the batch, as many choices in as many steps.
    "reward model on triples": {
        "preferences.responses_per_prompt": 3, "reward_model.loss": "rankings", "data.n_preferences": 2500,
        "reward_model.batch_size": 16,
    },
    "no annotator noise": {"preferences.noise": 0.0},
    "annotator noise 3": {"preferences.noise": 3.0},
    "adaptive β": {"ppo.kl_controller": "adaptive", "ppo.kl_target": 6.0},
    "decaying rate": {"ppo.lr_schedule": "linear"},
    "twice as long": {"ppo.iterations": 104},
    "reward by the annotator": {"ppo.reward": "annotator"},
}
# fmt: on
# The language models other than "recipe" are made by `python data/build.py --rung NAME`. All run under bf16 autocast, which
# halves the time of the larger ones; so this recipe is not quite that of the ablations.
SMALL, LARGE, REAL_TOKENS = ({"models.policy": f"runs/build/{name}"} for name in ("lm-1m", "lm-16m", "lm-gpt2-tokens"))
LADDER: dict[str, dict] = {
    "1 M": SMALL,
    "1 M, twice the rate": SMALL | {"ppo.learning_rate": 4e-4},
    "recipe": {},  # 4 M
    "4 M, twice the rate": {"ppo.learning_rate": 4e-4},
    "16 M": LARGE,
    "16 M, half the rate": LARGE | {"ppo.learning_rate": 1e-4},
    "GPT-2's tokenizer": REAL_TOKENS,
    "GPT-2's tokenizer, no entropy bonus": REAL_TOKENS | {"ppo.entropy_coef": 0.0},
}
GROUPS = {"ablations": ABLATIONS, "ladder": {name: {"models.autocast": True} | change for name, change in LADDER.items()}}


class AblationError(CourseError):
    """A variant or a recording that is not there."""


def measure(cfg: Config) -> dict:
    """One run: figures on the evaluation prompts, curves rounded to three digits, samples."""
    trained, queries = stages.ppo(cfg), learn.prompts(cfg)
    before, after = (stages.evaluated(cfg, stage, queries) for stage in (stages.sft(cfg), trained))
    history, kept = trained.history, learn.distinct({"before": before.tokens, "after": after.tokens})
    summary = {
        "positive_before": float((before.scores["gold"] > 0).mean()),
        "positive": float((after.scores["gold"] > 0).mean()),
        "independent": float((after.scores["independent"] > 0).mean()),
        "gold": float(after.scores["gold"].mean()),
        "proxy": float(after.scores["proxy"].mean()),
        "kl": float(after.kl.mean()),
        "win_rate": ev.win_rate(after.scores["gold"], before.scores["gold"], n_samples=100).rate,
        "distinct": kept["distinct_after"] / kept["distinct_before"],
        "distinct_all": kept["distinct_all_after"] / kept["distinct_all_before"],
        "length": float(after.length.mean()),
        "eos_rate": float(after.ended.mean()),
        "reward_model": stages.reward_model(cfg).summary["accuracy"]["gold"],
        "eos_rate_before": float(before.ended.mean()),
        "sft_loss": stages.sft(cfg).summary["heldout_loss"],
        "parameters": sum(p.numel() for p in stages.load_policy(stages.sft(cfg), cfg)[0].lm.parameters()),
        "surprise_before": float(learn.surprise(cfg, before).sum() / before.length.sum()),
        "surprise": float(learn.surprise(cfg, after).sum() / after.length.sum()),
        "ppo_minutes": learn.minutes(history),
    }
    watched = learn.watched(cfg)
    return {
        "seed": cfg.seed,
        "figures": {key: round(value, 4) for key, value in summary.items()},
        "curves": {key: [float(f"{row[f'ppo/{key}']:.3g}") for row in history] for key in CURVES},
        "watched": {
            "iteration": list(watched),
            **{key: [float(f"{w[key].mean():.3g}") for w in watched.values()] for key in ("gold", "proxy", "independent", "kl")},
        },
        "samples": [list(pair) for pair in zip(after.queries[:SAMPLES], after.responses[:SAMPLES])],
    }


def measured(cfg: Config) -> dict:
    """`measure`, or what it found before: the evaluation of a hundred runs is an hour's work of its own."""
    code = hashlib.sha256(f"{inspect.getsource(measure)}{CURVES}{SAMPLES}".encode()).hexdigest()[:8]
    path = runs_dir() / cfg.profile / "variants" / f"{store.stage_hash(cfg, 'learn')}-{code}.json"
    if not path.exists():
        found = measure(cfg)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json_atomic(path, found)
    return json.loads(path.read_text(encoding="utf-8"))


def record(
    group: str = "ablations", profile: str = "cpu", seeds: Sequence[int] = range(3), names: Sequence[str] = (), jobs: int = 1
) -> Path:
    """Run the named variants of a group (all of them by default) over ``seeds`` and write ``data/recorded/<group>.json``.

    What stands there of other variants is kept, if it was recorded with the same recipe. Finished stages are reused, so the
    command may be stopped and given again. Raises AblationError for an unknown variant, no seeds, reviews that may not be
    recorded, or a recording of another recipe that would be kept in part.
    """
    variants = GROUPS[group]
    if not seeds or jobs < 1:
        raise AblationError("--seeds and --jobs must be at least 1")
    names = list(names or variants)
    for name in names:
        if name not in variants:
            raise AblationError(f"unknown variant {name!r}: choose from {', '.join(variants)}")
    cfgs = {(n, s): configured(profile, s, variants[n]) for n in dict.fromkeys(["recipe", *names]) for s in seeds}
    if any(cfg.data.source != "embedded" for cfg in cfgs.values()):
        raise AblationError("only runs on the embedded reviews may be recorded: IMDb's text is not ours to hand on")
    recipe = cfgs["recipe", seeds[0]].model_dump(mode="json") | {"seed": list(seeds)}
    kept = load(group) if (RECORDED / f"{group}.json").exists() else {"recipe": recipe, "variants": {}}
    if not same_recipe(kept["recipe"], recipe) and set(kept["variants"]) - set(names):
        raise AblationError(f"data/recorded/{group}.json was made with another recipe or other seeds: record all variants anew")
    # The recipe first: its early stages are shared, and two processes must not build one stage at a time.
    shared = [key for key in cfgs if key[0] == "recipe"]
    runs = dict(zip(shared, spread(measured, [(cfgs[key],) for key in shared], jobs)))
    rest = [key for key in cfgs if key not in runs]
    runs |= dict(zip(rest, spread(measured, [(cfgs[key],) for key in rest], jobs)))
    for name in names:
        kept["variants"][name] = {"change": variants[name], "runs": [runs[name, seed] for seed in seeds]}
        for run in kept["variants"][name]["runs"][1:]:
            run.pop("samples")
    order = [name for name in variants if name in kept["variants"]]
    return _write(group, {"recipe": recipe, "variants": {name: kept["variants"][name] for name in order}})


def configured(profile: str, seed: int, change: dict) -> Config:
    """The settings of one run. A language model in ``runs/`` is looked for in the repository, wherever this is called from."""
    change = {key: str(ROOT / value) if str(value).startswith("runs/") else value for key, value in change.items()}
    for key, value in change.items():
        if key == "models.policy" and not Path(value).is_dir():
            raise AblationError(f"{value} is missing: make it with `python data/build.py --rung {Path(value).name}`")
    return load_config(profile, seed, SHARED | change)


def keep_learned(table_file: Path, source: str) -> Path:
    """Keep what `learn` measured, figures alone, as ``data/recorded/learn-<source>.json``."""
    found = json.loads(table_file.with_suffix(".json").read_text(encoding="utf-8"))
    return _write(f"learn-{source}", found)


def _write(name: str, content: dict) -> Path:
    RECORDED.mkdir(parents=True, exist_ok=True)
    path = RECORDED / f"{name}.json"
    checkpoint.write_json_atomic(path, content)
    return path


def load(name: str = "ablations") -> dict:
    """A recording. Raises AblationError where there is none."""
    try:
        return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise AblationError(
            f"data/recorded/{name}.json is missing or damaged: `git checkout data/recorded`; if never made, `course record`"
        ) from None


def shown(what: str) -> str:
    """A recording as Markdown: ``learn`` (what there is of it), ``ablations`` or ``ladder``."""
    if what == "learn":
        there = [source for source in SOURCES if (RECORDED / f"learn-{source}.json").exists()]
        return beside({SOURCES[source]: load(f"learn-{source}") for source in there or SOURCES})
    return markdown(table(load(what)), sizes=what == "ladder")


def table(recording: dict) -> list[dict]:
    """For each variant the mean and the standard error of every figure over its seeds."""
    rows = []
    for name, variant in recording["variants"].items():
        figures = [run["figures"] for run in variant["runs"]]
        row = {"variant": name, "seeds": len(figures)}
        for key in figures[0]:
            values = np.array([f[key] for f in figures], float)
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            row |= {key: float(values.mean()), f"{key}_error": float(error)}
        rows.append(row)
    return rows


def markdown(rows: list[dict], sizes: bool = False) -> str:
    """Variant, share positive, KL, gold score, diversity, fluency, length; mean ± standard error over seeds.

    ``sizes`` adds what differs between policies of other sizes before PPO.
    """
    size = {
        "parameters, M": ("parameters", 1e-6, 1),
        "SFT loss, nats": ("sft_loss", 1, 2),
        "ends by itself, %": ("eos_rate_before", 100, 1),
    }
    columns = (size if sizes else {}) | {
        "reward model, % as gold": ("reward_model", 100, 1), "annotator-positive, %": ("positive", 100, 1),
        "KL, nats": ("kl", 1, 2), "gold score": ("gold", 1, 2), "independent-positive, %": ("independent", 100, 1),
        "distinct-3 kept": ("distinct", 1, 2), "−log π_ref, nats a token": ("surprise", 1, 2), "tokens": ("length", 1, 1),
    }  # fmt: skip
    lines = ["| variant | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [f"{f * row[key]:.{d}f} ± {f * row[f'{key}_error']:.{d}f}" for key, f, d in columns.values()]
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
