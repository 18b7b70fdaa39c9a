"""What can go wrong."""

from __future__ import annotations

from typing import Any


class HotsetError(Exception):
    """Anything that hotset's client raises."""


class ConnectionLost(HotsetError, ConnectionError):
    """The connection ended, and its leases with it. What is mapped stays valid. The next request connects again."""


class Refused(HotsetError):
    """The server refused a request.

    `code` is for programs (see docs/protocol.md), `nearest` has names that are like the one asked for, `retry_after` is in
    seconds where trying again helps.
    """

    def __init__(self, reply: dict[str, Any]) -> None:
        self.code: str = reply.get("code", "")
        self.nearest: list[str] = list(reply.get("nearest") or [])
        retry_after = reply.get("retry_after_ms")
        self.retry_after: float | None = None if retry_after is None else retry_after / 1000
        super().__init__(f"{reply.get('message', 'refused')} ({self.code})")


class NotMappable(HotsetError):
    """The memory of a lease cannot be mapped by this process."""


class Missing(HotsetError, ImportError):
    """An optional package is needed for this."""
