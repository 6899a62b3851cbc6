"""Downloads of the examples, from a server of this machine."""

import functools
import hashlib
import http.server
import threading

import _common
import pytest

CONTENT = b"some data"


@pytest.fixture
def address(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "data.bin").write_bytes(CONTENT)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def known_hash(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_comes_once_and_is_kept(address, tmp_path):
    path = _common.download(address + "data.bin", known_hash(CONTENT))
    assert path.read_bytes() == CONTENT
    assert tmp_path / "cache" / "jax-centerloss" in path.parents
    (tmp_path / "served" / "data.bin").unlink()
    assert _common.download(address + "data.bin", known_hash(CONTENT)) == path


def test_another_checksum_is_refused(address, tmp_path):
    with pytest.raises(SystemExit, match=r"Can't get http.*data\.bin.*(?s:.*)--data"):
        _common.download(address + "data.bin", known_hash(b"other data"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_nothing_there(address):
    with pytest.raises(SystemExit, match="404"):
        _common.download(address + "absent.bin", known_hash(CONTENT))
