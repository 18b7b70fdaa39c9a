"""A model library and a server for the tests: real files, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy
from safetensors.numpy import save_file

BINARY = os.environ.get("HOTSET_BINARY", "hotset")
# Long enough for any step on a busy machine; only ever reached by a test that hangs.
PATIENCE_S = 60.0


def until(what: str, holds) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"waited for {what}")
        time.sleep(0.01)


class Place:
    """A folder with models and a socket."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        self.models = self.path / "models"
        self.models.mkdir()
        self.socket = str(self.path / "run/hotset.sock")
        self._server: subprocess.Popen | None = None

    def write(self, name: str, tensors: dict[str, numpy.ndarray], metadata: dict[str, str] | None = None) -> Path:
        file = self.models / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        save_file(tensors, partial, metadata)
        partial.rename(file)
        return file

    def write_sparse(self, name: str, size: int) -> Path:
        """A file of this size that takes little of the disk: zeros, but for a word of its own at the start of each MiB."""
        half = size // 2
        header = json.dumps({
            "first": {"dtype": "U64", "shape": [half // 8], "data_offsets": [0, half]},
            "second": {"dtype": "F16", "shape": [half // 2], "data_offsets": [half, size]},
        }).encode()
        header += b" " * (-len(header) % 8)
        partial = self.models / f"{name}.part"
        with open(partial, "wb") as file:
            start = file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(start + size)
            for at in range(0, size, 1 << 20):
                file.seek(start + at)
                file.write(((at // (1 << 20) + 1) * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8, "little"))
        partial.rename(self.models / name)
        return self.models / name

    def serve(self, *sets: str) -> Place:
        command = [BINARY, "--models", str(self.models), "--set", f"bridge.socket={self.socket}"]
        for given in ("ram.budget=8GiB", "catalog.settle=10ms", "catalog.digest_rate=0", *sets):
            command += ["--set", given]
        environment = {"HOME": str(self.path), "PATH": os.environ["PATH"]}
        # Beside the models, for whoever looks why a test failed.
        with open(self.path / "serve.log", "ab") as log:
            self._server = subprocess.Popen([*command, "serve"], env=environment, stdout=log, stderr=log)
        return self

    def kill(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()
        self._server = None

    def close(self) -> None:
        if self._server is not None:
            self.kill()
        self._folder.cleanup()


def available_bytes() -> int:
    """Memory of this machine that can be had."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def pss_kib(address: int) -> tuple[int, int]:
    """Resident and proportional size of the mapping at this address, in KiB."""
    found = resident = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(None, 1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Rss:":
            resident = int(line.split()[1])
        elif inside and first == "Pss:":
            found = int(line.split()[1])
            break
    return resident, found
