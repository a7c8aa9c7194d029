"""Published weights -> a local file: from the cache, or fetched within bounded time.

The hub's own client retries a dead network for minutes (48 s for a name that does not resolve, six
minutes where packets vanish; measured with huggingface_hub 2.4), so reachability is asked for once,
with a timeout, before it is let loose. Reading the file is ``libraries``.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import WeightsUnavailable

_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Files of a Hugging Face repository (``repo@revision``); the first that exists is taken."""

    repo: str
    files: tuple[str, ...]

    @property
    def remedy(self) -> str:
        return f"https://huggingface.co/{self.repo.partition('@')[0]}/resolve/main/{self.files[0]}"


@dataclass(frozen=True, kw_only=True)
class Url:
    """A file at an address, kept in torch.hub's cache."""

    url: str

    @property
    def remedy(self) -> str:
        return self.url


Source = Hub | Url


_INSTEAD = "--weights FILE (random:SEED, for tests, needs none)"


def locate(source: Source, name: str, instead: str = _INSTEAD) -> Path:
    """A local file with those weights, downloaded unless it is in the library's cache.

    ``instead``: what a person without network gives, a file fetched elsewhere.
    Raises WeightsUnavailable, with the file to fetch elsewhere, when there is no way to it.
    """
    try:
        return _from_hub(source) if isinstance(source, Hub) else _from_url(source)
    except Exception as error:  # the hub's client, urllib, the disk: each raises its own kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise WeightsUnavailable(
            f"weights of {name} cannot be fetched ({reason}); without network: "
            f"fetch {source.remedy} elsewhere and give {instead}"
        ) from error


def _from_hub(source: Hub) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = source.repo.partition("@")
    for file in source.files:
        try:
            return Path(
                hf_hub_download(repo, file, revision=revision or None, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            continue
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set and they are not in the cache")
    _require_reachable(constants.ENDPOINT)
    for file in source.files[:-1]:
        try:
            return Path(
                hf_hub_download(repo, file, revision=revision or None, etag_timeout=_TIMEOUT_S)
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    file = source.files[-1]
    return Path(hf_hub_download(repo, file, revision=revision or None, etag_timeout=_TIMEOUT_S))


def _from_url(source: Url) -> Path:
    import torch

    file = Path(urllib.parse.urlparse(source.url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([a-f0-9]{8,})\.", file)
        with _socket_timeout(_TIMEOUT_S):  # torch opens the address without one
            torch.hub.download_url_to_file(
                source.url, str(path), digest.group(1) if digest else None, progress=False
            )
    return path


def _require_reachable(endpoint: str) -> None:
    """Raises ConnectionError unless ``endpoint`` answers anything at all; proxies are honoured."""
    request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "raypipe"})
    try:
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"no network to {endpoint}: {reason}") from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def local_file(text: str) -> Path:
    """The weights file a person named; raises WeightsUnavailable when it is not there."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise WeightsUnavailable(
            f"weights {text!r} are neither a file nor 'pretrained' nor 'random:SEED'; "
            "give one of these"
        )
    if not os.access(path, os.R_OK):
        raise WeightsUnavailable(f"weights file {path} cannot be read; give a file you may read")
    return path
