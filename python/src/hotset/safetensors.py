"""`load_file` and `safe_open` as the safetensors package has them, on the bytes that a hotset server keeps resident.

A file that is in no scanned folder, or that changed since the last scan, is read by the safetensors package itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ._client import Client, default
from ._errors import HotsetError, Missing, Refused
from ._memory import Component


class _File:
    """The leased components that hold a file's tensors."""

    def __init__(self, components: list[Component], names: dict[str, Component]) -> None:
        self.components = components
        self.names = names


def _state(path: str) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def _model_of(client: Client, path: str) -> dict[str, Any] | None:
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
        return model if model.get("identities", {}).get(path) == _state(path) else None
    return None


def _header_of(path: str) -> dict[str, Any]:
    import json

    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # The format's own bound.
        if size > 100_000_000:
            raise HotsetError(f"{path} is no safetensors file")
        return json.loads(file.read(size))


def _open(client: Client, path: str, device: str) -> _File | None:
    model = _model_of(client, path)
    if model is None:
        client.scan()
        model = _model_of(client, path)
    if model is None or model.get("error"):
        return None
    parts = [part for part in model["components"] if path in part["files"]]
    if not parts:
        return None
    names = [f"{model['name']}/{part['name']}" for part in parts]
    leased = client.load(*names, device=device, dependencies=False)
    components = list(leased.values())
    names_of: dict[str, Component] = {}
    for component in components:
        names_of.update(dict.fromkeys(component, component))
    if len(parts) > 1 or any(len(part["files"]) > 1 for part in parts):
        # Shared with other files, or cut into components: the file itself says which tensors it has.
        header = _header_of(path)
        wanted = [name for name in header if name != "__metadata__"]
        if any(name not in names_of for name in wanted):
            return None
        names_of = {name: names_of[name] for name in wanted}
    return _File(components, names_of)


def load_file(
    filename: str | os.PathLike,
    device: str = "cpu",
    *,
    framework: str = "pt",
    client: Client | None = None,
) -> dict[str, Any]:
    """All tensors of a file: torch tensors (`pt`) or read-only arrays (`np`) on the server's memory."""
    with safe_open(filename, framework, device, client=client) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class safe_open:  # noqa: N801
    """A file whose tensors are taken one by one, as `safetensors.safe_open`."""

    def __init__(
        self,
        filename: str | os.PathLike,
        framework: str = "pt",
        device: str | int = "cpu",
        *,
        client: Client | None = None,
    ) -> None:
        if framework not in ("pt", "torch", "pytorch", "np", "numpy"):
            raise HotsetError(f"framework {framework!r} is not supported; use pt or np")
        self._path = os.path.realpath(os.fspath(filename))
        self._numpy = framework in ("np", "numpy")
        self._device = f"cuda:{device}" if isinstance(device, int) else str(device)
        self._other: Any = None
        # Tensors for a GPU are copied there from the server's host memory.
        self._file = _open(client or default(), self._path, "ram")
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
            for component in self._file.components:
                component.release()

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
        return sorted(names, key=lambda name: names[name]._row(name)[2])

    def metadata(self) -> dict[str, str] | None:
        """The file's own metadata."""
        return _header_of(self._path).get("__metadata__")

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
