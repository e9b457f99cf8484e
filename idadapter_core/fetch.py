"""Downloads published files on request: resumed after a cut, checked against their SHA-256, and put into place only when whole."""

from __future__ import annotations

import errno
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DownloadError
from .files import flush, sha256_of
from .published import Download

BLOCK = 1 << 20
ATTEMPTS = 5  # in a row without a byte
PAUSE = 1.0  # seconds after the first failed attempt; doubles with each
TIMEOUT = 60.0  # seconds without a byte
AGENT = "ComfyUI-IDAdapter"
HUB = "https://huggingface.co"
SPARE = 50 << 20  # bytes of disk space to leave

Log = Callable[[str], None]


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has forbidden downloads by one of Hugging Face's variables."""
    given = [environment.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(value.strip().upper() in ("1", "ON", "YES", "TRUE") for value in given)


def address_of(
    download: Download, mirrors: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> str:
    """The address to load from: with a mirror in place of the beginning that it stands for, and HF_ENDPOINT in place of Hugging Face's."""
    known = dict(mirrors)
    if endpoint := environment.get("HF_ENDPOINT", "").strip():
        known.setdefault(HUB, endpoint)
    for beginning, mirror in known.items():
        if download.url.startswith(beginning.rstrip("/") + "/"):
            return mirror.rstrip("/") + download.url.removeprefix(beginning.rstrip("/"))
    return download.url


def is_there(download: Download, models: Path) -> bool:
    """Whether the file is there, or anything in an archive's folder: a package that the user brought is left alone.

    Raises:
        DownloadError: another file has its name, or it cannot be read.
    """
    target = models / download.target
    with _explained(target):
        if download.is_archive:
            return target.is_dir() and any(target.iterdir())
        if not target.exists():
            return False
        if target.is_file() and sha256_of(target) == download.sha256:
            return True
    raise DownloadError(
        f"{target} exists and is something else; it is left alone. Rename it, or add --replace."
    )


def already(download: Download, models: Path) -> str:
    """Say of a file that it is there."""
    more = "; add --replace to load it anew" if download.is_archive else ""
    return f"{models / download.target} is there already{more}"


def fetch(
    download: Download,
    models: Path,
    *,
    mirrors: Mapping[str, str] | None = None,
    is_replacing: bool = False,
    log: Log = lambda line: None,
    pause: float = PAUSE,
) -> Path:
    """Download a file below ComfyUI's `models` folder, or unpack an archive there. Returns the file or folder.

    What was loaded before a cut is kept beside the target, as `.NAME.part`, and the next call goes on from there. Nothing that is there is
    touched before the new file is whole and its sum right.

    Args:
        mirrors: beginning of an address -> what stands for it.
        is_replacing: load it anew, and replace files of its names. Other files in an archive's folder stay.

    Raises:
        DownloadError: no connection, a wrong sum, no room, a broken archive, another file of that name; says what to do.
    """
    target = models / download.target
    if not is_replacing and is_there(download, models):
        log(already(download, models))
        return target
    if is_offline():
        raise DownloadError(
            f"{download.name} is not loaded, because HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it; unset it, or copy the file to {target}."
        )
    part = target.with_name(f".{target.name}.part")
    with _explained(part):
        target.parent.mkdir(parents=True, exist_ok=True)
        _load(download, address_of(download, mirrors or {}), part, log, pause)
        found = sha256_of(part)
        if found != download.sha256:
            part.unlink()
            raise DownloadError(
                f"{download.name}: what was loaded has the SHA-256 {found[:16]}…, not {download.sha256[:16]}…, and was deleted. Try again; if it "
                f"comes again, the file at its address is another one: {download.page}."
            )
        flush(part)
        if download.is_archive:
            _unpack(download, part, target)
        else:
            part.replace(target)
    log(f"{download.name}: {target}")
    return target


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(
                f"no room in {path.parent} ({error.strerror}). Free some space and call it again: it goes on where it stopped."
            ) from error
        raise DownloadError(
            f"{path.parent}: {error.strerror or error}. Make the folder writable, or name another one."
        ) from error


class _Cut(Exception):
    """The connection failed; another attempt may help."""


@contextmanager
def _from_network() -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException) as error:
        raise _Cut(str(getattr(error, "reason", None) or error) or type(error).__name__) from error


def _load(download: Download, address: str, part: Path, log: Log, pause: float) -> None:
    """Load the rest of a file, with new attempts after cuts."""
    if not address.startswith(("https://", "http://")):
        raise DownloadError(f"{address} is no address of a web server; correct the mirror.")
    download = replace(download, size=download.size or _remote_size(download, address))
    failures, most = 0, 0
    while (done := part.stat().st_size if part.exists() else 0) != download.size:
        if done > download.size:
            part.unlink()
            continue
        _require_room(download, part, done)
        if done:
            log(f"{download.name}: goes on at {done:,} of {download.size:,} bytes")
        reason = "the connection was cut"
        try:
            _load_once(download, address, part, done, log)
        except _Cut as error:
            reason = str(error)
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > most else failures + 1  # a server that cannot resume begins again each time
        most = max(most, now)
        if now != download.size and failures >= ATTEMPTS:
            raise DownloadError(
                f"{download.name}: {reason}, {ATTEMPTS} times in a row; {now:,} of {download.size:,} bytes are kept in {part}. Check the "
                "connection and call it again: it goes on where it stopped."
            )
        if now != download.size and failures:
            time.sleep(pause * 2 ** (failures - 1))


def _remote_size(download: Download, address: str) -> int:
    request = urllib.request.Request(address, headers={"User-Agent": AGENT}, method="HEAD")
    try:
        with _from_network(), urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except (_Cut, ValueError) as error:
        raise DownloadError(
            f"{download.name}: {address} cannot be reached ({error}). Check the connection, or get it from {download.page}."
        ) from error
    if size < 1:
        raise DownloadError(
            f"{download.name}: {address} does not say how large the file is. Get it from {download.page}."
        )
    return size


def _load_once(download: Download, address: str, part: Path, done: int, log: Log) -> None:
    headers = {"User-Agent": AGENT} | ({"Range": f"bytes={done}-"} if done else {})
    request = urllib.request.Request(address, headers=headers)
    with _answer(download, request) as answer:
        goes_on = answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(
            f"bytes {done}-"
        )
        if done and not goes_on:
            done = 0  # a server that cannot resume sends the whole file
        _require_size(download, answer, done)
        shown = done * 10 // download.size
        with part.open("ab" if done else "wb") as file:
            while True:
                with _from_network():
                    block = answer.read(min(BLOCK, download.size - done + 1))
                if not block:
                    return
                file.write(block)
                done += len(block)
                if done > download.size:
                    raise DownloadError(_another(download, "more bytes"))
                if done * 10 // download.size > shown:
                    shown = done * 10 // download.size
                    log(f"{download.name}: {shown * 10} % of {download.size:,} bytes")


def _answer(download: Download, request: urllib.request.Request) -> Any:
    with _from_network():
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code in (408, 416, 429):
                raise _Cut(f"the server answers {error.code}") from error
            raise DownloadError(
                f"{download.name}: {request.full_url} answers {error.code} ({error.reason}). The file may have moved: {download.page}."
            ) from error


def _require_size(download: Download, answer: Any, done: int) -> None:
    length = answer.headers.get("Content-Length")
    if length is not None and int(length) + done != download.size:
        raise DownloadError(_another(download, f"{int(length) + done:,} bytes"))


def _another(download: Download, found: str) -> str:
    return (
        f"{download.name}: the server has {found}, the published file has {download.size:,}: it is another file, perhaps a page that asks to log "
        f"in. Get it from {download.page}."
    )


def _require_room(download: Download, part: Path, done: int) -> None:
    # An archive needs its own size once more, unpacked: weights hardly compress.
    needed = download.size - done + (download.size * 11 // 10 if download.is_archive else 0)
    free = shutil.disk_usage(part.parent).free
    if free < needed + SPARE:
        raise DownloadError(
            f"no room for {download.name} in {part.parent}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free. Free some "
            "space, or name another folder."
        )


def _unpack(download: Download, part: Path, target: Path) -> None:
    """Unpack an archive beside the target, and rename the folder when it is whole."""
    aside = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with zipfile.ZipFile(part) as archive:
            for member in archive.infolist():
                name = _inside(download, member)
                if name is None:
                    continue
                file = aside / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, file.open("wb") as copy:
                    shutil.copyfileobj(source, copy, BLOCK)
                flush(file)
        _bring(aside, target)
    except (zipfile.BadZipFile, EOFError) as error:
        part.unlink()
        raise DownloadError(f"{download.name}: the archive is damaged ({error}); call it again.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    part.unlink()


def _bring(new: Path, target: Path) -> None:
    """Move whole files into a folder, which may hold others."""
    if not target.exists():
        new.rename(target)
        return
    for file in sorted(path for path in new.rglob("*") if path.is_file()):
        place = target / file.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)


def _inside(download: Download, member: zipfile.ZipInfo) -> PurePosixPath | None:
    """Path of a member below the target; None for a folder.

    Raises:
        DownloadError: it would lie outside.
    """
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = member.external_attr >> 16 & 0o170000 == 0o120000
    if path.is_absolute() or ".." in path.parts or ":" in member.filename or is_link:
        raise DownloadError(
            f"{download.name}: the archive has a member {member.filename!r} that would lie outside its folder; nothing was unpacked."
        )
    if member.is_dir():
        return None
    own = PurePosixPath(download.target).name
    return path.relative_to(own) if path.parts[0] == own and len(path.parts) > 1 else path
