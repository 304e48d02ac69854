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
    of uploads in one part (``ETag``).

    Raises WeightsError, and keeps nothing, for another host, without a network, or where the file
    is not what it must be, or perhaps not whole.
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
    """Keeps the headers on the way to a file, and stays with the scheme."""

    def __init__(self) -> None:
        self.headers: list = []

    def redirect_request(self, request, file, code, message, headers, target):
        self.headers.append(headers)
        if urlsplit(target).scheme != urlsplit(request.full_url).scheme:
            raise HTTPError(target, code, "sent elsewhere, without https", headers, file)
        return super().redirect_request(request, file, code, message, headers, target)


def _fetch(url: str, path: Path, wanted: str) -> None:
    redirects, bar = _Redirects(), ProgressLine(f"{path.name}, MB")
    sums = {"sha256": hashlib.sha256(), "MD5": hashlib.md5(usedforsecurity=False)}
    request = Request(url, headers={"User-Agent": "resmlp"})
    try:
        with (
            atomic(path) as file,
            build_opener(redirects).open(request, timeout=_TIMEOUT) as response,
        ):
            total, head = int(response.headers.get("Content-Length") or 0), b""
            while block := response.read(2**20):
                head = head or block[:16]
                file.write(block)
                for digest in sums.values():
                    digest.update(block)
                bar(file.tell() >> 20, max(total, file.tell()) >> 20)
            size = file.tell()
            if total and size != total:
                raise http.client.IncompleteRead(b"", total - size)
            refuse_text(head, url)
            found = {kind: digest.hexdigest() for kind, digest in sums.items()}
            how = _compare(url, [*redirects.headers, response.headers], wanted, found)
            if not (how or total or response.chunked):
                raise WeightsError(
                    f"{url}: the host says neither a length nor a checksum, so these {size} bytes "
                    f"may be a part; add #sha256={found['sha256']} to the address if they are all"
                )
            write_atomically(f"{found['sha256']}\n".encode(), f"{path}.sha256")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error  # a host may give none
        reason = str(getattr(reason, "strerror", None) or reason) or type(error).__name__
        where = "" if isinstance(error, URLError) else f" to {path.parent}"  # a full disk, say
        raise WeightsError(f"{url}: cannot be downloaded{where}: {reason}") from None
    finally:
        bar.end()
    how = how or f"sha256 {found['sha256']}, of which the host says nothing"
    print(f"{url}: {size / 2**20:.1f} MB, {how}; kept as {path}", file=sys.stderr, flush=True)


def _compare(url: str, headers: list, wanted: str, found: dict[str, str]) -> str:
    """Raises where a checksum is another than it must be; says which was compared, if any."""
    linked = next((h["X-Linked-Etag"] for h in headers if h["X-Linked-Etag"]), "")
    source = "as given" if wanted else "as the host says"
    sums = ("sha256", 64, wanted or linked), ("MD5", 32, headers[-1]["ETag"] or "")
    for kind, digits, expected in sums:
        expected = expected.strip('"')
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", expected):
            continue
        if found[kind] != expected:
            raise WeightsError(
                f"{url}: its {kind} is {found[kind]}, not {expected} {source}; try again, or add "
                f"#sha256={found['sha256']} to the address if that is the file you want"
            )
        return f"{kind} {expected}, {source}"
    return ""
