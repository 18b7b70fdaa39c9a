"""The protocol without a socket: frames, numbers, and what they stand for. docs/protocol.md is its description."""

from __future__ import annotations

import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack

from ._cuda import DeviceMapping
from ._errors import HotsetError, Refused
from ._memory import Component, Lease, LoadedSet, Mapping, Table

VERSION = 1
# Descriptors that are sent at once.
MAPPED_AT_ONCE = 128
LONGEST_REPLY = 64 << 20
# Events that answer no request.
EVENTS = frozenset(("catalogue", "decision", "pressure", "revoke", "adopted", "goodbye"))


def default_socket() -> str:
    """Where the server of this user listens: `$HOTSET_BRIDGE__SOCKET`, or the server's default."""
    named = os.environ.get("HOTSET_BRIDGE__SOCKET")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = runtime or os.path.join(os.path.expanduser("~"), ".local/state")
    return os.path.join(folder, "hotset/hotset.sock")


def target_of(device: str) -> str:
    """hotset's word for a torch device."""
    if device == "cpu":
        return "ram"
    if device == "cuda":
        return "vram"
    if device.startswith("cuda:"):
        return "vram:" + device[5:]
    return device


def load_fields(
    names: tuple[str, ...],
    device: object,
    deadline: float | None,
    priority: str,
    dependencies: bool,
    preemptible: bool,
    progress: bool,
    split: bool = False,
    keep_alive: str | float | None = None,
    parts: bool = False,
) -> dict[str, Any]:
    """The fields of a `load`."""
    fields: dict[str, Any] = {
        "names": list(names),
        "target": target_of(str(device)),
        "dependencies": dependencies,
        "priority": priority,
        "preemptible": preemptible,
        "progress": progress,
    }
    if deadline is not None:
        fields["deadline_ms"] = max(0, int(deadline * 1000))
    if split:
        fields["split"] = True
    if keep_alive is not None:
        fields["keep_alive"] = str(keep_alive)
    if parts:
        fields["parts"] = True
    return fields


def checked(reply: dict[str, Any]) -> dict[str, Any]:
    """The reply, where it is no refusal."""
    if reply["type"] == "error":
        raise Refused(reply)
    return reply


def frame(number: int, kind: str, fields: dict[str, Any]) -> bytes:
    """A message as it goes over the wire."""
    payload: bytes = msgpack.packb({"id": number, "type": kind, **fields})
    return len(payload).to_bytes(4, "little") + payload


class State:
    """What one connection knows. `drop` is called with the number of each lease that nothing refers to any more."""

    def __init__(self, drop: Callable[[int], None], still: StillMapped) -> None:
        self._drop = drop
        self._still = still
        self._bytes = bytearray()
        self._descriptors: deque[int] = deque()
        self._memories: dict[int, list[Any]] = {}
        self._tables: dict[int, Table] = {}
        self._leases: dict[int, int] = {}
        self._numbers = itertools.count(1)
        # Leases that something refers to.
        self.live: set[int] = set()
        # Who waits for what.
        self.replies: dict[int, deque[dict[str, Any]]] = {}

    def number(self) -> int:
        """A number for a request."""
        return next(self._numbers)

    def feed(self, data: bytes, descriptors: list[int]) -> list[dict[str, Any]]:
        """Takes what came in; gives the messages that are whole."""
        self._descriptors.extend(descriptors)
        self._bytes += data
        messages = []
        at = 0
        while len(self._bytes) - at >= 4:
            size = int.from_bytes(self._bytes[at : at + 4], "little")
            if size > LONGEST_REPLY:
                raise HotsetError(f"the server sent a frame of {size} bytes")
            if len(self._bytes) - at - 4 < size:
                break
            with memoryview(self._bytes) as view:
                message = msgpack.unpackb(view[at + 4 : at + 4 + size], strict_map_key=False)
            at += 4 + size
            kind = message["type"]
            if kind == "leased":
                message["set"] = self._take(message)
            elif kind == "released":
                for lease in message["leases"]:
                    self._forget(lease)
            messages.append(message)
        if at:
            del self._bytes[:at]
        return messages

    def _take(self, message: dict[str, Any]) -> LoadedSet:
        for table in message.get("tables", ()):
            self._tables[table["table"]] = Table(table["tensors"])
        for memory in message.get("memories", ()):
            mapping: Mapping | DeviceMapping | None = None
            reason = memory.get("reason")
            if memory["descriptor"]:
                descriptor = self._descriptors.popleft()
                if memory["tier"] == "ram":
                    mapping = self._map(descriptor, memory)
                else:
                    try:
                        mapping = DeviceMapping.take(descriptor, memory)
                    except HotsetError as error:
                        reason = str(error)
            # The mapping itself belongs to who uses it, and to this table until the last lease is `released`.
            self._memories[memory["memory"]] = [mapping, reason, 0]
        components = []
        for entry in message["leases"]:
            memory = self._memories[entry["memory"]]
            memory[2] += 1
            self._leases[entry["lease"]] = entry["memory"]
            if memory[0] is not None:
                memory[0].component, memory[0].content = entry["component"], entry["content"]
            self.live.add(entry["lease"])
            lease = Lease(entry["lease"], self._drop)
            components.append(Component(entry, lease, memory[0], self._tables[entry["table"]], memory[1]))
        return LoadedSet(components)

    def _map(self, descriptor: int, memory: dict[str, Any]) -> Mapping:
        """Maps memory, unless this process maps it already: an earlier server leased it, and this one took it over."""
        offset, size = memory.get("offset", 0), memory["bytes"]
        mapping = self._still.find(descriptor, offset, size)
        if mapping is not None:
            os.close(descriptor)
            return mapping
        return Mapping(descriptor, offset, size, memory["tier"])

    def _forget(self, lease: int) -> None:
        number = self._leases.pop(lease, None)
        if number is None:
            return
        memory = self._memories[number]
        memory[2] -= 1
        if memory[2] == 0:
            del self._memories[number]

    def mappings(self) -> list[Mapping]:
        """What host memory is mapped under a number of this connection."""
        return [memory[0] for memory in self._memories.values() if isinstance(memory[0], Mapping)]

    def close(self) -> None:
        """The connection is gone, and all numbers with it."""
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._memories.clear()
        self._leases.clear()
        self._tables.clear()


class StillMapped:
    """The mappings that outlived their server, to be counted by the next one."""

    def __init__(self) -> None:
        self._mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()

    def add(self, mappings: list[Mapping]) -> None:
        """These outlive their connection, as long as somebody uses them."""
        for mapping in mappings:
            mapping.identity = Mapping.identity_of(mapping.descriptor, mapping.offset, mapping.bytes)
        self._mappings.update(mappings)

    def take(self) -> list[Mapping]:
        """Those that are still used."""
        return list(self._mappings)

    def find(self, descriptor: int, offset: int, size: int) -> Mapping | None:
        """The mapping of this memory, where there is one."""
        if not self._mappings:
            return None
        identity = Mapping.identity_of(descriptor, offset, size)
        return next((mapping for mapping in self.take() if mapping.identity == identity), None)

    @staticmethod
    def told(mappings: list[Mapping]) -> tuple[dict[str, Any], list[int]]:
        """The fields of `still-mapped` and its descriptors."""
        memories = [{"component": m.component, "content": m.content, "tier": m.tier, "bytes": m.bytes} for m in mappings]
        return {"memories": memories}, [m.descriptor for m in mappings]

    @staticmethod
    def counted(mappings: list[Mapping], numbers: list[int], on_end: Callable[[int], None]) -> None:
        """The server counts them under these numbers; `on_end` is called with that of each that goes."""
        for mapping, number in zip(mappings, numbers, strict=True):
            mapping.number = number
            mapping.on_end = on_end
