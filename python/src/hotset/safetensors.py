"""`load_file` and `safe_open` as the safetensors package has them, on the bytes that a hotset server keeps resident.

A file that is in no scanned folder, or that changed since the last scan, is read by the safetensors package itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from ._client import Client, default
from ._errors import HotsetError, Missing, Refused
from ._lazy import LazyDict
from ._memory import Component, Held


class _File:
    """The leased components that hold a file's tensors."""

    __slots__ = ("_names", "components", "path")

    def __init__(self, path: str, components: list[Component], names: dict[str, Component] | None) -> None:
        self.path = path
        self.components = components
        self._names = names

    @property
    def names(self) -> dict[str, Component]:
        """Which component has which tensor, in the order of their names; read at the first look."""
        if self._names is None:
            (component,) = self.components
            self._names = dict.fromkeys(component, component)
        return self._names

    def release(self) -> None:
        for component in self.components:
            component.release()


class _Known:
    """What is known of a file that was opened before: where its tensors are, and its leases as long as somebody holds them."""

    __slots__ = ("contents", "leased", "names", "path", "shared", "state")

    def __init__(self, path: str, state: tuple[int, ...], names: list[str], shared: list[str] | None) -> None:
        self.path = path
        self.state = state
        self.names = names
        # The tensors of a file that shares its components with others; otherwise all of its one component.
        self.shared = shared
        self.contents: list[str] = []
        self.leased: list[Held] = []

    def file(self, components: list[Component]) -> _File | None:
        if self.shared is None:
            return _File(self.path, components, None)
        has: dict[str, Component] = {}
        for component in components:
            has.update(dict.fromkeys(component, component))
        if any(name not in has for name in self.shared):
            return None
        return _File(self.path, components, {name: has[name] for name in self.shared})


def _state(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def _model_of(client: Client, path: str, state: tuple[int, ...]) -> dict[str, Any] | None:
    """The catalogue's entry that has this file, in the state in which it is now."""
    place = path
    # A file of a folder model is at most two folders deep: the model's, and the component's.
    for _ in range(3):
        try:
            model = client.show(place)
        except Refused as error:
            if error.code != "not-found":
                raise
            place = os.path.dirname(place)
            continue
        return model if model.get("identities", {}).get(path) == list(state[:2]) else None
    return None


def _header_of(path: str) -> dict[str, Any]:
    import json

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # The format's own bound.
        if size > 100_000_000:
            raise HotsetError(f"{path} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(size))
        return header


def _look_up(client: Client, path: str, state: tuple[int, ...]) -> _Known | None:
    """Asks the catalogue for a file."""
    model = _model_of(client, path, state)
    if model is None:
        client.scan()
        model = _model_of(client, path, state)
    if model is None or model.get("error"):
        return None
    parts = [part for part in model["components"] if path in part["files"]]
    if not parts:
        return None
    shared = None
    if len(parts) > 1 or any(len(part["files"]) > 1 for part in parts):
        # Shared with other files, or cut into components: the file itself says which tensors it has.
        shared = [name for name in _header_of(path) if name != "__metadata__"]
    return _Known(path, state, [f"{model['name']}/{part['name']}" for part in parts], shared)


# Files that are remembered for each client.
_MOST_KNOWN = 256


def _open(client: Client, filename: str) -> _File | None:
    """The tensors of a file on the server's memory. `None` where the catalogue does not have it as it is now.

    Where this process holds them still, that takes a look at the file's state and nothing else; where it has opened the file
    before, one question to the server.
    """
    state = _state(filename)
    known: _Known | None = client._files.get(filename)
    if known is not None and known.state == state:
        held = [component for leased in known.leased if (component := leased.component()) is not None]
        if held and len(held) == len(known.leased) and (file := known.file(held)) is not None:
            return file
    else:
        known = None
    for again in (True, False):
        asked = known is None
        if known is None:
            known = _look_up(client, os.path.realpath(filename), state)
            if known is None:
                client._files.pop(filename, None)
                return None
        try:
            components = client.load(*known.names, device="ram", dependencies=False).components
        except Refused:
            # It may be gone from the catalogue under that name.
            if asked:
                raise
            known = None
            continue
        contents = [component.content for component in components]
        if asked or contents == known.contents:
            known.contents = contents
            known.leased = [component.held() for component in components]
            if filename not in client._files and len(client._files) >= _MOST_KNOWN:
                client._files.clear()
            client._files[filename] = known
            return known.file(components)
        # Other bytes than before under the same name, or the same under another: the catalogue knows.
        known = None
        if not again:
            break
    return None


def load_file(
    filename: str | os.PathLike[str],
    device: str | int = "cpu",
    *,
    framework: str = "pt",
    client: Client | None = None,
) -> dict[str, Any]:
    """All tensors of a file: torch tensors (`pt`) or read-only arrays (`np`) on the server's memory.

    What comes back is a `dict` that makes each tensor at the first look at it.
    """
    name = os.fspath(filename)
    numpy = _is_numpy(framework)
    file = _open(client or default(), name)
    if file is None:
        with safe_open(name, framework, device, client=client) as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    where = _device(device)
    to = None if where == "cpu" else where
    if len(file.components) == 1:
        # The names are the component's own, and it makes them.
        (component,) = file.components
        make = component.numpy if numpy else component.torch if to is None else partial(component.torch, device=to)
        return LazyDict(lambda: file.names, make)

    def make_of(key: str) -> Any:
        component = file.names[key]
        return component.numpy(key) if numpy else component.torch(key, to)

    return LazyDict(lambda: file.names, make_of)


def _is_numpy(framework: str) -> bool:
    if framework not in ("pt", "torch", "pytorch", "np", "numpy"):
        raise HotsetError(f"framework {framework!r} is not supported; use pt or np")
    return framework in ("np", "numpy")


def _device(device: str | int) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


class safe_open:  # noqa: N801
    """A file whose tensors are taken one by one, as `safetensors.safe_open`."""

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: str | int = "cpu",
        *,
        client: Client | None = None,
    ) -> None:
        self._numpy = _is_numpy(framework)
        self._path = os.fspath(filename)
        self._device = _device(device)
        self._other: Any = None
        # Tensors for a GPU are copied there from the server's host memory.
        self._file = _open(client or default(), self._path)
        if self._file is None:
            try:
                from safetensors import safe_open as other
            except ImportError:
                raise Missing(
                    f"{self._path} is not in hotset's catalogue as it is now; scan its folder, or pip install safetensors"
                ) from None
            self._other = other(self._path, "np" if self._numpy else "pt", device)

    @property
    def resident(self) -> bool:
        """Whether the tensors are on the server's memory."""
        return self._file is not None

    def __enter__(self) -> safe_open:
        if self._other is not None:
            self._other.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._other is not None:
            self._other.__exit__(*error)
        if self._file is not None:
            self._file.release()

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._other.keys() if self._file is None else self._file.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def offset_keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        if self._file is None:
            return list(self._other.offset_keys())
        names = self._file.names
        order = {id(component): at for at, component in enumerate(self._file.components)}
        return sorted(names, key=lambda name: (order[id(names[name])], names[name]._row(name)[2]))

    def metadata(self) -> dict[str, str] | None:
        """The file's own metadata."""
        metadata: dict[str, str] | None = _header_of(self._path).get("__metadata__")
        return metadata

    def get_tensor(self, name: str) -> Any:
        """A tensor."""
        if self._file is None:
            return self._other.get_tensor(name)
        component = self._file.names.get(name)
        if component is None:
            raise KeyError(f"{self._path} has no tensor {name!r}")
        if self._numpy:
            return component.numpy(name)
        return component.torch(name, None if self._device == "cpu" else self._device)

    def get_slice(self, name: str) -> Any:
        """A tensor of which a part is taken by an index; taking it copies nothing."""
        if self._file is None:
            return self._other.get_slice(name)
        return _Slice(self, name)


class _Slice:
    def __init__(self, file: safe_open, name: str) -> None:
        self._file, self._name = file, name

    def _component(self) -> Component:
        assert self._file._file is not None
        return self._file._file.names[self._name]

    def get_shape(self) -> list[int]:
        """The shape of the whole."""
        return list(self._component().shape(self._name))

    def get_dtype(self) -> str:
        """The dtype, in safetensors notation."""
        return self._component().dtype(self._name)

    def __getitem__(self, index: Any) -> Any:
        return self._file.get_tensor(self._name)[index]
