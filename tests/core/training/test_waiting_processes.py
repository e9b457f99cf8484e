"""Waiting for other processes ends: with a reason, and soon after a signal."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from typing import Any

import pytest

from idadapter_core.errors import TrainingError
from idadapter_core.training import watch as watching
from idadapter_core.training.watch import WAITING, Watch, start_watch

if sys.platform == "win32":
    pytest.skip("signals and pipes of POSIX", allow_module_level=True)


class Left(Exception):  # noqa: N818  # as a signal's
    """Who waited has left."""


class Store(dict[str, bytes]):
    """As the one in which processes find each other."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]


@pytest.mark.parametrize("what", ["silent", "stopped and silent", "stopped and late", "store gone"])
def test_a_process_that_does_not_come_is_named(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others leave, each with a reason, and one of them with a checkpoint; the exit code tells of a signal."""
    for name in ("REPORT_TIMEOUT", "GRACE"):
        monkeypatch.setattr(watching, name, 0.3)
    monkeypatch.setattr(watching, "_REPORT_INTERVAL", 0.02)
    left: list[int] = []
    store, received, over = Store(), set[str](), threading.Event()
    store.set("process/1", "1 working")
    watch = Watch(store, 0, 2, received)

    def leave(code: int) -> None:
        left.append(code)
        watch._ended.set()
        over.set()

    monkeypatch.setattr(watching, "exit_now", leave)
    watch.save = lambda: "The checkpoint of step 3 is written."
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    beats = threading.Thread(target=lambda: [alive(store) for _ in iter(lambda: over.wait(0.01), True)])
    try:
        watch.start()
        if what == "stopped and late":  # its thread is well, and it is stuck in something else
            beats.start()
        if what == "store gone":
            monkeypatch.setattr(store, "multi_get", failing, raising=False)
        if "stopped" in what:
            os.kill(os.getpid(), signal.SIGTERM)
        with watch.in_state(WAITING):
            assert over.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
        over.set()
        watch.close(is_end_agreed=False)
    assert left == [143 if "stopped" in what else 1]
    said = capsys.readouterr().err
    assert "process 0 of 2 waited for the others" in said
    if what == "store gone":
        assert "through which the processes exchange their states, is gone (broken pipe)" in said
    else:
        assert "The checkpoint of step 3 is written." in said
        assert ("process 1 did not come" if "late" in what else "process 1 has not been heard from") in said
    assert received == ({"stop"} if "stopped" in what else set())


def alive(store: Store) -> None:
    store.set("process/1", f"{int(store['process/1'].split()[0]) + 1} working")


def failing(keys: list[str]) -> list[bytes]:
    raise RuntimeError("broken pipe")


def test_a_signal_to_one_process_is_heard_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_REPORT_INTERVAL", 0.02)
    store, received = Store(), set[str]()
    store.set("process/1", "1 working")
    watch = Watch(store, 0, 2, received)
    watch.start()
    store.set("stop", "1")
    for _ in iter(lambda: threading.Event().wait(0.02), None):
        if received:
            break
    watch.close(is_end_agreed=True)
    assert received == {"stop"}
    assert store["process/0"].endswith(b"finished")  # and nobody misses it


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "processes 1, 2 of 3 did not start within 0 s"), (1, "nothing answered within 0 s at 127.0.0.1")],
)
def test_a_process_that_never_starts_is_named(rank: int, message: str) -> None:
    environ = {
        "RANK": str(rank),
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    with pytest.raises(TrainingError, match=message):
        start_watch(set(), environ, within=0.2)
    assert start_watch(set(), {}) is None


@pytest.mark.parametrize("where", ["first word", "question", "sleep"])
def test_signals_are_as_before_where_the_processes_do_not_meet(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends the waiting: nothing is left open for signals to be written to."""

    def end(*args: Any) -> Any:
        raise Left

    pairs: list[tuple[socket.socket, socket.socket]] = []
    pair = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", lambda: pairs.append(pair()) or pairs[-1])
    store = Store()
    monkeypatch.setattr(watching, "_store", lambda *args: store)
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    if where == "sleep":
        monkeypatch.setattr(watching.time, "sleep", end)
    else:
        monkeypatch.setattr(store, "set" if where == "first word" else "check", end, raising=False)
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with pytest.raises(Left):
        start_watch(set(), environ)
    after = signal.set_wakeup_fd(before)
    assert after == before
    assert [end.fileno() for end in pairs[0]] == [-1, -1]
