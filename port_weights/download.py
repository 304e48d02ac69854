"""Published weight files by their address: downloaded once, checked, and kept.

    local_weights("https://dl.fbaipublicfiles.com/deit/resmlp_24_dist.pth")

The cache is ``resmlp/weights`` in ``XDG_CACHE_HOME`` (``~/.cache``). Beside each file stands its
sha256, which is compared at every later use; no network is needed then.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from cli.errors import WeightsError
from port_weights.torch_files import read_torch_weights
from port_weights.zoo import HOSTS
from storage.files import atomic, cache_folder, file_sha256, write_atomically
from storage.weights import refuse_text

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

_TIMEOUT = 30  # seconds without a byte


def is_address(name: str | os.PathLike) -> bool:
    """Whether a name begins as an address of the web does."""
    return bool(re.match(r"https?://", str(name)))


def local_weights(name: str | os.PathLike, hosts: tuple[str, ...] = HOSTS) -> str:
    """The file that an address means, ported to Paddle where it is PyTorch's; a path stays.

    Args:
        name: a path, or an address as `download` takes it.
        hosts: see `download`.

    Raises:
        WeightsError: as `download`; the file is no ResMLP.
    """
    if not is_address(name):
        return str(name)
    path = download(str(name), hosts)
    if path.suffix == ".pdparams":
        return str(path)
    ported = path.with_name(f"{path.name}.pdparams")
    with _alone(ported):
        if _whole(ported) is None:
            from port_weights.port import port  # with Paddle, as ProgressLine below

            state, _ = read_torch_weights(str(path))
            if "patch_embed.patch_embed.weight" in state:  # Paddle's names already
                return str(path)
            port(state, str(ported), proof="keys", log=lambda line: None)
            _keep_sum(ported, file_sha256(ported))
    return str(ported)


def download(address: str, hosts: tuple[str, ...] = HOSTS) -> Path:
    """The file behind an address, from the cache or from its host.

    Args:
        address: begins with one of ``hosts``; ``#sha256=<64 digits>`` at its end says what the
            file must be. Without that, what the host says is compared: Hugging Face gives the
            sha256 of its large files (``X-Linked-Etag``), S3 the MD5 of what was uploaded in one
            part (``ETag``), and both the length.
        hosts: beginnings of addresses, each with the slash behind the host.

    Raises:
        WeightsError: another host; no network; not what it must be. Nothing is kept then.
    """
    url, _, fragment = address.partition("#")
    if not url.startswith(hosts) or ".." in unquote(url):
        raise WeightsError(
            f"{url}: files are fetched from {' and '.join(hosts)} only; download it yourself"
        )
    if fragment and not re.fullmatch("sha256=[0-9a-f]{64}", fragment):
        raise WeightsError(f"{address}: after # stands sha256= and 64 hexadecimal digits")
    wanted, path = fragment[len("sha256=") :], cache_file(url)
    with _alone(path):
        found = _whole(path)
        if found is None or (wanted and found != wanted):
            _fetch(url, path, wanted)
    return path


def cache_file(url: str) -> Path:
    """Where the file of an address is kept."""
    parts = urlsplit(url)
    host, names = parts.netloc.replace(":", "_"), unquote(parts.path).strip("/")
    return cache_folder() / "weights" / host / names


class _Redirects(HTTPRedirectHandler):
    """Keeps the headers on the way to a file, and stays with the scheme."""

    def __init__(self) -> None:
        self.headers: list = []

    def redirect_request(self, request, file, code, message, headers, target):
        self.headers.append(headers)
        if urlsplit(target).scheme != urlsplit(request.full_url).scheme:
            raise HTTPError(target, code, "sent elsewhere, without https", headers, file)
        return super().redirect_request(request, file, code, message, headers, target)


def _fetch(url: str, path: Path, wanted: str) -> None:
    from utils import ProgressLine  # with Paddle, which an answer from the cache does without

    redirects, sha256, md5 = _Redirects(), hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    bar = ProgressLine(f"{path.name}, MB")
    try:
        request = Request(url, headers={"User-Agent": "resmlp"})
        with (
            atomic(path) as file,
            build_opener(redirects).open(request, timeout=_TIMEOUT) as response,
        ):
            said = [*redirects.headers, response.headers]
            total, head = int(response.headers.get("Content-Length") or 0), b""
            while block := response.read(2**20):
                head = head or block[:16]
                file.write(block)
                sha256.update(block)
                md5.update(block)
                bar(file.tell() >> 20, max(total, file.tell()) >> 20)
            size = file.tell()
            if total and size != total:
                raise http.client.IncompleteRead(b"", total - size)
            how = _compare(url, said, wanted, sha256.hexdigest(), md5.hexdigest())
            refuse_text(head, url)
            _keep_sum(path, sha256.hexdigest())
            Path(f"{path}.pdparams.sha256").unlink(missing_ok=True)  # what was ported from it
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{url}: cannot be downloaded to {path.parent}: {str(reason) or type(error).__name__}; "
            f"a file from elsewhere can be given by its path"
        ) from None
    finally:
        bar.end()
    print(f"{url}: {size / 2**20:.1f} MB, {how}; kept as {path}", file=sys.stderr, flush=True)


def _compare(url: str, said: list, wanted: str, sha256: str, md5: str) -> str:
    """Raises where a checksum is another than it must be; says which one was compared."""
    linked = next((h["X-Linked-Etag"] for h in said if h["X-Linked-Etag"]), "").strip('"')
    etag = (said[-1]["ETag"] or "").strip('"')
    if wanted:
        kind, expected, found, source = "sha256", wanted, sha256, "as given"
    elif re.fullmatch("[0-9a-f]{64}", linked):
        kind, expected, found, source = "sha256", linked, sha256, "as the host says"
    elif re.fullmatch("[0-9a-f]{32}", etag):
        kind, expected, found, source = "MD5", etag, md5, "as the host says"
    else:
        return f"sha256 {sha256}, of which the host says nothing"
    if found != expected:
        raise WeightsError(
            f"{url}: its {kind} is {found}, not {expected} {source}; try again, or add "
            f"#sha256={sha256} to the address if that is the file you want"
        )
    return f"{kind} {found}, {source}"


def _whole(path: Path) -> str | None:
    """The sha256 of a kept file, if it is the one that was kept."""
    try:
        kept, found = Path(f"{path}.sha256").read_text(encoding="utf-8").strip(), file_sha256(path)
    except (OSError, UnicodeDecodeError):
        return None
    if found == kept:
        return found
    print(f"{path}: damaged in the cache, made anew", file=sys.stderr, flush=True)
    return None


def _keep_sum(path: Path, digest: str) -> None:
    write_atomically(f"{digest}\n".encode(), f"{path}.sha256")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where its folder can be written and has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_name(f".{path.name}.lock"), "w"))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
