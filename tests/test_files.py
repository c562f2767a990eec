"""Writes are all or nothing; downloads resume, are checked before use, and say what to do without a network."""

import errno
import functools
import hashlib
import http.server
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsedm import files
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, atomic_folder, cache_folder, download, write_json, write_text

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def test_atomic_file_replaces_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "deep" / "chart.png"
    write_text(path, "old")
    with atomic_file(path) as partial:
        assert partial.parent == path.parent
        assert partial.suffix == ".png"
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["chart.png"]


def test_atomic_file_honours_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
        with atomic_folder(tmp_path / "b") as one, atomic_file(tmp_path / "d") as other:
            for path in (one / "c", other):  # as safetensors does: a private file takes the place of the one given
                path.with_name("private").touch(mode=0o600)
                path.with_name("private").rename(path)
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "b" / "c").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failing_writer_leaves_what_was_there(tmp_path, failure):
    def fail(half):
        half.write_text("half")
        raise failure

    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(failure), atomic_file(tmp_path / "a.txt") as partial:
        fail(partial)
    with pytest.raises(failure), atomic_folder(tmp_path / "folder") as partial:
        fail(partial / "half")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_atomic_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "sub" / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["run"]


def test_atomic_folder_never_mixes_with_another(tmp_path):
    write_text(tmp_path / "run" / "old", "")
    with pytest.raises(InputError, match="run: Directory not empty"), atomic_folder(tmp_path / "run") as partial:
        (partial / "new").write_text("")
    assert os.listdir(tmp_path / "run") == ["old"]
    assert os.listdir(tmp_path) == ["run"]


def test_write_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(InputError, match=r"^cannot write .*/a: No space left on device$"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "a").read_text() == "old"


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    write_text(tmp_path / "file", "")
    with pytest.raises(InputError, match=r"file/deep/er/a: Not a directory \(.*file/deep/er\)$"):
        write_text(tmp_path / "file" / "deep" / "er" / "a", "")


def test_whether_a_file_can_be_written_is_known_before_and_nothing_is_left(tmp_path):
    files.check_writable(tmp_path / "deep" / "er" / "a")
    write_text(tmp_path / "file", "")
    files.check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write .*file/a: Not a directory"):
        files.check_writable(tmp_path / "file" / "a")
    assert os.listdir(tmp_path) == ["file"]


@needs_permissions
def test_no_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write .*/a: Permission denied$"):
        write_text(tmp_path / "a", "")


def test_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for name in ("SPARSEDM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert str(cache_folder()) == "/home/ada/.cache/sparsedm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/sparsedm"
    monkeypatch.setenv("SPARSEDM_CACHE", "/mine")
    assert str(cache_folder()) == "/mine"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`. ranges: whether it honours Range. cut: after how many bytes it hangs up."""

    content, ranges, cut = os.urandom(100_000), True, None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # the Range header of each request
        self.url = f"http://127.0.0.1:{self.server_port}/weights.bin"

    @property
    def md5(self):
        return hashlib.md5(self.content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:][: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_download(server, tmp_path):
    path = tmp_path / "cache" / "weights.bin"
    assert download(server.url, str(path), md5=server.md5) == path
    assert path.read_bytes() == server.content
    assert os.listdir(path.parent) == ["weights.bin"]
    download(server.url, path, sha256=hashlib.sha256(server.content).hexdigest())
    assert server.asked == [None], "a file that is there must not be fetched again"


def test_download_needs_one_checksum(tmp_path):
    with pytest.raises(TypeError, match="exactly one"):
        download("http://127.0.0.1/", tmp_path / "a")


def test_download_goes_on_where_it_stopped(server, tmp_path):
    (tmp_path / "a.partial").write_bytes(server.content[:40_000])
    download(server.url, tmp_path / "a", md5=server.md5)
    assert (tmp_path / "a").read_bytes() == server.content
    assert server.asked == ["bytes=40000-"]


def test_download_survives_a_breaking_connection(server, tmp_path):
    server.cut = 60_000
    download(server.url, tmp_path / "a", md5=server.md5)
    assert (tmp_path / "a").read_bytes() == server.content
    assert server.asked == [None, "bytes=60000-"]


def test_download_from_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "a.partial").write_bytes(server.content[:40_000])
    download(server.url, tmp_path / "a", md5=server.md5)
    assert (tmp_path / "a").read_bytes() == server.content


@pytest.mark.parametrize("size", [40_000, 200_000], ids=["shorter", "longer"])
def test_download_drops_a_partial_of_something_else(server, tmp_path, size):
    (tmp_path / "a.partial").write_bytes(b"x" * size)
    download(server.url, tmp_path / "a", md5=server.md5)
    assert (tmp_path / "a").read_bytes() == server.content


def test_download_finishes_a_complete_partial_without_the_network(tmp_path):
    (tmp_path / "a.partial").write_bytes(b"all of it")
    download("http://127.0.0.1:9/a", tmp_path / "a", md5=hashlib.md5(b"all of it").hexdigest())
    assert (tmp_path / "a").read_bytes() == b"all of it"


def test_download_keeps_what_it_got_when_the_connection_is_lost(server, tmp_path):
    server.ranges, server.cut = False, 60_000
    with pytest.raises(InputError, match=r"broke after 60000 of 100000 bytes.*put the file at .*/a by hand"):
        download(server.url, tmp_path / "a", md5=server.md5)
    assert (tmp_path / "a.partial").read_bytes() == server.content[:60_000]
    assert not (tmp_path / "a").exists()


def test_download_refuses_a_wrong_checksum(server, tmp_path):
    with pytest.raises(InputError, match=f"gave a file with md5 {server.md5}, but it must have 0123"):
        download(server.url, tmp_path / "a", md5="0123")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "a.partial").read_bytes() == b""
    (tmp_path / "a").write_bytes(b"put there by hand")
    with pytest.raises(InputError, match="delete it"):
        download(server.url, tmp_path / "a", md5=server.md5)


def test_download_offline_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a \(.*refused.*\): .*put the file at .*/a by hand"):
        download("http://127.0.0.1:9/a", tmp_path / "a", md5="0")
    assert not list(tmp_path.iterdir())


def test_download_of_a_missing_page(server, tmp_path):
    with pytest.raises(InputError, match=r"\(HTTP 404 Not Found\)"):
        download(server.url.replace("weights.bin", "missing"), tmp_path / "a", md5="0")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "weights.bin"])
def test_download_is_for_the_web_only(tmp_path, url):
    with pytest.raises(InputError, match="must start with http"):
        download(url, tmp_path / "a", md5="0")


def test_two_downloads_of_one_file_wait_for_each_other(server, tmp_path, monkeypatch):
    body = files._body

    def slow(*args):
        time.sleep(0.2)
        yield from body(*args)

    monkeypatch.setattr(files, "_body", slow)
    download_it = functools.partial(download, server.url, tmp_path / "a", md5=server.md5)
    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(download_it) for _ in range(2)]:
            run.result()
    assert (tmp_path / "a").read_bytes() == server.content
    assert server.asked == [None]
