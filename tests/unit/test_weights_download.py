from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipes.errors import WeightsError
from clipes.weights import DownloadError
from clipes.weights.download import download
from tests.unit.weights_support import Server, serving

CONTENT = bytes(range(256)) * 12_000  # three pieces
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_a_download_is_complete_and_reported(server: Server, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    target = tmp_path / "file"
    download(
        server.serve("a.pt", CONTENT),
        target,
        sha256=DIGEST.upper(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert target.read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert len(seen) >= 3
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert list(tmp_path.iterdir()) == [target]


def test_other_content_is_refused(server: Server, tmp_path: Path):
    with pytest.raises(WeightsError, match=f"{DIGEST}, not {'0' * 64}") as caught:
        download(server.serve("a.pt", CONTENT), tmp_path / "file", sha256="0" * 64)
    # Another source must not silently take the place of a file that was tampered with.
    assert not isinstance(caught.value, DownloadError)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_an_older_file_alone(server: Server, tmp_path: Path):
    target = tmp_path / "file"
    target.write_bytes(b"older")
    with pytest.raises(WeightsError):
        download(server.serve("a.pt", CONTENT), target, sha256="0" * 64)
    assert target.read_bytes() == b"older"


def test_a_short_body_is_a_cut_off_download(server: Server, tmp_path: Path):
    server.missing_bytes = 5
    with pytest.raises(DownloadError, match=rf"after {len(CONTENT)} of {len(CONTENT) + 5} bytes"):
        download(server.serve("a.pt", CONTENT), tmp_path / "file", sha256=DIGEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error_is_named(server: Server, tmp_path: Path, status: int):
    server.status = status
    with pytest.raises(DownloadError, match=rf"a\.pt answered HTTP {status} .*--weights FILE"):
        download(server.serve("a.pt", CONTENT), tmp_path / "file", sha256=DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_is_not_weights(server: Server, tmp_path: Path):
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="web page"):
        download(server.serve("a.pt", b"<html>log in</html>"), tmp_path / "file", sha256=DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.pt"
        with pytest.raises(DownloadError, match="cannot be reached"):
            download(url, tmp_path / "file", sha256=DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_does_not_hang(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.pt"
        start = time.monotonic()
        with pytest.raises(DownloadError, match="timed out"):
            download(url, tmp_path / "file", sha256=DIGEST, timeout=0.2)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []
