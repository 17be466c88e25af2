"""One file over HTTP: streamed, hashed on the way, complete or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from clipes.errors import WeightsError
from clipes.types import Progress

TIMEOUT = 10.0
"""Seconds without an answer after which a server counts as unreachable."""

CHUNK = 1 << 20
LOCAL_REMEDY = "give a local file (--weights FILE, for DINOv2 --dino FILE)"
OFFLINE_REMEDY = f"check the network, or {LOCAL_REMEDY}"


class DownloadError(WeightsError):
    """The network did not deliver the file; another source may."""


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    progress: Progress | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Fetch ``url`` into ``target``, which appears only once it is complete and checked.

    Args:
        url: An http or https address.
        target: The file to write; its folder exists.
        sha256: The digest the content must have, 64 hexadecimal digits.
        progress: Called as ``progress(done, total)`` in bytes; ``total`` is 0 if the server does
            not say.
        timeout: Longest wait for the connection and for each further piece, in seconds.

    Raises:
        DownloadError: The server cannot be reached, refuses, sends a web page or too few bytes.
        WeightsError: The content has another digest.
        OSError: ``target`` cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    digest = hashlib.sha256()
    try:
        with part.open("wb") as file:
            for chunk in _stream(url, progress, timeout):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256.lower():
            raise WeightsError(
                f"what {url} sent has sha256 {digest.hexdigest()}, not {sha256}",
                "fetch again; if it stays, something between here and the server changes the file",
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _stream(url: str, progress: Progress | None, timeout: float) -> Iterator[bytes]:
    """Yield the body of ``url`` piece by piece; every failure is a DownloadError."""
    request = urllib.request.Request(url, headers={"User-Agent": "clipes"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if response.headers.get_content_type() == "text/html":
                raise DownloadError(
                    f"{url} answered with a web page instead of weights",
                    f"a login page or a proxy may be in between; or {LOCAL_REMEDY}",
                )
            total = response.length or 0
            done = 0
            while chunk := response.read(CHUNK):
                done += len(chunk)
                yield chunk
                if progress is not None:
                    progress(done, total)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(
            f"{url} answered HTTP {error.code} {error.reason}", OFFLINE_REMEDY
        ) from error
    except urllib.error.URLError as error:
        raise DownloadError(f"{url} cannot be reached ({error.reason})", OFFLINE_REMEDY) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise DownloadError(f"{url} broke off ({reason})", OFFLINE_REMEDY) from error
    if done < total:
        raise DownloadError(f"{url} broke off after {done} of {total} bytes", OFFLINE_REMEDY)
