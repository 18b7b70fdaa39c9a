"""A dictionary of tensors that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class LazyDict(dict[str, Any]):
    """A real `dict` to whoever looks: each value is made at the first look at it, and all of them as soon as it is changed.

    The names come with the first look at any of them.
    """

    __slots__ = ("_make", "_names")

    def __init__(self, names: Callable[[], Any], make: Callable[[str], Any]) -> None:
        super().__init__()
        # Until everything is made: where the names and the values come from.
        self._names: Callable[[], Any] | None = names
        self._make: Callable[[str], Any] | None = make

    def _all(self) -> LazyDict:
        """Makes what is not made yet, in the order of the names."""
        if (names := self._names) is not None and (make := self._make) is not None:
            made = {name: value for name in names() for value in (dict.get(self, name),)}
            dict.clear(self)
            for name, value in made.items():
                dict.__setitem__(self, name, make(name) if value is None else value)
            self._names = self._make = None
        return self

    def __missing__(self, name: str) -> Any:
        if (names := self._names) is None or (make := self._make) is None or name not in names():
            raise KeyError(name)
        value = make(name)
        dict.__setitem__(self, name, value)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._names() if self._names is not None else dict.__contains__(self, name)

    def __len__(self) -> int:
        return len(self._names()) if self._names is not None else dict.__len__(self)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._names())) if self._names is not None else dict.__iter__(self)

    def __reversed__(self) -> Iterator[str]:
        return dict.__reversed__(self._all())

    def get(self, name: str, default: Any = None) -> Any:
        """As of any `dict`."""
        return self[name] if name in self else default  # noqa: SIM401

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """As of any `dict`; makes nothing."""
        return KeysView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """As of any `dict`; a value is made when it is reached."""
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """As of any `dict`; a value is made when it is reached."""
        return ValuesView(self)

    def __setitem__(self, name: str, value: Any) -> None:
        dict.__setitem__(self._all(), name, value)

    def __delitem__(self, name: str) -> None:
        dict.__delitem__(self._all(), name)

    def pop(self, *arguments: Any) -> Any:
        """As of any `dict`."""
        return dict.pop(self._all(), *arguments)

    def popitem(self) -> tuple[str, Any]:
        """As of any `dict`."""
        return dict.popitem(self._all())

    def clear(self) -> None:
        """As of any `dict`."""
        self._names = self._make = None
        dict.clear(self)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of any `dict`."""
        return dict.setdefault(self._all(), name, default)

    def update(self, *others: Any, **more: Any) -> None:
        """As of any `dict`."""
        dict.update(self._all(), *others, **more)

    def copy(self) -> dict[str, Any]:
        """A plain `dict` of it."""
        return dict(self.items())

    def __copy__(self) -> dict[str, Any]:
        return self.copy()

    def __or__(self, other: Any) -> Any:
        return self.copy() | dict(other) if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.copy() if isinstance(other, dict) else NotImplemented

    def __ior__(self, other: Any) -> LazyDict:  # type: ignore[override]
        self.update(other)
        return self

    def __eq__(self, other: object) -> bool:
        return dict.__eq__(self._all(), other._all() if isinstance(other, LazyDict) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return dict.__repr__(self._all())

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()
