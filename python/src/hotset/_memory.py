"""Leased memory and the tensors in it.

Three objects with three lives. A `Mapping` is the mapped memory; it is unmapped when nothing refers to it. A `Lease` is the right to
use it; it is given back when nothing refers to it. An *exporter* is a buffer over the mapping that holds both; every array and tensor
is made on an exporter, so both live as long as the last of them.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping as AbstractMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from ._cuda import DeviceArray, DeviceMapping
from ._errors import HotsetError, Missing, NotMappable

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_READ, _MAP_SHARED = 1, 1
# Held while memory is mapped; by a finaliser that looks at a tensor meanwhile, too.
_mapping_now = threading.RLock()


def _after_fork() -> None:
    # A thread of the parent may have held it, and is not here to let go.
    global _mapping_now
    _mapping_now = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
_FAILED = ctypes.c_void_p(-1).value
_F_GET_SEALS, _SEAL_SHRINK, _SEAL_FUTURE_WRITE = 1034, 0x2, 0x10

# numpy's names of the safetensors dtypes; those with a dot are in ml_dtypes.
_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "BF16": ".bfloat16", "F8_E4M3": ".float8_e4m3fn", "F8_E5M2": ".float8_e5m2", "F8_E8M0": ".float8_e8m0fnu",
}
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}


class Mapping:
    """Read-only memory of the server, mapped at the first look at it. Unmapped when the last reference goes."""

    __slots__ = (
        "__weakref__", "_address", "_munmap", "bytes", "component", "content", "descriptor", "identity", "number", "offset", "on_end", "tier",
    )

    def __init__(self, descriptor: int, offset: int, size: int, tier: str) -> None:
        self._address = 0
        self._munmap = _libc.munmap
        self.descriptor = descriptor
        self.offset = offset
        self.bytes = size
        self.tier = tier
        self.component = self.content = ""
        # Set after a reconnection: under what number the new server counts it, and who wants to hear of the end.
        self.number: int | None = None
        self.on_end: Callable[[int], None] | None = None
        # Which memory it is, once a later connection may bring it again.
        self.identity: tuple[int, ...] = ()

    @property
    def address(self) -> int:
        """Where it is mapped. Raises `NotMappable` where that cannot be, or would not be safe."""
        if not self._address:
            with _mapping_now:
                # Another thread may have been faster.
                self._address = self._address or self._map()
        return self._address

    def _map(self) -> int:
        seals = fcntl.fcntl(self.descriptor, _F_GET_SEALS)
        if not (seals & _SEAL_SHRINK and seals & _SEAL_FUTURE_WRITE):
            raise NotMappable(f"{self.component}: the server's memory is not sealed")
        if self.offset + self.bytes > os.fstat(self.descriptor).st_size:
            raise NotMappable(f"{self.component}: the server's memory is shorter than {self.bytes} bytes")
        address: int | None = _libc.mmap(None, self.bytes, _PROT_READ, _MAP_SHARED, self.descriptor, self.offset)
        if address == _FAILED or address is None:
            error = ctypes.get_errno()
            raise NotMappable(f"{self.component}: cannot map {self.bytes} bytes: {os.strerror(error)}")
        return address

    @staticmethod
    def identity_of(descriptor: int, offset: int, size: int) -> tuple[int, ...]:
        """Which part of which memory file."""
        found = os.fstat(descriptor)
        return found.st_dev, found.st_ino, offset, size

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if self._address:
            self._munmap(self._address, self.bytes)
        _close(self.descriptor)
        if self.number is not None and self.on_end is not None:
            self.on_end(self.number)


class Lease:
    """The right to use one component's memory. Given back when the last reference goes."""

    __slots__ = ("__weakref__", "_drop", "number")

    def __init__(self, number: int, drop: Callable[[int], None]) -> None:
        self.number = number
        self._drop = drop

    def __del__(self) -> None:
        self._drop(self.number)


class Table:
    """The tensors of a component, read when the first one is asked for."""

    __slots__ = ("_rows", "_written")

    def __init__(self, written: bytes) -> None:
        self._written: bytes | None = written
        self._rows: dict[str, tuple[str, list[int], int, int]] = {}

    def rows(self) -> dict[str, tuple[str, list[int], int, int]]:
        """`name -> (dtype, shape, offset, bytes)`."""
        if self._written is not None:
            rows = msgpack.unpackb(self._written)
            self._rows = {name: (dtype, shape, offset, size) for name, dtype, shape, offset, size in rows}
            self._written = None
        return self._rows


class Held:
    """A leased component, for as long as somebody else holds it."""

    __slots__ = ("_entry", "_lease", "_mapping", "_table")

    def __init__(self, entry: dict[str, Any], lease: Lease | None, mapping: Any, table: Table) -> None:
        self._entry = entry
        self._lease = weakref.ref(lease) if lease is not None else _nothing
        self._mapping = weakref.ref(mapping) if mapping is not None else _nothing
        self._table = table

    def component(self) -> Component | None:
        """The component once more, on the same lease."""
        lease, mapping = self._lease(), self._mapping()
        if lease is None or mapping is None:
            return None
        return Component(self._entry, lease, mapping, self._table, None)


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Progress:
    """How far a load is."""

    stage: str
    done: int
    total: int
    elapsed_s: float
    bytes_per_s: float
    eta_s: float | None
    components: list[dict[str, Any]]

    @classmethod
    def of(cls, message: dict[str, Any]) -> Progress:
        """Out of a `progress` message."""
        return cls(**{key: message[key] for key in cls.__dataclass_fields__})


class Component(AbstractMapping[str, Any]):
    """A leased component: a lazy mapping from tensor names to torch tensors, or numpy arrays where torch is not installed."""

    def __init__(self, entry: dict[str, Any], lease: Lease, mapping: Mapping | DeviceMapping | None, table: Table, reason: str | None) -> None:
        self._entry = entry
        self.id: str = entry["component"]
        self.model, _, self.name = self.id.rpartition("/")
        self.content: str = entry["content"]
        self.tier: str = entry["tier"]
        self.bytes: int = entry["bytes"]
        # Of a component that is split: which blocks of it these are, as the protocol has it.
        self.part: dict[str, Any] | None = entry.get("part")
        self._lease: Lease | None = lease
        self._mapping = mapping
        self._table = table
        self._reason = reason
        self._exporter: Any = None

    def __repr__(self) -> str:
        return f"<hotset component {self.id} in {self.tier}, {self.bytes} bytes>"

    def _buffer(self) -> Any:
        """The exporter, made once for each lease."""
        if self._exporter is None:
            if self._lease is None:
                raise HotsetError(f"{self.id} was released")
            if self._mapping is None:
                raise NotMappable(f"{self.id} cannot be mapped: {self._reason}")
            if isinstance(self._mapping, DeviceMapping):
                raise NotMappable(f"{self.id} lies on a GPU; use torch() or device_array()")
            exporter = (ctypes.c_ubyte * self._mapping.bytes).from_address(self._mapping.address)
            # ctypes arrays take attributes; these live as long as the last buffer over the array.
            exporter._hotset = (self._lease, self._mapping)  # type: ignore[attr-defined]
            self._exporter = exporter
        return self._exporter

    def _row(self, name: str) -> tuple[str, list[int], int, int]:
        row = self._table.rows().get(name)
        if row is None:
            raise KeyError(f"{self.id} has no tensor {name!r}; it has {len(self._table.rows())} tensors")
        dtype, shape, offset, size = row
        if self._mapping is not None and offset + size > self._mapping.bytes:
            raise HotsetError(f"tensor {name!r} of {self.id} lies outside of its memory")
        return row

    def __len__(self) -> int:
        return len(self._table.rows())

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.rows())

    def __contains__(self, name: object) -> bool:
        return name in self._table.rows()

    def __getitem__(self, name: str) -> Any:
        try:
            import torch  # noqa: F401
        except ImportError:
            return self.numpy(name)
        return self.torch(name)

    def dtype(self, name: str) -> str:
        """The dtype of a tensor in safetensors notation, such as `BF16`."""
        return self._row(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._row(name)[1])

    def memory(self, name: str | None = None) -> memoryview:
        """The bytes of a tensor, or of the whole memory, as a read-only view."""
        view = memoryview(self._buffer()).cast("B").toreadonly()
        if name is None:
            return view
        _, _, offset, size = self._row(name)
        return view[offset : offset + size]

    def numpy(self, name: str) -> numpy.ndarray[Any, Any]:
        """A tensor as a read-only numpy array on the leased bytes. bf16 and fp8 need `ml_dtypes`."""
        import numpy

        dtype, shape, offset, _ = self._row(name)
        known = _NUMPY.get(dtype)
        if known is None:
            raise HotsetError(f"numpy has no dtype for {dtype}; use memory({name!r})")
        if known.startswith("."):
            try:
                import ml_dtypes
            except ImportError:
                raise Missing(f"{name} is {dtype}, which numpy knows through ml_dtypes alone: pip install ml_dtypes") from None
            kind = numpy.dtype(getattr(ml_dtypes, known[1:]))
        else:
            kind = numpy.dtype(known)
        count = math.prod(shape)
        if count == 0:
            empty = numpy.empty(shape, kind)
            empty.flags.writeable = False
            return empty
        return numpy.frombuffer(self.memory(), kind, count, offset).reshape(shape)

    def device_array(self, name: str) -> DeviceArray:
        """A tensor in device memory, as the CUDA array interface has it. Types that it has no letter for (bf16, fp8) come as
        unsigned integers of their size."""
        if not isinstance(self._mapping, DeviceMapping):
            raise NotMappable(f"{self.id} cannot be had on a GPU: {self._reason or 'it lies in host memory'}")
        dtype, shape, offset, size = self._row(name)
        count = math.prod(shape)
        known = _NUMPY.get(dtype, ".")
        if known.startswith("."):
            typestr = {1: "|u1", 2: "<u2", 4: "<u4"}.get(size // max(count, 1), "|u1")
        else:
            import numpy

            typestr = numpy.dtype(known).str
        return DeviceArray(tuple(shape), typestr, self._mapping.address + offset, (self._lease, self._mapping))

    def torch(self, name: str, device: str | torch.device | None = None) -> torch.Tensor:
        """A tensor as a torch tensor on the leased bytes.

        torch knows no read-only tensors: writing into this one ends the process (SIGSEGV), so clone what you change.
        """
        import torch

        dtype, shape, offset, _ = self._row(name)
        kind = getattr(torch, _TORCH.get(dtype, ""), None)
        if kind is None:
            raise HotsetError(f"this torch has no dtype for {dtype}; use memory({name!r})")
        count = math.prod(shape)
        if count == 0:
            tensor = torch.empty(shape, dtype=kind)
        elif isinstance(self._mapping, DeviceMapping):
            where = f"cuda:{self._mapping.ordinal}"
            tensor = torch.as_tensor(self.device_array(name), device=where).view(kind)
        else:
            # The exporter is taken for writable, which spares a warning for each tensor; the mapping is not.
            tensor = torch.frombuffer(self._buffer(), dtype=kind, count=count, offset=offset).view(shape)
        return tensor if device is None else tensor.to(device)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose names begin with the prefix, which is left out of the names."""
        return {name.removeprefix(prefix): self.torch(name) for name in self if name.startswith(prefix)}

    def held(self) -> Held:
        """The same, without keeping it."""
        return Held(self._entry, self._lease, self._mapping, self._table)

    def release(self) -> None:
        """Gives the lease back as soon as no tensor of it is in use any more."""
        self._lease = None
        self._exporter = None
        self._mapping = None


class Split(AbstractMapping[str, Any]):
    """A component that is too large for its GPU: some of its blocks are there, the others in host memory.

    A lazy mapping over the tensors of all its parts, wherever each is. `blocks` has what the names of each block's tensors begin
    with, in the order in which blocks are used, and the part that it is in: whoever runs the model goes through it, and brings
    the blocks in host memory to the GPU one after the other.
    """

    def __init__(self, parts: list[Component]) -> None:
        self.parts = sorted(parts, key=lambda component: int((component.part or {}).get("first", 0)))
        self.id: str = (self.parts[0].part or {})["of"]
        self.model, _, self.name = self.id.rpartition("/")
        self.bytes = sum(component.bytes for component in self.parts)

    def __repr__(self) -> str:
        return f"<hotset component {self.id} in {' and '.join(c.tier for c in self.parts)}, {self.bytes} bytes>"

    @property
    def blocks(self) -> list[tuple[str, Component]]:
        """Each block and the part that it is in, in the order of use."""
        return [(block, component) for component in self.parts for block in (component.part or {})["blocks"]]

    def _of(self, name: str) -> Component:
        for component in self.parts:
            if name in component:
                return component
        raise KeyError(f"{self.id} has no tensor {name!r}; it has {len(self)} tensors")

    def __len__(self) -> int:
        return sum(len(component) for component in self.parts)

    def __iter__(self) -> Iterator[str]:
        for component in self.parts:
            yield from component

    def __getitem__(self, name: str) -> Any:
        return self._of(name)[name]

    def torch(self, name: str, device: str | torch.device | None = None) -> torch.Tensor:
        """As `Component.torch`."""
        return self._of(name).torch(name, device)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As `Component.state_dict`: tensors of both parts, on their devices."""
        return {key: value for component in self.parts for key, value in component.state_dict(prefix).items()}

    def release(self) -> None:
        """As `Component.release`."""
        for component in self.parts:
            component.release()


class LoadedSet(AbstractMapping[str, Any]):
    """The leases of a load: components by name (`unet`), or by full name (`sdxl-base/unet`) where several have one. What is split
    is found as a `Split` by the name of the whole."""

    def __init__(self, components: list[Component]) -> None:
        self.components = components

    def __repr__(self) -> str:
        return f"<hotset set of {', '.join(c.id for c in self.components) or 'nothing'}>"

    def __getitem__(self, name: str) -> Component | Split:
        whole = [c for c in self.components if c.part and name in (c.part["of"], c.part["of"].rpartition("/")[2])]
        if whole and len({c.part["of"] for c in whole if c.part}) == 1:
            return Split(whole)
        found = [c for c in self.components if name in (c.id, c.name)]
        exact = [c for c in found if c.id == name] or found
        if len(exact) == 1:
            return exact[0]
        names = ", ".join(c.id for c in (exact or self.components))
        raise KeyError(f"{name!r} is {'ambiguous' if exact else 'not in the set'}; there are {names}")

    def __iter__(self) -> Iterator[str]:
        return iter([c.id for c in self.components])

    def __len__(self) -> int:
        return len(self.components)

    def release(self) -> None:
        """Gives the leases back as soon as no tensor of them is in use any more."""
        for component in self.components:
            component.release()

    def __enter__(self) -> LoadedSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
