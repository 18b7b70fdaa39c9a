"""The client for asyncio.

    async with await hotset.aio.connect() as hs:
        models = await hs.load("sdxl-base", device="cpu")
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from ._client import ComponentCallback, ProgressCallback
from ._errors import ConnectionLost, HotsetError
from ._memory import Component, LoadedSet, Progress
from ._wire import EVENTS, VERSION, State, checked, default_socket, frame, load_fields

_READ = 1 << 16
_DESCRIPTORS = 253
_EVENTS_KEPT = 256


class AsyncClient:
    """A connection to a hotset server, for one event loop. Use `connect`. After a lost connection, connect again."""

    def __init__(self, link: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._socket = link
        self._loop = loop
        self._state = State(self._drop)
        self._dropped: deque[int] = deque()
        self._arrived: dict[int, asyncio.Event] = {}
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_EVENTS_KEPT)
        self._sending = asyncio.Lock()
        self._lost: str | None = None
        self._pid = os.getpid()
        self.welcome: dict[str, Any] = {}
        loop.add_reader(link.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ, _DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error))
            return
        if not data:
            self._lose("the server is gone")
            return
        for message in self._state.feed(data, list(descriptors)):
            number = message["id"]
            if message["type"] in EVENTS:
                if message["type"] == "goodbye":
                    self._lost = f"{message['message']} ({message['code']})"
                if self._events.full():
                    self._events.get_nowait()
                self._events.put_nowait(message)
            elif number in self._arrived:
                self._state.replies[number].append(message)
                self._arrived[number].set()

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        self._state.close()
        for arrived in self._arrived.values():
            arrived.set()

    def _drop(self, lease: int) -> None:
        # From a finaliser, perhaps of another thread: the loop sends it.
        self._state.live.discard(lease)
        self._dropped.append(lease)
        if self._pid == os.getpid() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        leases = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if leases and self._socket.fileno() >= 0:
            self._loop.create_task(self._write(frame(self._state.number(), "release", {"leases": leases})))

    async def _write(self, data: bytes) -> None:
        async with self._sending:
            try:
                await self._loop.sock_sendall(self._socket, data)
            except OSError as error:
                self._lose(str(error))

    async def _messages(self, kind: str, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        number = self._state.number()
        arrived = self._arrived[number] = asyncio.Event()
        waiting = self._state.replies[number] = deque()
        ended = False
        try:
            if self._socket.fileno() >= 0:
                await self._write(frame(number, kind, fields))
            while True:
                while waiting:
                    yield checked(waiting.popleft())
                if self._socket.fileno() < 0:
                    ended = True
                    raise ConnectionLost(f"connection lost: {self._lost}; what is mapped stays valid")
                arrived.clear()
                await arrived.wait()
        except HotsetError:
            ended = True
            raise
        finally:
            self._arrived.pop(number, None)
            self._state.replies.pop(number, None)
            if not ended and kind == "load" and self._socket.fileno() >= 0:
                # Without effect where the load is done.
                cancel = frame(self._state.number(), "cancel", {"request": number})
                self._loop.create_task(self._write(cancel))

    async def _call(self, kind: str, **fields: Any) -> dict[str, Any]:
        messages = self._messages(kind, fields)
        try:
            return await anext(messages)
        finally:
            await messages.aclose()

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
        messages = self._messages("load", fields)
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

    async def show(self, name: str | os.PathLike) -> dict[str, Any]:
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

    async def subscribe(self, *topics: str) -> None:
        """Hears of `catalogue`, `decisions` and `pressure` from now on, through `event`."""
        await self._call("subscribe", topics=list(topics))

    async def event(self) -> dict[str, Any]:
        """The next event, such as `revoke`."""
        return await self._events.get()

    def close(self) -> None:
        """Ends the session and its leases. What is mapped stays mapped as long as it is used."""
        self._lose("the client was closed")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def connect(path: str | os.PathLike | None = None, label: str = "") -> AsyncClient:
    """Connects to the server that listens on `path`: `$HOTSET_BRIDGE__SOCKET`, or the default place of this user."""
    where = os.fspath(path) if path is not None else default_socket()
    loop = asyncio.get_running_loop()
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await loop.sock_connect(link, where)
    except OSError as error:
        link.close()
        raise ConnectionLost(f"no server answers on {where}: {error}; start one with `hotset serve`") from error
    client = AsyncClient(link, loop)
    try:
        hello = {"versions": [VERSION], "label": label, "software": "hotset-python 0.1.0"}
        client.welcome = await client._call("hello", **hello)
    except BaseException:
        client.close()
        raise
    return client
