"""The client for asyncio.

    async with await hotset.aio.connect() as hs:
        models = await hs.load("sdxl-base", device="cpu")
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ._client import ComponentCallback, ProgressCallback, received
from ._errors import ConnectionLost, HotsetError, Refused
from ._memory import Component, LoadedSet, Progress
from ._wire import EVENTS, MAPPED_AT_ONCE, VERSION, State, StillMapped, checked, default_socket, frame, load_fields

_EVENTS_KEPT = 256


class _Link:
    """One connection; lost once and for all."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop, client: AsyncClient) -> None:
        self.socket = sock
        self.loop = loop
        self.client = client
        self.state = State(self.released, client._still)
        self.arrived: dict[int, asyncio.Event] = {}
        self.sending = asyncio.Lock()
        self.lost: str | None = None
        # Somebody heard that it is lost.
        self.told = False
        self._ended: dict[str, deque[int]] = {"release": deque(), "unmapped": deque()}
        loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        return self.socket.fileno() >= 0

    def _readable(self) -> None:
        try:
            data, descriptors = received(self.socket)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(str(error))
            return
        if not data:
            self.lose("the server is gone")
            return
        for message in self.state.feed(data, descriptors):
            number = message["id"]
            if message["type"] in EVENTS:
                if message["type"] == "goodbye":
                    self.lost = f"{message['message']} ({message['code']})"
                self.client._heard(message)
            elif number in self.arrived:
                self.state.replies[number].append(message)
                self.arrived[number].set()

    def lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
        if self.is_open:
            self.loop.remove_reader(self.socket.fileno())
            self.socket.close()
        self.client._still.add(self.state.mappings())
        self.state.close()
        for arrived in self.arrived.values():
            arrived.set()

    def error(self) -> ConnectionLost:
        self.told = True
        return ConnectionLost(f"connection lost: {self.lost}; what is mapped stays valid, the next request connects again")

    def released(self, lease: int) -> None:
        self.state.live.discard(lease)
        self.end("release", lease)

    def end(self, kind: str, number: int) -> None:
        # From a finaliser, perhaps of another thread: the loop sends it.
        self._ended[kind].append(number)
        if self.client._pid == os.getpid() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        for kind, key in (("release", "leases"), ("unmapped", "mappings")):
            ended = self._ended[kind]
            numbers = [ended.popleft() for _ in range(len(ended))]
            if numbers and self.is_open:
                self.later(frame(self.state.number(), kind, {key: numbers}))

    def later(self, data: bytes) -> None:
        task = self.loop.create_task(self.write(data))
        self.client._tasks.add(task)
        task.add_done_callback(self.client._tasks.discard)

    async def write(self, data: bytes, descriptors: list[int] | None = None) -> None:
        async with self.sending:
            try:
                while descriptors:
                    try:
                        data = data[socket.send_fds(self.socket, [data], descriptors) :]
                        descriptors = None
                    except BlockingIOError:
                        await self._writable()
                await self.loop.sock_sendall(self.socket, data)
            except OSError as error:
                self.lose(str(error))

    async def _writable(self) -> None:
        ready = asyncio.Event()
        self.loop.add_writer(self.socket.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            self.loop.remove_writer(self.socket.fileno())

    async def messages(
        self, kind: str, fields: dict[str, Any], descriptors: list[int] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        number = self.state.number()
        arrived = self.arrived[number] = asyncio.Event()
        waiting = self.state.replies[number] = deque()
        ended = False
        try:
            if self.is_open:
                await self.write(frame(number, kind, fields), descriptors)
            while True:
                while waiting:
                    yield checked(waiting.popleft())
                if not self.is_open:
                    ended = True
                    raise self.error()
                arrived.clear()
                await arrived.wait()
        except HotsetError:
            ended = True
            raise
        finally:
            self.arrived.pop(number, None)
            self.state.replies.pop(number, None)
            if not ended and kind == "load" and self.is_open:
                # Without effect where the load is done.
                self.later(frame(self.state.number(), "cancel", {"request": number}))

    async def ask(self, kind: str, fields: dict[str, Any], descriptors: list[int] | None = None) -> dict[str, Any]:
        messages = self.messages(kind, fields, descriptors)
        try:
            return await anext(messages)
        finally:
            await messages.aclose()


class AsyncClient:
    """A connection to a hotset server, for one event loop. Use `connect`.

    After a lost connection the next request connects again, and tells the server what is still mapped.
    """

    def __init__(self, path: str, label: str, loop: asyncio.AbstractEventLoop) -> None:
        self.path = path
        self.label = label
        self.welcome: dict[str, Any] = {}
        self._loop = loop
        self._link: _Link | None = None
        self._still = StillMapped()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_EVENTS_KEPT)
        self._connecting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._pid = os.getpid()

    def _heard(self, message: dict[str, Any]) -> None:
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(message)

    async def _ensure(self) -> _Link:
        """A connection that works, as far as is known; a new one where the last was lost, and that was told."""
        async with self._connecting:
            link = self._link
            if self._closed:
                raise HotsetError("this client was closed")
            if link is not None and link.is_open:
                return link
            if link is not None and not link.told:
                raise link.error()
            self._link = link = await self._connect()
            return link

    async def _connect(self) -> _Link:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            await self._loop.sock_connect(sock, self.path)
        except OSError as error:
            sock.close()
            raise ConnectionLost(f"no server answers on {self.path}: {error}; start one with `hotset serve`") from error
        link = _Link(sock, self._loop, self)
        try:
            hello = {"versions": [VERSION], "label": self.label, "software": "hotset-python 0.1.0"}
            self.welcome = await link.ask("hello", hello)
            mappings = self._still.take()
            for at in range(0, len(mappings), MAPPED_AT_ONCE):
                some = mappings[at : at + MAPPED_AT_ONCE]
                try:
                    counted = await link.ask("still-mapped", *StillMapped.told(some))
                except Refused:
                    continue  # They are mapped all the same, and the connection is good.
                StillMapped.counted(some, counted["mappings"], lambda number: link.end("unmapped", number))
        except BaseException:
            link.lose("the server refused the connection")
            raise
        return link

    async def reconnect(self, wait: float = 0.0) -> None:
        """Connects again after a lost connection, trying for `wait` seconds."""
        until = self._loop.time() + wait
        while True:
            try:
                await self._call("ping")
                return
            except ConnectionLost:
                if self._loop.time() >= until:
                    raise
                await asyncio.sleep(0.05)

    async def _call(self, kind: str, **fields: Any) -> dict[str, Any]:
        return await (await self._ensure()).ask(kind, fields)

    async def load(
        self,
        *names: str,
        device: str = "best",
        deadline: float | None = None,
        priority: str = "interactive",
        dependencies: bool = True,
        preemptible: bool = False,
        split: bool = False,
        keep_alive: str | float | None = None,
        progress: ProgressCallback | None = None,
        on_component: ComponentCallback | None = None,
    ) -> LoadedSet:
        """As `hotset.Client.load`. Cancelling the task cancels the load."""
        wants, parts = progress is not None, on_component is not None
        fields = load_fields(
            names, device, deadline, priority, dependencies, preemptible, wants, split, keep_alive, parts
        )
        messages = (await self._ensure()).messages("load", fields)
        components: list[Component] = []
        try:
            async for message in messages:
                if message["type"] == "leased":
                    for component in message["set"].components:
                        components.append(component)
                        if on_component is not None:
                            on_component(component)
                    if not message.get("more"):
                        return LoadedSet(components)
                if message["type"] == "progress" and progress is not None:
                    progress(Progress.of(message))
        finally:
            await messages.aclose()
        raise HotsetError("the load ended without an answer")

    async def models(self, query: str = "") -> list[dict[str, Any]]:
        """As `hotset.Client.models`."""
        found: list[dict[str, Any]] = []
        while True:
            page = await self._call("list", query=query, offset=len(found))
            found += page["models"]
            if not page["models"] or len(found) >= page["total"]:
                return found

    async def show(self, name: str | os.PathLike[str]) -> dict[str, Any]:
        """One model of the catalogue, by name or path."""
        return (await self._call("show", name=os.fspath(name)))["model"]

    async def plan(
        self, *names: str, device: str = "best", dependencies: bool = True, split: bool = False
    ) -> dict[str, Any]:
        """What a load would do as things stand."""
        fields = load_fields(names, device, None, "interactive", dependencies, False, False, split)
        return (await self._call("plan", **fields))["plan"]

    async def status(self) -> dict[str, Any]:
        """The state of everything."""
        return (await self._call("status"))["status"]

    async def why(self, name: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """The last decisions that concern a model or component, newest first."""
        return (await self._call("why", name=name, limit=limit))["decisions"]

    async def analyse(self) -> dict[str, Any]:
        """How components are used."""
        return (await self._call("analyse"))["usage"]

    async def plan_mix(
        self, *sets: Sequence[str], gpus: Sequence[int] = (), imagined: Sequence[int] = ()
    ) -> dict[str, Any]:
        """As `hotset.Client.plan_mix`."""
        wanted = [{"names": list(names)} for names in sets]
        reply = await self._call("plan-mix", sets=wanted, gpus=list(gpus), imagined=list(imagined))
        return dict(reply["mix"])

    async def scan(self) -> dict[str, Any]:
        """Scans the model folders now, and waits until the result is published."""
        return dict((await self._call("scan"))["summary"])

    async def drain(self) -> None:
        """Asks the server to end gracefully."""
        await self._call("drain")

    async def subscribe(self, *topics: str) -> None:
        """Hears of `catalogue`, `decisions` and `pressure` from now on, through `event`."""
        await self._call("subscribe", topics=list(topics))

    async def event(self) -> dict[str, Any]:
        """The next event, such as `revoke`."""
        return await self._events.get()

    def close(self) -> None:
        """Ends the session and its leases. What is mapped stays mapped as long as it is used."""
        self._closed = True
        if self._link is not None:
            self._link.lose("the client was closed")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def connect(path: str | os.PathLike[str] | None = None, label: str = "") -> AsyncClient:
    """Connects to the server that listens on `path`: `$HOTSET_BRIDGE__SOCKET`, or the default place of this user."""
    where = os.fspath(path) if path is not None else default_socket()
    client = AsyncClient(where, label, asyncio.get_running_loop())
    await client._ensure()
    return client
