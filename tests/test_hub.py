"""Where a file is looked for, in which order, and how fast and clearly it ends when nothing answers.

The servers here are real sockets on 127.0.0.1: one stays silent, one drips headers for ever, one refuses, one is a
small hub, one a proxy.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from rlhf_nb_utils import hub
from rlhf_nb_utils.config import CourseError

PROXIES = [name for word in ("HTTP", "HTTPS", "ALL", "NO") for name in (f"{word}_PROXY", f"{word}_proxy".lower())]
COMMIT = "c" * 40
HOLD = 30.0  # seconds a server goes on misbehaving: far longer than anybody should wait for it


def serve(respond):
    """Calls ``respond(connection)`` in a thread for each connection; returns (address, connections seen, stop)."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen, stop = [], threading.Event()

    def handle(connection):
        with connection:
            respond(connection, stop)

    def loop():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            seen.append(connection)
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}", seen, stop


@pytest.fixture
def silent():
    listener, url, seen, stop = serve(lambda connection, stop: stop.wait(HOLD))
    yield url, seen
    stop.set()
    listener.close()


@pytest.fixture
def dripping():
    """Answers one header a moment: each read succeeds, the answer never ends."""
    finished = threading.Event()

    def respond(connection, stop):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        end = time.monotonic() + HOLD
        while time.monotonic() < end and not stop.wait(0.1):
            connection.sendall(b"X-Drip: 1\r\n")
        finished.set()

    listener, url, _, stop = serve(respond)
    yield url, finished
    stop.set()
    listener.close()


@pytest.fixture
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


class Hub:
    """The few routes of a hub that downloading needs; also answers absolute URLs, as a proxy does."""

    def __init__(self):
        self.files, self.requests, self.status = {}, [], None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                owner.requests.append(f"{self.command} {self.path}")
                path = self.path.split("?")[0]
                path = "/" + path.split("/", 3)[3] if path.startswith("http") else path
                if owner.status:
                    return self.reply(owner.status)
                if path.startswith("/api/"):
                    return self.api(path)
                repo, _, filename = path.lstrip("/").partition("/resolve/main/")
                if COMMIT in path:
                    repo, _, filename = path.lstrip("/").partition(f"/resolve/{COMMIT}/")
                names = owner.files.get(repo)
                if names is None:
                    return self.reply(404, X_Error_Code="RepoNotFound")
                if filename not in names:
                    return self.reply(404, X_Error_Code="EntryNotFound")
                return self.reply(200, names[filename], ETag=f'"{abs(hash(filename)):040x}"')

            do_HEAD = do_GET

            def api(self, path):
                repo = "/".join(path.split("/")[3:5])
                if "/tree/" in path:
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in owner.files[repo].items()
                    ]
                    return self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
                info = {"id": repo, "sha": COMMIT, "siblings": [], "tags": [], "private": False, "downloads": 0}
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def small_hub():
    small = Hub()
    yield small
    small.server.shutdown()
    small.server.server_close()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path, refusing):
    """An empty cache, no mirror, no proxies, own data folder, and an endpoint where nobody is."""
    for name in (*PROXIES, "RLHF_NB_MIRROR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "DATA", tmp_path / "data")
    monkeypatch.setitem(hub._state, "raised_here", False)
    monkeypatch.chdir(tmp_path)
    endpoint(monkeypatch, refusing)
    yield
    hub._set_offline(False)
    huggingface_hub.close_session()


def endpoint(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    huggingface_hub.close_session()  # a client reads the proxies when it is made


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def put_cached(tmp_path, repo_id, **files):
    """The layout of the Hugging Face cache, written by hand."""
    repo = tmp_path / "cache" / ("models--" + repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return put(repo / "snapshots" / COMMIT, **files)


def tokenizer_files():
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "good": 1, "film": 2}, "unk_token": "[UNK]"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    return {"tokenizer__json": json.dumps(tokenizer), "tokenizer_config__json": json.dumps(settings)}


# ---- the order of the places ----


def test_a_folder_of_data_models_comes_before_the_mirror(monkeypatch, tmp_path):
    own = put(tmp_path / "data/models/tiny", config__json="{}", model__safetensors="x")
    put(tmp_path / "mirror/tiny", config__json="{}", model__safetensors="x")
    monkeypatch.setenv("RLHF_NB_MIRROR", str(tmp_path / "mirror"))
    assert hub.resolve("tiny", "config.json") == own / "config.json"
    assert hub.local_dir("tiny") == own
    assert hub.model_dir("tiny") == str(own)


def test_a_file_of_the_mirror_never_touches_cache_or_network(monkeypatch, tmp_path, silent):
    endpoint(monkeypatch, silent[0])
    mirrored = put(tmp_path / "mirror/some/repo", config__json="mirror", model__safetensors="x")
    put_cached(tmp_path, "some/repo", config__json="cache", model__safetensors="x")
    monkeypatch.setenv("RLHF_NB_MIRROR", str(tmp_path / "mirror"))
    assert hub.resolve("some/repo", "config.json").read_text() == "mirror"
    assert hub.model_dir("some/repo") == str(mirrored)
    assert not silent[1]
    assert not constants.HF_HUB_OFFLINE


def test_a_dataset_is_found_in_the_mirror_by_its_repository_id(monkeypatch, tmp_path):
    put(tmp_path / "mirror/stanfordnlp/imdb/plain_text", **{"test-00000-of-00001__parquet": "rows"})
    monkeypatch.setenv("RLHF_NB_MIRROR", str(tmp_path / "mirror"))
    path = hub.resolve("stanfordnlp/imdb", "plain_text/test-00000-of-00001.parquet", repo_type="dataset")
    assert path.read_text() == "rows"


def test_a_cached_model_is_handed_over_as_a_folder_without_a_question_to_the_network(monkeypatch, tmp_path, silent):
    endpoint(monkeypatch, silent[0])
    folder = put_cached(tmp_path, "some/repo", config__json="{}", model__safetensors="x", **tokenizer_files())
    assert hub.resolve("some/repo", "config.json") == folder / "config.json"
    assert hub.model_dir("some/repo") == str(folder)
    assert hub.tokenizer_dir("some/repo") == str(folder)
    assert not silent[1]


def test_a_mirror_given_relative_to_the_repository_is_found_from_any_folder(monkeypatch, tmp_path):
    put(tmp_path / "shared/hub/some/repo", config__json="{}")
    (tmp_path / "checkout").mkdir()
    monkeypatch.setattr(hub, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("RLHF_NB_MIRROR", "../shared/hub")
    (tmp_path / "a/b/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b/c")
    assert hub.resolve("some/repo", "config.json").read_text() == "{}"


def test_a_model_may_be_given_by_the_path_of_its_folder(tmp_path):
    folder = put(tmp_path / "runs/stages/sft", config__json="{}", model__safetensors="x")
    assert hub.model_dir(str(folder)) == str(folder)
    assert hub.model_dir(folder) == str(folder)
    assert hub.model_dir("runs/stages/sft") == str(folder)


# ---- complete or not ----


def test_a_mirror_with_only_a_tokenizer_gives_the_tokenizer_and_a_clear_error_for_weights(monkeypatch, tmp_path):
    put(tmp_path / "mirror/some/repo", **tokenizer_files())
    monkeypatch.setenv("RLHF_NB_MIRROR", str(tmp_path / "mirror"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir("some/repo"))
    assert tokenizer("good film")["input_ids"] == [1, 2]
    with pytest.raises(hub.HubError, match=r"some/repo: model\.safetensors .*holds only its tokenizer"):
        hub.model_dir("some/repo")


def test_sharded_weights_count_only_when_every_shard_is_there(tmp_path):
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    files = {"config__json": "{}", "model__safetensors__index__json": index, "one__safetensors": "x"}
    folder = put(tmp_path / "data/models/big", **files)
    with pytest.raises(hub.HubError, match=r"has no model\.safetensors, or not all of it"):
        hub.model_dir("big")
    (folder / "two.safetensors").write_text("x")
    assert hub.model_dir("big") == str(folder)


def test_an_embedded_folder_that_lacks_a_file_never_asks_the_network(monkeypatch, tmp_path, silent):
    endpoint(monkeypatch, silent[0])
    put(tmp_path / "data/models/tiny", **tokenizer_files())
    with pytest.raises(hub.HubError, match=r"tiny has no model\.safetensors.*data/build\.py"):
        hub.model_dir("tiny")
    with pytest.raises(hub.HubError, match=r"tiny has no config\.json"):
        hub.resolve("tiny", "config.json")
    assert not silent[1]


# ---- nothing answers ----


def assert_one_helpful_line(message):
    assert "\n" not in message
    for part in ("config.json", "some/repo", "cache", "RLHF_NB_MIRROR", "embedded"):
        assert part in message, part


def test_a_silent_server_ends_in_one_line_while_it_is_still_silent(monkeypatch, silent):
    endpoint(monkeypatch, silent[0])
    assert hub.PROBE_SECONDS <= 2
    start = time.monotonic()
    with pytest.raises(hub.HubError) as error:
        hub.resolve("some/repo", "config.json")
    assert time.monotonic() - start < HOLD / 3  # the limit itself is PROBE_SECONDS; the machine may be busy
    assert silent[1], "the endpoint was not asked"
    assert issubclass(hub.HubError, CourseError)
    assert_one_helpful_line(str(error.value))
    assert "did not answer within 2 s" in str(error.value)


def test_a_server_that_drips_headers_does_not_hold_us(monkeypatch, dripping):
    endpoint(monkeypatch, dripping[0])
    with pytest.raises(hub.HubError, match="did not answer within 2 s"):
        hub.resolve("some/repo", "config.json")
    assert not dripping[1].is_set(), "waited until the server gave up"


def test_a_refusing_server_ends_in_one_line():
    for ask in (lambda: hub.resolve("some/repo", "config.json"), lambda: hub.snapshot("some/repo", ["config.json"])):
        with pytest.raises(hub.HubError) as error:
            ask()
        assert_one_helpful_line(str(error.value))


@pytest.mark.parametrize("status", [407, 502, 504])
def test_a_gateway_error_counts_as_not_reachable(monkeypatch, small_hub, status):
    endpoint(monkeypatch, small_hub.url)
    small_hub.status = status
    with pytest.raises(hub.HubError, match=f"answered {status}"):
        hub.resolve("some/repo", "config.json")
    assert len(small_hub.requests) == 1  # the libraries would have tried again and again


def test_weights_not_reachable_are_refused_before_from_pretrained_can_hang(monkeypatch, silent):
    endpoint(monkeypatch, silent[0])
    with pytest.raises(hub.HubError, match=r"some/repo: model\.safetensors is neither"):
        hub.model_dir("some/repo")
    with pytest.raises(hub.HubError, match=r"some/repo: tokenizer\.json is neither"):
        hub.tokenizer_dir("some/repo")


def test_after_a_failed_probe_the_libraries_themselves_are_offline(monkeypatch, silent):
    import datasets
    import transformers

    endpoint(monkeypatch, silent[0])
    with pytest.raises(hub.HubError):
        hub.resolve("some/repo", "config.json")
    asked = len(silent[1])
    assert huggingface_hub.is_offline_mode() and transformers.utils.hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE and datasets.config.HF_DATASETS_OFFLINE
    with pytest.raises(OSError):
        transformers.AutoConfig.from_pretrained("some/repo")
    with pytest.raises((OSError, ValueError)):
        datasets.load_dataset("some/repo")
    assert len(silent[1]) == asked, "a library went to the network all the same"


def test_when_the_network_comes_back_it_is_used_again(monkeypatch, small_hub):
    with pytest.raises(hub.HubError):
        hub.resolve("some/repo", "config.json")
    assert constants.HF_HUB_OFFLINE
    small_hub.files["some/repo"] = {"config.json": b"{}"}
    endpoint(monkeypatch, small_hub.url)
    assert hub.resolve("some/repo", "config.json").read_bytes() == b"{}"
    assert not constants.HF_HUB_OFFLINE


def test_hf_hub_offline_set_after_import_is_obeyed(monkeypatch, small_hub):
    small_hub.files["some/repo"] = {"config.json": b"{}"}
    endpoint(monkeypatch, small_hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match=r"HF_HUB_OFFLINE is set\).*unset HF_HUB_OFFLINE"):
        hub.resolve("some/repo", "config.json")
    assert not small_hub.requests
    assert constants.HF_HUB_OFFLINE
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.resolve("some/repo", "config.json").read_bytes() == b"{}"


def test_hf_hub_offline_set_before_import_is_obeyed_and_stays(tmp_path, small_hub):
    small_hub.files["some/repo"] = {"config.json": b"{}"}
    code = (
        "from rlhf_nb_utils import hub\n"
        "for _ in range(2):\n"
        "    try: hub.resolve('some/repo', 'config.json')\n"
        "    except hub.HubError as error: print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": small_hub.url, "HF_HOME": str(tmp_path)}
    root = Path(hub.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.count("HF_HUB_OFFLINE is set") == 2
    assert not small_hub.requests


# ---- the network answers ----


def test_what_no_place_has_is_downloaded_once_and_then_cached(monkeypatch, small_hub):
    small_hub.files["some/repo"] = {"config.json": b'{"n": 1}'}
    endpoint(monkeypatch, small_hub.url)
    assert hub.resolve("some/repo", "config.json").read_bytes() == b'{"n": 1}'
    asked = len(small_hub.requests)
    assert hub.resolve("some/repo", "config.json").read_bytes() == b'{"n": 1}'
    assert len(small_hub.requests) == asked


def test_a_reachable_repository_is_handed_over_by_its_id(monkeypatch, small_hub):
    small_hub.files["some/repo"] = {"config.json": b"{}", "model.safetensors": b"x"}
    endpoint(monkeypatch, small_hub.url)
    assert hub.model_dir("some/repo") == "some/repo"


def test_a_snapshot_is_complete_and_serves_offline_afterwards(monkeypatch, small_hub, refusing):
    small_hub.files["some/repo"] = {"a/one.json": b"1", "a/two.json": b"2", "other.bin": b"3"}
    endpoint(monkeypatch, small_hub.url)
    folder = hub.snapshot("some/repo", ["a/*.json"])
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["one.json", "two.json"]
    assert not (folder / "other.bin").exists()
    endpoint(monkeypatch, refusing)
    assert hub.snapshot("some/repo", ["a/*.json"]) == folder
    with pytest.raises(hub.HubError):
        hub.snapshot("some/repo", ["*.bin"])


def test_what_the_hub_does_not_have_is_said_in_one_line(monkeypatch, small_hub, tmp_path):
    small_hub.files["some/repo"] = {"config.json": b"{}"}
    endpoint(monkeypatch, small_hub.url)
    with pytest.raises(hub.HubError, match=r"some/repo has no file nothing\.json: check"):
        hub.resolve("some/repo", "nothing.json")
    put(tmp_path / "data/models/tiny-gpt2", config__json="{}")
    with pytest.raises(hub.HubError, match=r"tiny-gtp2 does not exist at .*did you mean tiny-gpt2\?"):
        hub.resolve("tiny-gtp2", "config.json")


@pytest.mark.parametrize("name", ["", "/no/such/folder", "a/b/c", "what is this?"])
def test_a_name_that_cannot_be_one_is_refused_at_once(monkeypatch, silent, name):
    endpoint(monkeypatch, silent[0])
    for ask in (hub.model_dir, lambda n: hub.resolve(n, "x"), lambda n: hub.snapshot(n, ["x"])):
        with pytest.raises(hub.HubError) as error:
            ask(name)
        assert "\n" not in str(error.value)
    assert not silent[1]


def test_the_proxy_is_what_is_asked_and_no_proxy_is_respected(monkeypatch, small_hub, refusing):
    small_hub.files["some/repo"] = {"config.json": b"{}"}
    monkeypatch.setenv("HTTP_PROXY", small_hub.url)  # the small hub answers for a host that does not exist
    endpoint(monkeypatch, "http://hub.invalid")
    assert hub.resolve("some/repo", "config.json").read_bytes() == b"{}"
    assert small_hub.requests[0].startswith("HEAD http://hub.invalid/some/repo/resolve/main/config.json")

    monkeypatch.setenv("HTTP_PROXY", refusing)
    endpoint(monkeypatch, small_hub.url)
    with pytest.raises(hub.HubError, match="other/repo"):
        hub.resolve("other/repo", "config.json")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    small_hub.files["other/repo"] = {"config.json": b"[]"}
    endpoint(monkeypatch, small_hub.url)
    assert hub.resolve("other/repo", "config.json").read_bytes() == b"[]"


def test_a_silent_proxy_ends_as_a_silent_server_does(monkeypatch, silent):
    monkeypatch.setenv("HTTPS_PROXY", silent[0])
    endpoint(monkeypatch, "https://hub.invalid")
    with pytest.raises(hub.HubError, match="did not answer within 2 s"):
        hub.resolve("some/repo", "config.json")
    assert silent[1]
