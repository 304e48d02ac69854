"""Published weight files: downloaded once, checked, and kept in ``resmlp/weights`` of the cache.

The cache is in ``XDG_CACHE_HOME`` (``~/.cache``). Beside each file stands its sha256, which is
compared at every later use; no network is needed then.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from cli.errors import WeightsError
from cli.progress import ProgressLine
from port_weights import zoo
from storage.files import atomic, cache_folder, file_sha256, lock, write_atomically
from storage.weights import SUFFIXES, refuse_text

_TIMEOUT = 30  # seconds without a byte


def published_file(name: str | os.PathLike) -> Path | None:
    """The kept file of an address, or of a name of the zoo that no file here has; else None. Raises
    WeightsError as `download`, with how to get the zoo's file in another way.
    """
    if str(name).startswith(("https://", "http://")):
        return download(str(name))
    weights = zoo.find(name)
    if weights is None or any(os.path.isfile(f"{name}{suffix}") for suffix in SUFFIXES):
        return None
    try:
        return download(weights.hub_url)
    except WeightsError as error:
        print(f"warning: {error}; trying another host", file=sys.stderr, flush=True)
    try:
        return download(weights.url)
    except WeightsError as error:
        raise WeightsError(
            f"{name}: no such file here, and {error}; get it elsewhere, then `python "
            f"port_weights/load_timm_weights.py -checkpoint {weights.file}` makes "
            f"{weights.name}.pdparams of it"
        ) from None


def download(address: str) -> Path:
    """The file behind an address, which begins with one of `zoo.HOSTS`, from the cache or there.

    ``#sha256=<64 digits>`` at its end says what the file must be. Else what the host says is
    compared: the length, and Hugging Face's sha256 of large files (``X-Linked-Etag``) or S3's MD5
    of uploads in one part (``ETag``). WeightsError, and nothing is kept, for another host, without
    a network, or where the file is not what it must be, or perhaps not whole.
    """
    url, _, fragment = address.partition("#")
    if not url.startswith(zoo.HOSTS) or ".." in unquote(url):
        hosts = " and ".join(zoo.HOSTS)
        raise WeightsError(f"{url}: files are fetched from {hosts} only; download it yourself")
    if fragment and not re.fullmatch("sha256=[0-9a-f]{64}", fragment):
        raise WeightsError(f"{address}: after # stands sha256= and 64 hexadecimal digits")
    wanted, path = fragment[len("sha256=") :], cache_file(url)
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written, or has no locks
            path.parent.mkdir(parents=True, exist_ok=True)
            lock(stack.enter_context(open(path.with_name(f".{path.name}.lock"), "w")), wait=True)
        if not _is_kept(path, wanted):
            _fetch(url, path, wanted)
    return path


def cache_file(url: str) -> Path:
    host, names = urlsplit(url).netloc.replace(":", "_"), unquote(urlsplit(url).path).strip("/")
    return cache_folder() / "weights" / host / names


def _is_kept(path: Path, wanted: str) -> bool:
    """Whether a file is in the cache, whole, and not another than is ``wanted``."""
    try:
        kept, found = Path(f"{path}.sha256").read_text(encoding="latin-1"), file_sha256(path)
    except OSError:
        return False
    if found == kept.strip():
        return wanted in ("", found)
    print(f"{path}: damaged in the cache, made anew", file=sys.stderr, flush=True)
    return False


class _Redirects(HTTPRedirectHandler):
    """Keeps the sha256 that is said on the way to a file, and stays with the scheme."""

    linked = ""

    def redirect_request(self, request, file, code, message, headers, target):
        self.linked = self.linked or headers["X-Linked-Etag"]
        if urlsplit(target).scheme != urlsplit(request.full_url).scheme:
            raise HTTPError(target, code, "sent elsewhere, without https", headers, file)
        return super().redirect_request(request, file, code, message, headers, target)


def _fetch(url: str, path: Path, wanted: str) -> None:
    redirects, bar, head = _Redirects(), ProgressLine(f"{path.name}, MB"), b""
    sums = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    ask, request = build_opener(redirects).open, Request(url, headers={"User-Agent": "resmlp"})
    try:
        with atomic(path) as file, ask(request, timeout=_TIMEOUT) as response:
            total = response.length  # None: the host does not say it
            while block := response.read(2**20):
                head = head or block[:16]
                file.write(block)
                for digest in sums:
                    digest.update(block)
                bar(file.tell() >> 20, (total or file.tell()) >> 20)
            if response.length:  # what has not come
                raise http.client.IncompleteRead(b"", response.length)
            refuse_text(head, url)
            size = file.tell()
            sha256, md5 = (digest.hexdigest() for digest in sums)
            source = "as given" if wanted else "as the host says"
            linked = wanted or redirects.linked or response.headers["X-Linked-Etag"]
            kind, found, said = "sha256", sha256, _checksum(linked, 64)
            if not said:
                kind, found, said = "MD5", md5, _checksum(response.headers["ETag"], 32)
            if said and found != said:
                raise WeightsError(
                    f"{url}: its {kind} is {found}, not {said} {source}; try again, or add "
                    f"#sha256={sha256} to the address if that is the file you want"
                )
            if not said and total is None and not response.chunked:
                raise WeightsError(
                    f"{url}: the host says neither a length nor a checksum, so these {size} bytes "
                    f"may be a part; add #sha256={sha256} to the address if they are all"
                )
            write_atomically(f"{sha256}\n".encode(), f"{path}.sha256")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error  # a host may give none
        reason = str(getattr(reason, "strerror", None) or reason) or type(error).__name__
        where = "" if isinstance(error, URLError) else f" to {path.parent}"  # a full disk, say
        raise WeightsError(f"{url}: cannot be downloaded{where}: {reason}") from None
    finally:
        bar.end()
    how = f"{kind} {said}, {source}" if said else f"sha256 {sha256}, of which the host says nothing"
    print(f"{url}: {size / 2**20:.1f} MB, {how}; kept as {path}", file=sys.stderr, flush=True)


def _checksum(tag: str | None, digits: int) -> str:
    """What a header says, if that is a checksum of the whole file; else empty."""
    match = re.fullmatch(f'"?([0-9a-f]{{{digits}}})"?', tag or "")
    return match[1] if match else ""
