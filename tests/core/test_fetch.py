"""Downloads against a local server: cut connections, wrong sums, redirects, archives, a full disk, mirrors, offline."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from idadapter_core import fetch as module
from idadapter_core.errors import DownloadError
from idadapter_core.fetch import ATTEMPTS, address_of, fetch, is_offline
from idadapter_core.published import DOWNLOADS, Download

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 8192  # 2 MB


@dataclass
class Site:
    """What the server does, and what it was asked for."""

    content: bytes = CONTENT
    cut_after: int = 0  # bytes of an answer after which the connection is closed; 0: never
    cuts: int = 1 << 30  # how often
    resumes: bool = True
    status: int = 200
    tells_size: bool = True
    redirected: bool = False
    ranges: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if served.redirected and not self.path.endswith("/moved"):
                self.send_response(302)
                self.send_header("Location", f"{served.url}/moved")
                self.end_headers()
                return
            if served.status != 200:
                self.send_error(served.status)
                return
            asked = self.headers.get("Range", "")
            served.ranges.append(asked)
            match = re.fullmatch(r"bytes=(\d+)-", asked) if served.resumes else None
            start = int(match[1]) if match else 0
            body = served.content[start:]
            self.send_response(206 if match else 200)
            if match:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}"
                )
            if served.tells_size:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if served.cut_after and served.cuts:
                served.cuts -= 1
                body = body[: served.cut_after]
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # clients that go away are meant to

    server = Server(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


def described(
    site: Site, content: bytes = CONTENT, target: str = "idadapter/new.bin", **changes: object
) -> Download:
    made = Download(
        "new",
        f"{site.url}/new.bin",
        len(content),
        hashlib.sha256(content).hexdigest(),
        target,
        "its page",
        "free",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def load(download: Download, models: Path, **options: object) -> Path:
    return fetch(download, models, pause=0.0, **options)  # type: ignore[arg-type]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_is_loaded_and_not_loaded_again(site: Site, tmp_path: Path) -> None:
    path = load(described(site), tmp_path)
    assert path == tmp_path / "idadapter" / "new.bin"
    assert path.read_bytes() == CONTENT
    assert hidden(path.parent) == []
    asked = len(site.ranges)
    load(described(site), tmp_path)
    assert len(site.ranges) == asked


def test_after_cuts_it_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.cut_after, site.cuts = 500_000, 3
    assert load(described(site), tmp_path).read_bytes() == CONTENT
    assert site.ranges[0] == ""
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in site.ranges[1:]]
    assert starts == sorted(starts)
    assert all(0 < start < len(CONTENT) for start in starts)


def test_a_later_call_goes_on_too(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "idadapter" / ".new.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:700_000])
    assert load(described(site), tmp_path).read_bytes() == CONTENT
    assert site.ranges == ["bytes=700000-"]


def test_a_server_that_cannot_resume_sends_all_again(site: Site, tmp_path: Path) -> None:
    site.cut_after, site.cuts, site.resumes = 500_000, 2, False
    assert load(described(site), tmp_path).read_bytes() == CONTENT


def test_without_a_byte_it_gives_up_and_keeps_what_there_is(site: Site, tmp_path: Path) -> None:
    site.cut_after, site.cuts = 500_000, 1

    def fail_from_now_on(line: str) -> None:
        if "goes on" in line:
            site.status = 503

    with pytest.raises(DownloadError, match="goes on where it stopped"):
        load(described(site), tmp_path, log=fail_from_now_on)
    part = tmp_path / "idadapter" / ".new.bin.part"
    assert 0 < part.stat().st_size < len(CONTENT)
    assert not (tmp_path / "idadapter" / "new.bin").exists()
    site.status = 200
    assert load(described(site), tmp_path).read_bytes() == CONTENT
    assert ATTEMPTS > 1


def test_a_wrong_sum_is_refused_and_deleted(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"\0"
    with pytest.raises(DownloadError, match="SHA-256 .*was deleted"):
        load(described(site), tmp_path)
    assert list((tmp_path / "idadapter").iterdir()) == []


@pytest.mark.parametrize("content", [b"<html>log in</html>", CONTENT + b"more"])
@pytest.mark.parametrize("tells_size", [True, False])
def test_another_file_is_noticed_by_its_size(
    site: Site, tmp_path: Path, content: bytes, tells_size: bool
) -> None:
    site.content, site.tells_size = content, tells_size
    said = "another file" if tells_size or len(content) > len(CONTENT) else "in a row"
    with pytest.raises(DownloadError, match=said):
        load(described(site), tmp_path)
    assert not (tmp_path / "idadapter" / "new.bin").exists()


def test_a_redirect_is_followed(site: Site, tmp_path: Path) -> None:
    site.redirected = True
    assert load(described(site), tmp_path).read_bytes() == CONTENT


def test_an_unknown_size_is_asked_for(site: Site, tmp_path: Path) -> None:
    site.redirected = True
    assert load(described(site, size=0), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 401])
def test_a_missing_file_is_an_error_at_once(site: Site, tmp_path: Path, status: int) -> None:
    site.status = status
    with pytest.raises(DownloadError, match=f"answers {status}.*its page"):
        load(described(site), tmp_path)


def test_another_file_of_that_name_stays(site: Site, tmp_path: Path) -> None:
    mine = tmp_path / "idadapter" / "new.bin"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="left alone"):
        load(described(site), tmp_path)
    site.content = CONTENT[:-1] + b"\0"
    with pytest.raises(DownloadError, match="SHA-256"):
        load(described(site), tmp_path, is_replacing=True)
    assert mine.read_bytes() == b"mine", "nothing is replaced before the new file is right"
    site.content = CONTENT
    assert load(described(site), tmp_path, is_replacing=True).read_bytes() == CONTENT


def archive_of(*members: tuple[str, bytes], link: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


def packed(site: Site, content: bytes) -> Download:
    site.content = content
    return described(site, content, "insightface/models/pack", is_archive=True)


def test_an_archive_becomes_a_folder(site: Site, tmp_path: Path) -> None:
    """With its members at the top, or in a folder of its own name."""
    for folder in ("", "pack/"):
        models = tmp_path / (folder or "top")
        path = load(packed(site, archive_of((f"{folder}a.onnx", b"a"), (f"{folder}b.onnx", b"b"))), models)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a.onnx": b"a", "b.onnx": b"b"}
        assert hidden(path.parent) == []


@pytest.mark.parametrize(
    "name",
    ["../outside.onnx", "/outside.onnx", "a/../../outside.onnx", "..\\outside.onnx", "C:\\outside.onnx"],
)
def test_members_stay_inside_their_folder(site: Site, tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadError, match="outside its folder"):
        load(packed(site, archive_of(("a.onnx", b"a"), (name, b"b"))), tmp_path)
    assert not list(tmp_path.rglob("outside*"))
    assert not (tmp_path / "insightface" / "models" / "pack").exists()


def test_links_in_an_archive_are_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="outside its folder"):
        load(packed(site, archive_of(("a.onnx", b"a"), link="link.onnx")), tmp_path)


def test_files_in_a_folder_are_replaced_when_all_are_whole(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "insightface" / "models" / "pack"
    folder.mkdir(parents=True)
    (folder / "mine.onnx").write_bytes(b"mine")
    (folder / "a.onnx").write_bytes(b"old")
    said: list[str] = []
    assert load(packed(site, archive_of(("a.onnx", b"a"))), tmp_path, log=said.append) == folder
    assert site.ranges == []
    assert "is there already; add --replace" in said[0]
    with pytest.raises(DownloadError, match="damaged"):
        load(packed(site, b"PK no archive"), tmp_path, is_replacing=True)
    assert (folder / "a.onnx").read_bytes() == b"old"
    load(packed(site, archive_of(("a.onnx", b"a"), ("b.onnx", b"b"))), tmp_path, is_replacing=True)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"a.onnx": b"a", "b.onnx": b"b", "mine.onnx": b"mine"}


def test_an_empty_folder_is_filled(site: Site, tmp_path: Path) -> None:
    """As insightface's own failed download leaves it."""
    (tmp_path / "insightface" / "models" / "pack").mkdir(parents=True)
    path = load(packed(site, archive_of(("a.onnx", b"a"))), tmp_path)
    assert [file.name for file in path.iterdir()] == ["a.onnx"]


def test_a_folder_in_the_place_of_a_file_is_an_error(site: Site, tmp_path: Path) -> None:
    (tmp_path / "idadapter" / "new.bin").mkdir(parents=True)
    with pytest.raises(DownloadError, match="something else"):
        load(described(site), tmp_path)


def test_a_server_that_cannot_resume_is_not_asked_for_ever(site: Site, tmp_path: Path) -> None:
    site.cut_after, site.resumes = 500_000, False
    with pytest.raises(DownloadError, match="in a row"):
        load(described(site), tmp_path)
    assert len(site.ranges) <= 2 * ATTEMPTS


def test_a_server_that_is_away_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    download = Download("new", "http://127.0.0.1:9/new.bin", 5, "0" * 64, "new.bin", "its page", "free")
    with pytest.raises(DownloadError, match="Check the connection"):
        load(download, tmp_path)
    with pytest.raises(DownloadError, match="cannot be reached"):
        load(replace(download, size=0), tmp_path)


def test_a_full_disk_is_foreseen(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1 << 60)
    with pytest.raises(DownloadError, match="MB are needed and .* MB are free"):
        load(described(site), tmp_path)
    assert site.ranges == []


FULL = """
import resource, signal, sys
from pathlib import Path
from idadapter_core.fetch import fetch
from idadapter_core.published import Download
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
fetch(Download(*sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:8]), Path(sys.argv[8]))
"""


def test_a_disk_that_fills_up_keeps_what_was_loaded(site: Site, tmp_path: Path) -> None:
    """By the limit for a file's size, which the system reports as it does a full disk."""
    if os.name == "nt":
        pytest.skip("Windows has no limit for a file's size")
    d = described(site)
    facts = [d.name, d.url, str(d.size), d.sha256, d.target, d.page, d.licence, str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", FULL, *facts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "DownloadError: no room in" in result.stderr
    assert "it goes on where it stopped" in result.stderr
    part = tmp_path / "idadapter" / ".new.bin.part"
    assert 0 < part.stat().st_size <= 1_000_000
    assert load(d, tmp_path).read_bytes() == CONTENT
    assert site.ranges[-1].startswith("bytes=")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_loads_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(DownloadError, match=f"forbids it.*{re.escape(str(tmp_path))}"):
        load(described(site), tmp_path)
    assert site.ranges == []
    assert not is_offline({name: "0"})


def test_mirrors_stand_for_beginnings() -> None:
    faceid, pack = DOWNLOADS["faceid_sd15"], DOWNLOADS["buffalo_l"]
    path = "/h94/IP-Adapter-FaceID/resolve/main/ip-adapter-faceid_sd15.bin"
    assert address_of(faceid, {}, {}) == faceid.url == f"https://huggingface.co{path}"
    assert (
        address_of(faceid, {}, {"HF_ENDPOINT": "https://mirror.example/"}) == f"https://mirror.example{path}"
    )
    assert address_of(pack, {}, {"HF_ENDPOINT": "https://mirror.example"}) == pack.url
    mirrors = {
        "https://github.com": "http://near.example/gh",
        "https://huggingface.co": "http://other.example",
    }
    assert address_of(pack, mirrors, {}) == pack.url.replace("https://github.com", "http://near.example/gh")
    assert (
        address_of(faceid, mirrors, {"HF_ENDPOINT": "https://mirror.example"})
        == f"http://other.example{path}"
    )
    assert address_of(faceid, {"https://hugging": "http://x"}, {}) == faceid.url, (
        "not in the middle of a name"
    )


def test_a_mirror_serves_the_file(site: Site, tmp_path: Path) -> None:
    download = described(site, url="https://huggingface.co/a/resolve/main/new.bin")
    path = load(download, tmp_path, mirrors={"https://huggingface.co": site.url})
    assert path.read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="no address of a web server"):
        load(replace(download, target="other"), tmp_path, mirrors={"https://huggingface.co": "file:///etc"})


def command(*arguments: str | Path, script: str = "") -> subprocess.CompletedProcess[str]:
    program = [script] if script else ["-m", "idadapter_core", "fetch"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_command_lists_with_licences_and_loads_nothing() -> None:
    result = command()
    assert result.returncode == 0
    for download in DOWNLOADS.values():
        assert f"{download.name}: " in result.stdout
    assert result.stdout.count("non-commercial research only") == len(DOWNLOADS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no 'nothing'; choose from"),
        (["buffalo_l"], "nobody is here to accept its licence"),
        (["buffalo_l", "--yes"], "HF_HUB_OFFLINE"),
        (["buffalo_l", "--yes", "--mirror", "x"], "--mirror is BEGINNING=MIRROR"),
        (["--yes", "buffalo_l", "--replace", "antelopev2"], "HF_HUB_OFFLINE"),
    ],
)
def test_the_command_asks_first(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = command(*arguments, "--models", tmp_path)
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.rglob("*")) == []


def test_what_is_there_does_not_keep_the_rest_from_being_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "insightface" / "models" / "buffalo_l"
    folder.mkdir(parents=True)
    (folder / "det_10g.onnx").write_bytes(b"mine")
    result = command("buffalo_l", "antelopev2", "--yes", "--models", tmp_path)
    assert f"{folder} is there already" in result.stdout
    assert "antelopev2 is not loaded, because HF_HUB_OFFLINE" in result.stderr


@pytest.mark.parametrize("is_portable", [False, True])
def test_install_passes_models_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_portable: bool) -> None:
    """Also for a Python that does not look into the current folder, as ComfyUI's portable one."""
    if is_portable:
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
        monkeypatch.delenv("PYTHONPATH", raising=False)
    result = command("--models", "buffalo_l", "--yes", "--models", tmp_path, script=str(ROOT / "install.py"))
    assert result.returncode != 0
    assert "HF_HUB_OFFLINE" in result.stderr
