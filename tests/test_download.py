"""Weights by their address: fetched once, checked, never half in the cache. The host is local."""

import hashlib
import http.server
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save

from cli.errors import WeightsError
from port_weights import zoo
from port_weights.download import cache_file, download
from port_weights.names import convert
from storage.adapt import read_pretrained
from storage.weights import read_weights
from tools.predict import predict

from .helpers.tiny_run import ROOT, make_images, make_run

DATA = bytes(range(1, 256)) * 5000  # more than a block


class Host(http.server.BaseHTTPRequestHandler):
    """Serves `files`; each with its headers, perhaps behind a redirect, perhaps cut short."""

    files: dict = {}
    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        data, headers = self.files.get(self.path, (None, {}))
        reason = headers.pop("reason", None)  # None: the usual one
        self.send_response(404 if data is None else 302 if "Location" in headers else 200, reason)
        headers = {"Content-Length": len(data or b""), **headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def host(cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Host.files, Host.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(zoo, "HOSTS", (address, address))
    yield address
    server.shutdown()
    server.server_close()


def etag(data, kind="md5"):
    return f'"{hashlib.new(kind, data).hexdigest()}"'


def kept(tmp_path):
    """Files of the cache that are neither locks nor sums."""
    found = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    return sorted(p.name for p in found if p.suffix != ".sha256")


def test_a_file_is_fetched_once_and_compared_with_the_hosts_md5(host, tmp_path, capsys):
    Host.files["/deit/a.pth"] = DATA, {"ETag": etag(DATA)}
    folder = cache_file(f"{host}deit/a.pth").parent
    folder.mkdir(parents=True)
    (folder / ".a.pth.1-2.tmp").write_bytes(b"left by a download that was killed")
    path = download(f"{host}deit/a.pth")
    assert path.read_bytes() == DATA and path.is_relative_to(tmp_path / "cache")
    said = capsys.readouterr().err
    assert f"MD5 {hashlib.md5(DATA).hexdigest()}, as the host says; kept as {path}" in said
    assert download(f"{host}deit/a.pth") == path
    assert Host.asked == ["/deit/a.pth"] and kept(tmp_path) == ["a.pth"]
    path.write_bytes(DATA[:-1])
    assert download(f"{host}deit/a.pth").read_bytes() == DATA
    assert "damaged in the cache" in capsys.readouterr().err


def test_the_sha256_of_the_first_answer_counts_behind_a_redirect(host, tmp_path):
    linked = {"X-Linked-Etag": etag(DATA, "sha256"), "Location": f"{host}far"}
    Host.files = {"/timm/x": (b"", linked), "/far": (DATA, {"ETag": etag(b"of a part") + "-2"})}
    assert download(f"{host}timm/x").read_bytes() == DATA
    Host.files["/timm/y"] = b"", {**linked, "X-Linked-Etag": etag(b"other", "sha256")}
    with pytest.raises(WeightsError, match="its sha256 is .*, not .* as the host says"):
        download(f"{host}timm/y")
    assert kept(tmp_path) == ["x"]


def test_the_sum_in_the_address_is_what_counts_and_no_tag_that_is_no_checksum(
    host, tmp_path, capsys
):
    Host.files["/a.pth"] = DATA, {"ETag": etag(b"of an encrypted object")}
    with pytest.raises(WeightsError, match="its MD5 is"):
        download(f"{host}a.pth")
    digest = hashlib.sha256(DATA).hexdigest()
    download(f"{host}a.pth#sha256={digest}")
    with pytest.raises(WeightsError, match=f"its sha256 is {digest}, not 0000"):
        download(f"{host}a.pth#sha256={'0' * 64}")
    with pytest.raises(WeightsError, match="64 hexadecimal digits"):
        download(f"{host}a.pth#sha256=12")
    assert kept(tmp_path) == ["a.pth"]  # the one that was right is still there
    for number, tag in enumerate((etag(DATA) + "-2", 'W/"abc"', etag(b"git", "sha1"))):
        Host.files[f"/{number}.pth"] = DATA, {"ETag": tag}
        download(f"{host}{number}.pth")
        assert f"sha256 {digest}, of which the host says nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data,headers,message",
    [
        (DATA[:-9], {"Content-Length": len(DATA)}, "cannot be downloaded to .*: .*9 more expected"),
        (b"<html>log in</html>", {}, "a web page"),
        (DATA[:-9], {"Content-Length": None}, "neither a length nor a checksum"),
        (b"version https://git-lfs", {}, "a git-lfs pointer"),
        (None, {}, "a.pth: cannot be downloaded: Not Found"),
        (None, {"reason": ""}, "a.pth: cannot be downloaded: HTTP Error 404"),
        (b"", {"Location": "https://127.0.0.1/"}, "sent elsewhere"),
    ],
)
def test_what_is_not_the_file_is_not_kept(host, tmp_path, data, headers, message):
    Host.files["/a.pth"] = data, headers
    with pytest.raises(WeightsError, match=message):
        download(f"{host}a.pth")
    assert kept(tmp_path) == []


def test_other_hosts_and_ways_out_of_the_cache_are_refused():
    for address in (
        "https://example.org/a.pth",
        "http://huggingface.co/timm/a.pth",
        "https://huggingface.co@example.org/a.pth",
        f"{zoo.HOSTS[0]}deit/../../../a.pth",
        f"{zoo.HOSTS[0]}deit/%2e%2e/%2e%2e/a.pth",
    ):
        with pytest.raises(WeightsError, match="files are fetched from https://dl.fbaipublic"):
            download(address)


def test_of_several_processes_one_fetches(host, tmp_path):
    Host.files["/a.pth"] = DATA, {"ETag": etag(DATA)}
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from port_weights import download, zoo\nzoo.HOSTS = ('{host}',)\n"
        f"assert download.download('{host}a.pth').stat().st_size == {len(DATA)}"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert Host.asked == ["/a.pth"] and kept(tmp_path) == ["a.pth"]


def timms(state):
    """A safetensors file with timm's names."""
    return save(convert(state, "paddle", "timm")[0])


def test_an_address_is_read_by_all_whosever_names_its_file_has(host, tmp_path):
    weights = make_run(tmp_path / "run")
    state = read_weights(weights).state
    Host.files["/timm/model.safetensors"] = timms(state), {}
    Host.files["/a/best.pdparams"] = weights.read_bytes(), {}
    for address in (f"{host}timm/model.safetensors", f"{host}a/best.pdparams"):
        for _ in range(2):  # fetched once
            found = read_pretrained(address).state
            assert found.keys() == state.keys()
            for name, value in state.items():
                np.testing.assert_array_equal(found[name], value)
    cfg, images = weights.with_name("config.yaml"), make_images(tmp_path, 2)
    weights.with_name("classes.txt").unlink()
    assert predict(images, f"{host}timm/model.safetensors", cfg) == predict(images, weights, cfg)
    assert Host.asked == ["/timm/model.safetensors", "/a/best.pdparams"]


def test_a_name_of_the_zoo_is_a_file_here_or_what_the_first_host_that_answers_has(
    host, tmp_path, monkeypatch, capsys
):
    weights, entry = make_run(tmp_path / "run"), zoo.find("resmlp_12_224")
    state = read_weights(weights).state
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError) as offline:
        read_pretrained("resmlp_12_224")
    for part in (entry.url, "-checkpoint resmlp_12_no_dist.pth`", "makes resmlp_12_224.pdparams"):
        assert part in str(offline.value)
    hub, facebook = (url.replace(host, "/") for url in (entry.hub_url, entry.url))
    Host.files[facebook] = save(convert(state, "paddle", "facebook")[0]), {}
    Host.files[hub] = timms({**state, "norm.beta": state["norm.beta"] + 1}), {}
    for name in ("./resmlp_12_224", "resmlp_12_224.pdparams", "resmlp_12_224.fb_in1k"):
        assert "/timm/" in read_pretrained(name).path
    (tmp_path / "resmlp_12_224.pdparams").write_bytes(weights.read_bytes())
    for name in ("resmlp_12_224", "resmlp_12_224.pdparams"):
        assert read_pretrained(name).path == "resmlp_12_224.pdparams"
    assert Host.asked == [hub, facebook, hub]


def test_without_a_network_there_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="resmlp_12_no_dist.pth: cannot be downloaded: ") as one:
        read_pretrained(zoo.find("resmlp_12_224").url)
    assert "\n" not in str(one.value)
