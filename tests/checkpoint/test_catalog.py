import hashlib
import http.server
import json
import socket
import threading

import pytest
import torch

from d2kit.checkpoint import catalog
from d2kit.checkpoint.catalog import cache_path, find_weights, hash_of_url, weights_url
from tests.support.reference_files import reference_path

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        type(self).asked.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        short = self.path.startswith("/short")
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if short else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback server; yields its address. The cache is in `tmp_path`."""
    monkeypatch.setenv("D2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("D2KIT_WEIGHTS", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_download_once_then_from_the_cache(server):
    first = find_weights(f"{server}/a/b.pkl#sha256={DIGEST}")
    assert first.read_bytes() == CONTENT
    assert find_weights(f"{server}/a/b.pkl") == first
    assert Handler.asked == ["/a/b.pkl"]


@pytest.mark.faults(30, fast=True)
def test_wrong_hash_keeps_nothing(server, tmp_path):
    with pytest.raises(ValueError, match=f"got {DIGEST}"):
        find_weights(f"{server}/b.pkl#sha256={'0' * 64}")
    assert [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")] == []


def test_damaged_cache_is_fetched_anew(server):
    url = f"{server}/b.pkl#sha256={DIGEST[:16]}"
    path = find_weights(url)
    path.write_bytes(b"damaged")
    assert find_weights(url).read_bytes() == CONTENT
    assert len(Handler.asked) == 2


@pytest.mark.parametrize("path", ["missing/b.pkl", "short/b.pkl"])
def test_failed_downloads_say_where_to_put_the_file(server, path):
    url = f"{server}/{path}"
    with pytest.raises(FileNotFoundError) as error:
        find_weights(url)
    assert str(cache_path(url)) in str(error.value)
    assert "D2KIT_WEIGHTS" in str(error.value)
    assert not cache_path(url).exists()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nPK cut",
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 300 + b"\r\nPK",
    ],
    ids=["cut chunk", "no HTTP", "headers"],
)
def test_answers_that_are_no_http_are_one_error(answer, monkeypatch, tmp_path):
    monkeypatch.setenv("D2KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(FileNotFoundError, match="nothing was kept"):
            find_weights(f"http://127.0.0.1:{listening.getsockname()[1]}/a.pth")
    assert not list((tmp_path / "cache").rglob("*.pth"))


def test_a_url_with_a_blank_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setenv("D2KIT_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="InvalidURL"):
        find_weights("http://127.0.0.1:1/a b\x01.pth")


def test_without_network_there_is_one_clear_error(server, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "ZOO_URL", "http://127.0.0.1:9/detectron2/")
    monkeypatch.setenv("D2KIT_WEIGHTS", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError) as error:
        find_weights("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert str(tmp_path / "mine/ImageNetPretrained/MSRA/R-50.pkl") in str(error.value)


@pytest.mark.parametrize("place", ["ImageNetPretrained/MSRA/R-50.pkl", "R-50.pkl"])
def test_the_offline_folder_comes_first(server, monkeypatch, tmp_path, place):
    monkeypatch.setenv("D2KIT_WEIGHTS", str(tmp_path / "mine"))
    (tmp_path / "mine" / place).parent.mkdir(parents=True)
    (tmp_path / "mine" / place).write_bytes(b"x")
    found = find_weights("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert found == tmp_path / "mine" / place


def test_names_become_urls(monkeypatch):
    zoo = weights_url("detectron2://COCO-Detection/x/1/model_final_a.pkl")
    assert zoo == "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/x/1/model_final_a.pkl"
    best = weights_url("torchvision://resnet50")
    first = weights_url("torchvision://ResNet50_Weights.IMAGENET1K_V1")
    assert best.startswith("https://download.pytorch.org/models/resnet50-")
    assert (first != best, hash_of_url(first)) == (True, "0676ba61")
    assert weights_url("/local/file.pth") == "/local/file.pth"
    with pytest.raises(ValueError, match="nearest: .*resnet50"):
        weights_url("torchvision://resnet5")
    with pytest.raises(ValueError, match="no weights named"):
        weights_url("torchvision://ResNet50_Weights.NOPE")


def test_torch_hub_cache_is_used_if_the_hash_fits(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("D2KIT_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url = f"https://download.pytorch.org/models/net-{DIGEST[:8]}.pth"
    path = tmp_path / "checkpoints" / f"net-{DIGEST[:8]}.pth"
    path.write_bytes(CONTENT)
    assert find_weights(url) == path
    path.write_bytes(b"damaged")
    monkeypatch.setattr(catalog, "download", lambda url: "downloaded")
    assert find_weights(url) == "downloaded"
    assert "not used" in caplog.text


@pytest.mark.parametrize("url", ["ftp://host/a.pkl", "http://host/"])
def test_odd_urls_are_refused(url, monkeypatch, tmp_path):
    monkeypatch.setenv("D2KIT_CACHE", str(tmp_path))
    with pytest.raises((ValueError, OSError)):
        find_weights(url)


def test_every_zoo_config_starts_from_weights_with_a_url():
    zoo = json.loads(reference_path("zoo_configs.json").read_text())
    names = {keys["MODEL.WEIGHTS"] for keys in zoo.values() if keys.get("MODEL.WEIGHTS")}
    schemes = {name.split("://")[0] for name in names}
    assert schemes == {"detectron2", "catalog"}
    assert all(weights_url(name).startswith("https://") for name in names)
    with pytest.raises(ValueError, match="ImageNetPretrained/FAIR/R-50-GN"):
        weights_url("catalog://ImageNetPretrained/FAIR/R-50-GM")
