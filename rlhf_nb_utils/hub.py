"""Finds files: folders of data/models first, then the mirror, then the Hugging Face cache, then the network.

Before any use of the network the configured endpoint is asked, through the client (proxies, ``HF_ENDPOINT``,
certificates) that would download, and given two seconds. When it stays silent the libraries' own offline flags are
raised, because left alone they retry for minutes; ``HF_HUB_OFFLINE`` in the environment is read only at import.
Knows where files lie and not what they mean: it loads no model and imports neither transformers nor datasets.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from rlhf_nb_utils.config import DATA, ROOT, CourseError

PROBE_SECONDS = 2.0
SETTINGS = ("config.json", "tokenizer_config.json")
WEIGHTS = ("model.safetensors",)  # or `<name>.index.json` and every shard it lists
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("tokenizer.model",))
_TRUE = {"1", "ON", "YES", "TRUE"}  # what huggingface_hub takes for true
_state = {"raised_here": False}  # whether the offline flags are ours, and the next call may ask again

Find = Callable[[str], "Path | None"]  # a file's name in a repository -> where it lies


class HubError(CourseError):
    """A file that is neither in data/models, mirror or cache nor reachable."""


def mirror_dir() -> Path | None:
    """The folder ``RLHF_NB_MIRROR`` names, if any. A relative one is looked for here, then from the repository."""
    value = os.environ.get("RLHF_NB_MIRROR")
    if not value:
        return None
    here = Path(value).expanduser()
    return (here if here.is_dir() else ROOT / here).resolve()


def local_dir(name: str) -> Path | None:
    """The folder of ``name``: of data/models, any other folder by its path, or of the mirror. None if there is none."""
    own = _own_folder(name)
    mirrored = mirror_dir() / name if mirror_dir() else None
    return own or (mirrored if mirrored and mirrored.is_dir() else None)


def resolve(repo_id: str, filename: str, repo_type: str = "model") -> Path:
    """Path of one file, downloaded if it must be. Raises HubError within three seconds where it cannot be had."""
    for find in _places(repo_id, repo_type):
        if path := find(filename):
            return path
    return Path(_download(huggingface_hub.hf_hub_download, repo_id, filename, repo_type))


def snapshot(repo_id: str, patterns: list[str], repo_type: str = "model") -> Path:
    """Folder that holds every file matching ``patterns`` (globs). Raises HubError as `resolve` does.

    The cache cannot tell whether it has all the files of a glob, so it is used only where the network is not there.
    """
    folder = local_dir(repo_id)
    if not (folder and all(any(folder.rglob(pattern)) for pattern in patterns)):
        try:
            folder = Path(_download(huggingface_hub.snapshot_download, repo_id, patterns, repo_type))
        except HubError:
            folder = None if _own_folder(repo_id) else _cached_snapshot(repo_id, patterns, repo_type)
            if folder is None:
                raise
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if missing := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        raise HubError(f"{repo_id} has no file {missing[0]}: check the name")
    return folder


def model_dir(name: str) -> str:
    """What to hand to ``from_pretrained`` for weights: a complete folder, or a repository id that answers just now.

    Raises HubError where the configuration or the weights cannot be had, instead of letting ``from_pretrained`` hang.
    """
    return _loadable(name, lambda find: bool(find("config.json")) and _has_weights(find), WEIGHTS[0])


def tokenizer_dir(name: str) -> str:
    """Like `model_dir`, for the tokenizer alone (a mirror may hold no more than that)."""
    return _loadable(name, _has_tokenizer, VOCABULARIES[0][0])


def _loadable(name: str, complete: Callable[[Find], bool], wanted: str) -> str:
    for find in _places(name):
        if complete(find):
            return str(next(path for path in map(find, SETTINGS) if path).parent)
    _download(huggingface_hub.hf_hub_download, name, "config.json", "model", wanted=wanted)
    return name


def _has_weights(find: Find) -> bool:
    for name in WEIGHTS:
        if find(name):
            return True
        if index := find(f"{name}.index.json"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return all(find(shard) for shard in shards)
    return False


def _has_tokenizer(find: Find) -> bool:
    return any(map(find, SETTINGS)) and any(all(map(find, names)) for names in VOCABULARIES)


def _own_folder(name: str) -> Path | None:
    """A folder of data/models, or one given by its path: never looked for on the network."""
    name = str(name)  # a Path will do
    if not name.strip():
        raise HubError(f"no model name given: use one of {', '.join(_embedded())}, a folder or a repository id")
    if name in _embedded():
        return DATA / "models" / name
    folder = Path(name).expanduser()
    return folder.resolve() if folder.is_dir() else None


def _embedded() -> list[str]:
    models = DATA / "models"
    return sorted(path.name for path in models.iterdir() if path.is_dir()) if models.is_dir() else []


def _in_folder(folder: Path) -> Find:
    return lambda filename: folder / filename if (folder / filename).is_file() else None


def _places(repo_id: str, repo_type: str = "model") -> list[Find]:
    """Where to look before the network, in order."""
    folders = [_in_folder(folder)] if (folder := local_dir(repo_id)) else []
    return folders if _own_folder(repo_id) else [*folders, lambda name: _cached(repo_id, name, repo_type)]


def _cached(repo_id: str, filename: str, repo_type: str) -> Path | None:
    _validate(repo_id)
    path = huggingface_hub.try_to_load_from_cache(repo_id, filename, repo_type=repo_type)
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None


def _cached_snapshot(repo_id: str, patterns: list[str], repo_type: str) -> Path | None:
    try:
        options = {"allow_patterns": patterns, "repo_type": repo_type, "local_files_only": True}
        return Path(huggingface_hub.snapshot_download(repo_id, **options))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def _validate(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError:
        raise HubError(f"{repo_id!r} is no folder, and cannot be a repository id{_nearest(repo_id)}") from None


def _download(fetch: Callable, repo_id: str, files: str | list[str], repo_type: str, wanted: str = "") -> str:
    """``fetch`` (hf_hub_download or snapshot_download) after the probe, its many errors made one line of ours."""
    single = isinstance(files, str)
    wanted = wanted or (files if single else ", ".join(files))
    if own := _own_folder(repo_id):
        raise HubError(_incomplete(own, wanted))
    _validate(repo_id)
    url = huggingface_hub.hf_hub_url(repo_id, files if single else "config.json", repo_type=repo_type)
    if reason := _no_network(url):
        raise HubError(_unreachable(repo_id, wanted, reason))
    try:
        return fetch(repo_id, **{"filename" if single else "allow_patterns": files}, repo_type=repo_type)
    except errors.GatedRepoError:
        what = "is gated: accept its terms on its web page, then `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        what = f"does not exist at {constants.ENDPOINT} or is private (then `hf auth login`){_nearest(repo_id)}"
    except errors.RemoteEntryNotFoundError:
        what = f"has no file {files}: check the name"
    except Exception as error:  # the clients raise a dozen kinds, of three libraries
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        what = f": {wanted} could not be downloaded ({why}): try again, or set RLHF_NB_MIRROR to a folder that holds it"
        raise HubError(repo_id + what) from error
    raise HubError(f"{repo_id} {what}")


def _no_network(url: str) -> str | None:
    """Why the network is not to be used, or None. Raises or lowers the offline flags of the libraries accordingly."""
    if _state["raised_here"]:
        _set_offline(False)  # things may have changed since
    asked = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "").upper() in _TRUE]
    already = constants.HF_HUB_OFFLINE
    reason = f"{asked[0] if asked else 'HF_HUB_OFFLINE'} is set" if asked or already else _probe(url)
    if reason:
        _set_offline(True)
    _state["raised_here"] = reason is not None and not already
    return reason


def _set_offline(value: bool) -> None:
    """The attributes huggingface_hub 2, transformers 5 and datasets 5 look at when they are about to connect.

    transformers asks huggingface_hub. datasets copies the flag when it is imported, hence the second place.
    """
    constants.HF_HUB_OFFLINE = value
    if config := sys.modules.get("datasets.config"):
        value = value or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in _TRUE
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = value


def _probe(url: str) -> str | None:
    """None if anything of use answers within PROBE_SECONDS, else why not.

    A thread, because name lookup has no time limit of its own and the client's counts per socket operation.
    """
    answers: list[str | None] = []
    limit = f"{constants.ENDPOINT} did not answer within {PROBE_SECONDS:g} s"
    asked = threading.Event()

    def ask():
        try:
            client = huggingface_hub.get_session()
            asked.set()
            status = client.head(url, timeout=PROBE_SECONDS, follow_redirects=False).status_code
            answers.append(f"{constants.ENDPOINT} answered {status}" if status == 407 or status >= 500 else None)
        except Exception as error:
            late = "Timeout" in type(error).__name__
            answers.append(limit if late else f"{constants.ENDPOINT}: {type(error).__name__}")
            asked.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    asked.wait()  # the client reads certificates on its first use; that is not the network's time
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else limit


def _unreachable(repo_id: str, wanted: str, reason: str) -> str:
    mirror, folder = mirror_dir(), local_dir(repo_id)
    place = f"the mirror {mirror}" if mirror else "a mirror (RLHF_NB_MIRROR is not set)"
    if mirror and not mirror.is_dir():
        place += " (no such folder)"
    elif folder and _has_tokenizer(_in_folder(folder)) and not _has_weights(_in_folder(folder)):
        place += " (which holds only its tokenizer)"
    connect = f"unset {reason.split()[0]}" if reason.endswith("is set") else "connect to the internet"
    return (
        f"{repo_id}: {wanted} is neither in {place} nor in the cache {constants.HF_HUB_CACHE}, and not reachable "
        f"({reason}): set RLHF_NB_MIRROR to a folder that holds {repo_id}/{wanted}, {connect}, or use the embedded "
        f"profile (cpu){_nearest(repo_id)}"
    )


def _incomplete(folder: Path, filename: str) -> str:
    embedded = folder.parent == DATA / "models"
    remedy = "restore it with git, or run python data/build.py" if embedded else "name a complete folder"
    return f"{folder} has no {filename}, or not all of it: {remedy}"


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, _embedded(), n=1)
    return f"; did you mean {close[0]}?" if close else ""
