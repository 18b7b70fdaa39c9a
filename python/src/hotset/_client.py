"""The synchronous client.

There is no thread behind it: whoever waits for a reply reads for all. Tensors may be dropped by the garbage collector at any point of
any thread, so a dropped lease is put on a queue first, and sent by whoever holds the lock for sending next, at once where nobody does.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ._errors import ConnectionLost, HotsetError, Refused
from ._memory import Component, LoadedSet, Progress
from ._wire import EVENTS, MAPPED_AT_ONCE, VERSION, State, StillMapped, checked, default_socket, frame, load_fields

ProgressCallback = Callable[[Progress], None]
ComponentCallback = Callable[[Component], None]
_READ = 1 << 16
# Room for as many descriptors as the kernel sends at once.
_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)
# How long a reply is looked for before the thread sleeps. What is resident is answered sooner, and to be woken costs as much again.
_LOOKED_FOR = 100e-6
# Events that nobody has asked for yet.
_EVENTS_KEPT = 256


class Client:
    """A connection to a hotset server. Safe to use from several threads. Use `hotset.connect()`.

    After a lost connection the next request connects again, and tells the server what is still mapped.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, label: str = "", timeout: float = 10.0) -> None:
        self.path = os.fspath(path) if path is not None else default_socket()
        self.label = label
        self.timeout = timeout
        self.instance = ""
        self.welcome: dict[str, Any] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._socket: socket.socket | None = None
        self._state: State | None = None
        self._dropped: deque[tuple[State, str, int]] = deque()
        self._still = StillMapped()
        # Files that `hotset.safetensors` has opened.
        self._files: dict[str, Any] = {}
        self._farewell = ""
        self._closed = False
        self._connecting = threading.RLock()
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._pid = os.getpid()
        self._ensure()

    # The connection

    def _ensure(self) -> State:
        """The state of a connection that works, as far as is known; a new one where the last was lost."""
        if self._pid != os.getpid():
            raise HotsetError("this client was opened before a fork; connect again in the child")
        if self._closed:
            raise HotsetError("this client was closed")
        state = self._state
        if state is not None:
            return state
        with self._connecting:
            return self._state or self._connect()

    def _connect(self) -> State:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            link.settimeout(self.timeout)
            link.connect(self.path)
            link.settimeout(None)
        except OSError as error:
            link.close()
            raise ConnectionLost(f"no server answers on {self.path}: {error}; start one with `hotset serve`") from error
        holder: list[State] = []
        state = State(lambda lease: self._drop(holder[0], "release", lease), self._still)
        holder.append(state)
        self._farewell = ""
        self._socket, self._state = link, state
        try:
            hello = {"versions": [VERSION], "label": self.label, "software": "hotset-python 0.1.0"}
            self.welcome = self._ask(state, "hello", hello)
            self.instance = self.welcome["instance"]
            self._tell_still_mapped(state)
        except BaseException:
            self._lose(state, "the server refused the connection")
            raise
        return state

    def _tell_still_mapped(self, state: State) -> None:
        mappings = self._still.take()
        for at in range(0, len(mappings), MAPPED_AT_ONCE):
            some = mappings[at : at + MAPPED_AT_ONCE]
            try:
                counted = self._ask(state, "still-mapped", *StillMapped.told(some))
            except Refused:
                continue  # They are mapped all the same, and the connection is good.
            StillMapped.counted(some, counted["mappings"], lambda number: self._drop(state, "unmapped", number))

    def _lose(self, state: State, reason: str) -> ConnectionLost:
        """The connection is gone: numbers end, mappings stay. No lock is held but, perhaps, that for connecting."""
        with self._connecting:
            if self._state is state:
                self._still.add(state.mappings())
                self._state = None
                link, self._socket = self._socket, None
                state.close()
                if link is not None and self._pid != os.getpid():
                    link.close()  # The parent goes on with it.
                elif link is not None:
                    _shut(link)
        reason = self._farewell or reason
        return ConnectionLost(f"connection lost: {reason}; what is mapped stays valid, the next request connects again")

    def reconnect(self, wait: float = 0.0) -> None:
        """Connects again after a lost connection, trying for `wait` seconds."""
        until = time.monotonic() + wait
        while True:
            try:
                self._call("ping")
                return
            except ConnectionLost:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        """Ends the session, as soon as no tensor of its leases is in use any more. No further requests are taken."""
        self._closed = True
        self._files.clear()
        state = self._state
        if state is not None and not state.live:
            self._lose(state, "the client was closed")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sending

    def _drop(self, state: State, kind: str, number: int) -> None:
        """A lease or a mapping is used no more. Called from finalisers: waits for no lock."""
        if self._pid != os.getpid():
            return  # They are the parent's, and so is the connection.
        if kind == "release":
            state.live.discard(number)
        self._dropped.append((state, kind, number))
        if self._state is state and self._sending.acquire(blocking=False):
            try:
                self._flush()
                if self._closed and not state.live and self._socket is not None:
                    _shut(self._socket)
            except (OSError, HotsetError):
                pass  # Whoever asks next notices.
            finally:
                self._sending.release()

    def _flush(self) -> None:
        """Sends what was dropped. The lock for sending is held."""
        link, current = self._socket, self._state
        if not self._dropped or link is None or current is None or self._pid != os.getpid():
            return
        numbers: dict[str, list[int]] = {"release": [], "unmapped": []}
        while self._dropped:
            state, kind, number = self._dropped.popleft()
            # What belongs to an earlier connection ended with it.
            if state is current:
                numbers[kind].append(number)
        data = b""
        if numbers["release"]:
            data += frame(current.number(), "release", {"leases": numbers["release"]})
        if numbers["unmapped"]:
            data += frame(current.number(), "unmapped", {"mappings": numbers["unmapped"]})
        if data:
            link.sendall(data)

    def _send(self, state: State, kind: str, fields: dict[str, Any], descriptors: list[int] | None = None) -> int:
        number = state.number()
        state.replies[number] = deque()
        try:
            with self._sending:
                link = self._socket
                if link is None or self._state is not state:
                    raise OSError("it was closed")
                self._flush()
                data = frame(number, kind, fields)
                if descriptors:
                    sent = socket.send_fds(link, [data], descriptors)
                    data = data[sent:]
                link.sendall(data)
        except OSError as error:
            # What the server said at the end may still be there to be read.
            self._read_farewell(state)
            raise self._lose(state, str(error)) from error
        return number

    def _read_farewell(self, state: State) -> None:
        with self._reading:
            link = self._socket
            try:
                while link is not None and self._state is state and select.select([link], [], [], 0)[0]:
                    if not self._read_some(state, link):
                        return
            except (OSError, ValueError, HotsetError):
                return

    # Reading

    def _read_some(self, state: State, link: socket.socket) -> bool:
        """Reads once. The lock for reading is held."""
        data, descriptors = _receive(link)
        if not data:
            return False
        for message in state.feed(data, descriptors):
            kind, number = message["type"], message["id"]
            if kind in EVENTS:
                if kind == "goodbye":
                    self._farewell = f"{message['message']} ({message['code']})"
                self._events.append(message)
            elif (waiting := state.replies.get(number)) is not None:
                waiting.append(message)
        return True

    def _reply(self, state: State, number: int) -> dict[str, Any]:
        """The next message for a request."""
        waiting = state.replies[number]
        failure = ""
        while not failure:
            if waiting:
                return waiting.popleft()
            with self._reading:
                link = self._socket
                if waiting:
                    pass
                elif link is None or self._state is not state:
                    failure = "it was closed"
                else:
                    try:
                        if not self._read_some(state, link):
                            failure = "the server is gone"
                    except OSError as error:
                        failure = str(error)
        if waiting:
            return waiting.popleft()
        raise self._lose(state, failure)

    def _ask(
        self, state: State, kind: str, fields: dict[str, Any], descriptors: list[int] | None = None
    ) -> dict[str, Any]:
        number = self._send(state, kind, fields, descriptors)
        try:
            return checked(self._reply(state, number))
        finally:
            state.replies.pop(number, None)

    def _call(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._ask(self._ensure(), kind, fields)

    # Requests

    def load(
        self,
        *names: str,
        device: str = "best",
        deadline: float | None = None,
        priority: str = "interactive",
        dependencies: bool = True,
        preemptible: bool = False,
        split: bool = False,
        keep_alive: str | float | None = None,
        progress: ProgressCallback | bool | None = None,
        on_component: ComponentCallback | None = None,
    ) -> LoadedSet:
        """Loads models or components (`model/component`) and leases them, all or nothing.

        `device`: `cpu` or `ram`, `cuda:N` or `vram:N`, `best`. `deadline` is in seconds. `priority`: `interactive`, `batch`, or `prefetch`,
        which loads when links are idle. `split`: a component that no GPU has room for may come as a `Split`, some of its blocks
        there and the others in RAM. `keep_alive`: how long it stays after its last lease, `"5m"`, seconds, 0, or -1 for no limit.
        `progress` is called with a `Progress`; `True` shows a bar, where tqdm is installed. `on_component` is called with each
        component as it comes, in loading order, while the rest still loads.
        """
        parts = on_component is not None
        fields = load_fields(
            names, device, deadline, priority, dependencies, preemptible, bool(progress), split, keep_alive, parts
        )
        shown = _shower(progress, names)
        state = self._ensure()
        number = self._send(state, "load", fields)
        components: list[Component] = []
        try:
            while True:
                try:
                    reply = checked(self._reply(state, number))
                except KeyboardInterrupt:
                    self._call("cancel", request=number)
                    raise
                if reply["type"] == "leased":
                    for component in reply["set"].components:
                        components.append(component)
                        if on_component is not None:
                            on_component(component)
                    if not reply.get("more"):
                        return LoadedSet(components)
                if reply["type"] == "progress" and shown is not None:
                    shown(Progress.of(reply))
        finally:
            state.replies.pop(number, None)
            if isinstance(shown, _Bar):
                shown.close()

    def models(self, query: str = "") -> list[dict[str, Any]]:
        """The catalogue, or what of it fits a query such as `kind:lora base:sdxl size:<200MiB`, best first."""
        found: list[dict[str, Any]] = []
        while True:
            page = self._call("list", query=query, offset=len(found))
            found += page["models"]
            if not page["models"] or len(found) >= page["total"]:
                return found

    def show(self, name: str | os.PathLike[str]) -> dict[str, Any]:
        """One model of the catalogue, by name or path."""
        return self._call("show", name=os.fspath(name))["model"]

    def plan(
        self, *names: str, device: str = "best", dependencies: bool = True, split: bool = False
    ) -> dict[str, Any]:
        """What a load would do as things stand."""
        fields = load_fields(names, device, None, "interactive", dependencies, False, False, split)
        return self._call("plan", **fields)["plan"]

    def plan_mix(
        self, *sets: Sequence[str], gpus: Sequence[int] = (), imagined: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What loading several sets together would do, on these GPUs or on empty ones of so many bytes that need not exist."""
        wanted = [{"names": list(names)} for names in sets]
        return self._call("plan-mix", sets=wanted, gpus=list(gpus), imagined=list(imagined))["mix"]

    def status(self) -> dict[str, Any]:
        """The state of everything."""
        return self._call("status")["status"]

    def why(self, name: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """The last decisions that concern a model or component, newest first."""
        return self._call("why", name=name, limit=limit)["decisions"]

    def analyse(self) -> dict[str, Any]:
        """How components are used."""
        return self._call("analyse")["usage"]

    def scan(self) -> dict[str, Any]:
        """Scans the model folders now, and waits until the result is published."""
        return self._call("scan")["summary"]

    def drain(self) -> None:
        """Asks the server to end gracefully."""
        self._call("drain")

    def subscribe(self, *topics: str) -> None:
        """Hears of `catalogue`, `decisions` and `pressure` from now on, through `events`."""
        self._call("subscribe", topics=list(topics))

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, such as `revoke`; ends after `timeout` seconds without one."""
        while True:
            state = self._ensure()
            failure = ""
            with self._reading:
                link = self._socket
                if not self._events and link is not None:
                    if not select.select([link], [], [], timeout)[0]:
                        return
                    try:
                        if not self._read_some(state, link):
                            failure = "the server is gone"
                    except OSError as error:
                        failure = str(error)
            while self._events:
                yield self._events.popleft()
            if failure:
                raise self._lose(state, failure)


def _receive(link: socket.socket) -> tuple[bytes, list[int]]:
    """What comes in. Looks for it for a moment before the thread sleeps."""
    until = time.perf_counter() + _LOOKED_FOR
    while time.perf_counter() < until:
        try:
            return received(link, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # The server may need this processor to answer.
            os.sched_yield()
    return received(link)


def received(link: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """One `recvmsg`: bytes, and the descriptors that came with them, which children of this process do not inherit."""
    data, ancillary, got, _ = link.recvmsg(_READ, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
    if not ancillary and not got & socket.MSG_CTRUNC:
        return data, []
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if got & socket.MSG_CTRUNC:
        # Those that this process had no room for are gone, and no later message would get its own any more.
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(errno.EMFILE, "this process has no room for more descriptors (ulimit -n)")
    return data, descriptors.tolist()


def _shut(link: socket.socket) -> None:
    """Closes a socket that another thread may be reading from."""
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # It was not connected any more.
    link.close()


class _Bar:
    """A tqdm bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, progress: Progress) -> None:
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _shower(progress: ProgressCallback | bool | None, names: tuple[str, ...]) -> ProgressCallback | _Bar | None:
    if callable(progress):
        return progress
    if not progress:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return _Bar(tqdm(desc=", ".join(names), unit="B", unit_scale=True, unit_divisor=1024))


def connect(path: str | os.PathLike[str] | None = None, label: str = "", timeout: float = 10.0) -> Client:
    """Connects to the server that listens on `path`: `$HOTSET_BRIDGE__SOCKET`, or the default place of this user."""
    return Client(path, label, timeout)


_default: Client | None = None
_default_lock = threading.Lock()


def default() -> Client:
    """The client that the integrations share; connected at the first use, and again after a fork."""
    global _default
    with _default_lock:
        if _default is None or _default._pid != os.getpid() or _default._closed:
            _default = Client(label="integrations")
        return _default
