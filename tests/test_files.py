"""Writes are all or nothing; downloads are checked before use and say what to do offline; strange files are refused."""

import errno
import hashlib
import http.server
import os
import re
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest

from sparsedm import files
from sparsedm.errors import InputError
from sparsedm.files import atomic_file, atomic_folder, cache_folder, check_writable, download, write_json, write_text

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


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("a.txt", "new.txt"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "a.txt").write_text("old")
    for name in ("a.txt", "new.txt"):
        check_writable(tmp_path / name)
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "there" / name).read_text() == "new"
    assert len(list((tmp_path / "there").iterdir())) == 2
    (tmp_path / "a.npz").symlink_to(tmp_path / "there" / "blob")  # numpy adds a suffix that it misses
    with atomic_file(tmp_path / "a.npz") as partial:
        np.savez(partial, x=np.ones(3))
    with np.load(tmp_path / "there" / "blob") as held:
        assert held["x"].sum() == 3


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
    with monkeypatch.context() as homeless:
        homeless.delenv("HOME")
        homeless.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
        assert str(cache_folder()) == f"{tempfile.gettempdir()}/cache-{os.getuid()}/sparsedm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/xdg/sparsedm"
    monkeypatch.setenv("SPARSEDM_CACHE", "/mine")
    assert str(cache_folder()) == "/mine"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`. cut: after how many bytes it hangs up."""

    content, cut = os.urandom(100_000), None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_port}/weights.bin"
        self.sha256 = hashlib.sha256(self.content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: self.server.cut])

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
    for _ in range(2):
        assert download(server.url, str(path), server.sha256) == path
    assert path.read_bytes() == server.content
    assert os.listdir(path.parent) == ["weights.bin"]
    assert server.asked == 1, "a file that is there must not be fetched again"


def test_of_a_broken_or_wrong_download_nothing_is_left(server, tmp_path):
    server.cut = 60_000
    with pytest.raises(InputError, match=f"weights.bin was incomplete, or is another file.*{server.sha256}"):
        download(server.url, tmp_path / "a", server.sha256)
    server.cut = None
    with pytest.raises(InputError, match='expected "0123"'):
        download(server.url, tmp_path / "a", "0123")
    assert not os.listdir(tmp_path)
    (tmp_path / "a").write_bytes(b"put there by hand")
    with pytest.raises(InputError, match="delete it"):
        download(server.url, tmp_path / "a", server.sha256)


def test_download_offline_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a \(.*refused.*\): .*put the file at .*/a by hand"):
        download("http://127.0.0.1:9/a", tmp_path / "a", "0")
    assert not list(tmp_path.iterdir())


def test_download_of_a_missing_page(server, tmp_path):
    with pytest.raises(InputError, match=r"\(HTTP Error 404: Not Found\)"):
        download(server.url.replace("weights.bin", "missing"), tmp_path / "a", "0")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "weights.bin"])
def test_download_is_for_the_web_only(tmp_path, url):
    with pytest.raises(InputError, match="must start with http"):
        download(url, tmp_path / "a", "0")


@pytest.mark.parametrize("url", ["https://[::1", "http://a..b/x", "http://127.0.0.1:9/ü", "http://127.0.0.1:x/"])
def test_a_malformed_url_is_one_sentence(tmp_path, url):
    with pytest.raises(InputError, match=rf"cannot download {re.escape(url)} \(") as refused:
        download(url, tmp_path / "a", "0")
    assert "connection" not in str(refused.value), "which would not mend it"
    assert not list(tmp_path.iterdir())


@needs_permissions
def test_download_where_nothing_may_be_written(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write .*/a: Permission denied"):
        download(server.url, tmp_path / "a", server.sha256)


# ---- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable JSON"),
        (b"{", "no readable JSON"),
        (b"[" * 100_000, "no readable JSON"),
        (b'{"a":' * 100_000, "no readable JSON"),
        (b'{"step": ' + b"9" * 5000 + b"}", "no readable JSON"),
        (b'{"step": NaN}', "NaN is no JSON"),
        (b'{"step": 1e999}', "1e999 is no JSON"),
        (b'{"step": 123456789012345678901234567890}', "1234567890.*, an integer, is no JSON"),
        (b'{"step": 1, "step": 2, "loss": 1}', "one name twice"),
        (b'{"step": 1, "loss": 1, "x": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
        (b"\xef\xbb\xbf{}", "no readable JSON .*BOM"),
        (b'{"step": "\xff"}', "it is not UTF-8 text"),
        (b"\x00" * 8, "no readable JSON"),
        (b"[]", "must be an object with step, loss"),
        (b"null", "must be an object"),
        (b"{}", "it lacks 'step'"),
        (b'{"step": 1}', "it lacks 'loss'"),
        (b'{"step": true, "loss": 1}', "'step' must be of type int"),
        (b'{"step": 1.5, "loss": 1}', "'step' must be of type int"),
        (b'{"step": 1, "loss": null}', "'loss' must be of type float"),
        (b'{"step": 1, "loss": [1]}', "'loss' must be of type float"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_strange_json_file_is_one_sentence(tmp_path, content, message):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=f"state.json is damaged: .*{message}|state.json is damaged: {message}"):
        files.read_json(tmp_path / "state.json", step=int, loss=float)


def test_json_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "a.json", {"step": 1, "loss": 2, "more": "\udcff"})
    assert files.read_json(tmp_path / "a.json", step=int, loss=float) == {"step": 1, "loss": 2, "more": "\udcff"}
    assert files.read_json(tmp_path / "a.json")["step"] == 1


def test_text_that_utf_8_cannot_say_is_escaped(tmp_path):
    write_text(tmp_path / "a", "caf\udce9 \ud800")
    assert files.read_text(tmp_path / "a") == "caf\\udce9 \\ud800"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "long", "zero byte", "large"])
def test_only_files_that_end_are_opened(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "long":
            path = tmp_path / ("a" * 300)
        case "zero byte":
            path = f"{tmp_path}/a\0b"
        case "large":
            monkeypatch.setattr(files, "MOST_TEXT", 10)
            path.write_text("[" + " " * 20 + "]")
    with pytest.raises(InputError, match=r"plain file is needed|is missing or unreadable|at most 10 are read"):
        files.read_json(path)


def test_json_lines_survive_a_cut(tmp_path):
    file = tmp_path / "log.jsonl"
    assert list(files.read_json_lines(file, step=int)) == []
    files.append_json_line(file, {"step": 1})
    files.append_json_line(file, {"step": 2})
    file.write_bytes(file.read_bytes() + b'{"step": 3')
    assert list(files.read_json_lines(file, step=int)) == [{"step": 1}, {"step": 2}]
    files.append_json_line(file, {"step": 4})
    assert list(files.read_json_lines(file, step=int)) == [{"step": 1}, {"step": 2}, {"step": 4}]
    file.write_text('{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(InputError, match=r"log.jsonl, line 2, is damaged: 'step' must be of type int"):
        list(files.read_json_lines(file, step=int))
    with pytest.raises(InputError, match="cannot write"):
        files.append_json_line(tmp_path / "no" / "log.jsonl", {})


def test_a_log_may_be_longer_than_a_text_that_is_read_whole(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    for number in range(9):
        files.append_json_line(file, {"step": number})
    monkeypatch.setattr(files, "MOST_TEXT", 20)
    assert [record["step"] for record in files.read_json_lines(file)] == list(range(9))
    files.append_json_line(file, {"step": "x" * 20})
    with pytest.raises(InputError, match=r"line 10, has more than 20 bytes"):
        list(files.read_json_lines(file))


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        for write in (files.check_writable, lambda path: write_text(path, "")):
            with pytest.raises(InputError, match=f"cannot write .*{name}: it is a pipe, socket or device"):
                write(tmp_path / name)
    assert (tmp_path / "device").is_symlink()
    assert (tmp_path / "pipe").is_fifo()


def test_a_zero_byte_in_a_name_is_refused(tmp_path):
    for write in (lambda path: write_text(path, ""), files.check_writable):
        with pytest.raises(InputError, match=r"no name holds a zero byte"):
            write(tmp_path / "a\0b")


def test_the_package_imports_where_files_cannot_be_locked():
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; import sparsedm.commands.train, sparsedm.commands.search"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_too_long_cannot_be_written(tmp_path):
    for write in (files.check_writable, lambda path: write_text(path, "")):
        with pytest.raises(InputError, match=r"^cannot write .*: File name too long"):
            write(tmp_path / ("a" * 300))


def test_a_name_is_writable_only_if_the_temporary_name_beside_it_is(tmp_path):
    for letters in (241, 231):
        for path in (tmp_path / ("a" * letters + ".json"), tmp_path / "new" / ("a" * letters + ".json")):
            if letters == 231:
                files.check_writable(path)
                write_text(path, "")
                continue
            for write in (files.check_writable, lambda path: write_text(path, "")):
                with pytest.raises(InputError, match=r"^cannot write .*: File name too long"):
                    write(path)


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or rename(a, b))
    write_text(tmp_path / "a.json", "{}")
    assert done[0].endswith(".partial.json")
    assert done[1:] == ["renamed", str(tmp_path)], "and the name itself"


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, rename = [], os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append("renamed") or rename(a, b))
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "a.json").touch()
    assert done == ["a.json", partial.name, "renamed", tmp_path.name]
