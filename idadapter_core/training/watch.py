"""Detect lost processes of a run and pass signals among them.

A process waiting in a collective runs no Python and handles no signals, and if a peer is gone, stopped or stuck, it waits for half an
hour. Each process therefore has a thread that reports its state once a second in torch.distributed's rendezvous store. The thread
also receives signals, passes them on to all processes, and ends a process that waits in vain.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ..errors import TrainingError
from ..waiting import TERMINATED, exit_now, start_thread

START_TIMEOUT = 600.0
"""Seconds until all processes of a run must have started."""
REPORT_TIMEOUT = 60.0
"""Seconds without a report after which a process counts as lost."""
GRACE = 15.0
"""Seconds from a signal until all processes should have finished the step. Launchers kill after 30."""
_REPORT_INTERVAL = 1.0  # seconds
_STORE_TIMEOUT = timedelta(seconds=10)  # of a request to the store
WORKING, WAITING, WRITING, FINISHED = "working", "waiting", "writing", "finished"


@dataclass
class _Peer:
    """The last report of another process, the time of that report, and the time since which its state is unchanged."""

    report: str = ""
    received_at: float = field(default_factory=time.monotonic)
    state: str = WORKING
    since: float = field(default_factory=time.monotonic)


class Watch:
    """Monitors the other processes of a run.

    Args:
        store: shared store for the processes' reports.
        received: "stop" is added when another process received a signal, or this one did during a collective.
    """

    def __init__(self, store: Any, rank: int, world: int, received: set[str]) -> None:
        self._store, self._rank, self._world, self._received = store, rank, world, received
        self._others = {other: _Peer() for other in range(world) if other != rank}
        self._state, self._since = WORKING, time.monotonic()
        self._stopped_at: float | None = None
        self._ended = threading.Event()
        self._report_count = 0
        self._stop_sent = False
        self.save: Callable[[], str] | None = None
        """Writes a checkpoint of the steps done if this process must exit without the others. Returns a sentence about the outcome."""
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup_reader, self._wakeup_writer):
            end.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        self._thread: threading.Thread | None = None
        try:
            self._send_report()
        except BaseException:
            self.close(is_end_agreed=False)
            raise

    def start(self) -> None:
        """Start monitoring the others."""
        now = time.monotonic()
        for peer in self._others.values():
            peer.received_at = peer.since = now
        self._thread = start_thread(self._run, "watch")

    @contextlib.contextmanager
    def in_state(self, state: str) -> Iterator[None]:
        """Context manager: report the state of this process, `WAITING` for the others or `WRITING` for them."""
        before, self._state = self._state, state
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._state = before
            self._since = time.monotonic()

    def missing(self) -> list[int]:
        """Processes that have not reported yet."""
        return [other for other in self._others if not self._store.check([_key(other)])]

    def silent(self, seconds: float) -> list[int]:
        """Unfinished processes without a report for this many seconds."""
        now = time.monotonic()
        return [
            other
            for other, peer in self._others.items()
            if peer.state != FINISHED and now - peer.received_at > seconds
        ]

    def close(self, is_end_agreed: bool) -> None:
        """Stop reporting. Unless the end of the run is agreed, the others will treat this process as lost."""
        self._ended.set()
        signal.set_wakeup_fd(self._fd_before)
        if self._thread is not None:
            self._thread.join(2 * _REPORT_INTERVAL)
        if is_end_agreed:
            with contextlib.suppress(RuntimeError):  # the store may already be gone
                self._store.set(_key(self._rank), f"0 {FINISHED}")
        for end in (self._wakeup_reader, self._wakeup_writer):
            end.close()

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._ended.wait(_REPORT_INTERVAL):
            self._read_signals()
            try:
                self._exchange()
                gone = ""
            except RuntimeError as error:
                gone = f"{error}".split("\n")[0]
            if not self._ended.is_set():
                self._check_others(gone)
            if gone:  # torch prints a stack for each unanswered request
                self._ended.wait(4 * _REPORT_INTERVAL)

    def _read_signals(self) -> None:
        """Read signals that the main thread may not have handled yet."""
        with contextlib.suppress(OSError):
            if {int(signal.SIGTERM), int(signal.SIGINT)} & set(self._wakeup_reader.recv(4096)):
                self._received.add("stop")
                self._stopped_at = self._stopped_at or time.monotonic()

    def _send_report(self) -> None:
        self._report_count += 1
        self._store.set(_key(self._rank), f"{self._report_count} {self._state}")

    def _exchange(self) -> None:
        self._send_report()
        if self._stopped_at is not None and not self._stop_sent:
            self._store.set(_STOP, "1")
            self._stop_sent = True
        elif self._stopped_at is None and self._store.check([_STOP]):
            self._stopped_at, self._stop_sent = time.monotonic(), True
            self._received.add("stop")
        keys = {other: _key(other) for other in self._others}
        reports = self._store.multi_get(list(keys.values()))
        now = time.monotonic()
        for other, text in zip(keys, reports, strict=True):
            peer, report = self._others[other], bytes(text).decode()
            if report != peer.report:
                peer.report, peer.received_at = report, now
                state = report.partition(" ")[2]
                if state != peer.state:
                    peer.state, peer.since = state, now

    def _check_others(self, gone: str) -> None:
        """Exit if this process waits for others that will not come."""
        now = time.monotonic()
        is_stopped = self._stopped_at is not None
        lost = self.silent(GRACE if is_stopped or gone else REPORT_TIMEOUT)
        if gone and lost:
            host = "the launcher" if _has_launcher(os.environ) else "process 0"
            why = f"{host} at {_where(os.environ)}, through which the processes exchange their states, is gone ({gone})"
            lost = [] if _has_launcher(os.environ) else [0]
        elif lost:
            why = f"{process_names(lost)} has not been heard from for {max(now - self._others[r].received_at for r in lost):.0f} s"
        elif is_stopped and (late := self._late(now)):
            why = f"{process_names(late)} did not come to the end of the step within {GRACE:.0f} s of the signal"
            lost = late
        else:
            return
        if self._state == WAITING:
            self._exit(why, lost, TERMINATED if is_stopped else 1)

    def _late(self, now: float) -> list[int]:
        """Processes still at work, if this process has waited long enough and none is writing."""
        assert self._stopped_at is not None
        if self._state != WAITING or now - max(self._since, self._stopped_at) < GRACE:
            return []
        if any(peer.state == WRITING for peer in self._others.values()):
            return []
        return [
            other
            for other, peer in self._others.items()
            if peer.state == WORKING and now - max(peer.since, self._stopped_at) >= GRACE
        ]

    def _exit(self, why: str, lost: list[int], code: int) -> None:
        saved = ""
        try:
            if self.save is not None and self._rank == min(set(range(self._world)) - set(lost)):
                saved = f" {self.save()}"
        finally:
            sys.stderr.write(
                f"process {self._rank} of {self._world} waited for the others, but {why}; it exits.{saved} Look at that process and its "
                "machine, then go on with --resume auto.\n"
            )
            sys.stderr.flush()
            exit_now(code)


_STOP = "stop"


def _key(rank: int) -> str:
    return f"process/{rank}"


def process_names(ranks: list[int]) -> str:
    """Name processes by rank."""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether torchrun hosts the store; otherwise process 0 does."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _where(environ: Mapping[str, str]) -> str:
    return f"{environ.get('MASTER_ADDR', '?')}:{environ.get('MASTER_PORT', '?')}"


def start_watch(
    received: set[str], environ: Mapping[str, str] = os.environ, within: float = START_TIMEOUT
) -> Watch | None:
    """Wait until all processes of a run have started. Returns None for a single process, or if the launcher names no others.

    Raises:
        TrainingError: names the processes missing after `within` seconds.
    """
    world, rank = int(environ.get("WORLD_SIZE", "1")), int(environ.get("RANK", "0"))
    if world < 2 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return None
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in all builds of torch

    deadline = time.monotonic() + within
    store = _store(rank, environ, deadline, within)
    prefix = (
        f"idadapter/{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    )
    watch = Watch(PrefixStore(prefix, store), rank, world, received)
    try:
        while missing := watch.missing():
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"{process_names(missing)} of {world} did not start within {within:.0f} s. See that each machine runs the same command, and "
                    f"reaches {_where(environ)}."
                )
            time.sleep(0.1)
        watch.start()
    except BaseException:
        watch.close(is_end_agreed=False)
        raise
    return watch


def _store(rank: int, environ: Mapping[str, str], deadline: float, within: float) -> Any:
    """Connect separately to torch.distributed's rendezvous store."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_host = rank == 0 and not _has_launcher(environ)
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    try:
        if not is_host:
            _wait_until_reachable(address, deadline)
        return TCPStore(
            *address, is_master=is_host, timeout=_STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        who = "cannot open" if is_host else f"nothing answered within {within:.0f} s at"
        raise TrainingError(
            f"{who} {_where(environ)}, where the processes of the run meet ({error}). Process 0 opens it: see that it runs, and that "
            "MASTER_ADDR and MASTER_PORT are the same for all."
        ) from error


def _wait_until_reachable(address: tuple[str, int], deadline: float) -> None:
    """Wait until the address accepts connections: torch's own wait ignores signals. Raises OSError."""
    while True:
        try:
            socket.create_connection(address, timeout=_REPORT_INTERVAL).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


__all__ = [
    "GRACE",
    "REPORT_TIMEOUT",
    "START_TIMEOUT",
    "WAITING",
    "WORKING",
    "WRITING",
    "Watch",
    "process_names",
    "start_watch",
]
