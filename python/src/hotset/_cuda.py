"""Device memory that the server leases, mapped read-only into this process, through the CUDA driver alone.

No package is needed: the driver's library is there where a GPU is. The calls are those of the virtual memory API
(`cuMemImportFromShareableHandle`, `cuMemMap`, `cuMemSetAccess`) in the device's primary context, which torch uses as well.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

from ._errors import HotsetError, NotMappable

_POSIX_DESCRIPTOR = 1
_ON_DEVICE = 1
_READ = 1


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Driver:
    """The driver's library, loaded once."""

    _lock = threading.Lock()
    _only: _Driver | None = None

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NotMappable(f"there is no CUDA driver here ({error}); load to ram") from None
        size, pointer, u64, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
        for name, arguments in {
            "cuInit": [ctypes.c_uint],
            "cuDeviceGetCount": [pointer],
            "cuDeviceGet": [pointer, integer],
            "cuDeviceGetUuid_v2": [pointer, integer],
            "cuDevicePrimaryCtxRetain": [pointer, integer],
            "cuDevicePrimaryCtxRelease_v2": [integer],
            "cuCtxSetCurrent": [pointer],
            "cuMemImportFromShareableHandle": [pointer, pointer, integer],
            "cuMemAddressReserve": [pointer, size, size, u64, u64],
            "cuMemMap": [u64, size, size, u64, u64],
            "cuMemSetAccess": [u64, size, pointer, size],
            "cuMemUnmap": [u64, size],
            "cuMemRelease": [u64],
            "cuMemAddressFree": [u64, size],
        }.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, integer
        self._devices: dict[str, tuple[int, int]] = {}
        self.call("cuInit", 0)

    @classmethod
    def get(cls) -> _Driver:
        with cls._lock:
            if cls._only is None:
                cls._only = cls()
            return cls._only

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise NotMappable(f"the CUDA driver refused {name} (error {code})")

    def device(self, uuid: str) -> tuple[int, int]:
        """Ordinal and handle of the GPU with this UUID. Its primary context stays until the process ends: one that went with the last
        mapping would have to be made anew for the next, which takes a tenth of a second."""
        with self._lock:
            found = self._devices.get(uuid)
            if found is None:
                found = self._device(uuid)
                self.call("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), found[1])
                self._devices[uuid] = found
            return found

    def _device(self, uuid: str) -> tuple[int, int]:
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        wanted = uuid.lower().removeprefix("gpu-").removeprefix("mig-").replace("-", "")
        for ordinal in range(count.value):
            device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            self.call("cuDeviceGetUuid_v2", found, device)
            if bytes(found).hex() == wanted:
                return ordinal, device.value
        raise NotMappable(f"the GPU {uuid} is not visible to this process; look at CUDA_VISIBLE_DEVICES")


class DeviceMapping:
    """Read-only device memory of the server. Unmapped when the last reference goes."""

    def __init__(self, descriptor: int, memory: dict[str, Any]) -> None:
        self._undo: list[tuple[Any, ...]] = []
        self.bytes: int = memory["bytes"]
        self.tier: str = memory["tier"]
        self.component = self.content = ""
        self._driver = driver = _Driver.get()
        mapped, offset = memory["mapped"], memory.get("offset", 0)
        if offset + self.bytes > mapped:
            raise HotsetError("the server's device memory is smaller than it says")
        self.ordinal, device = driver.device(memory["gpu"])
        context, handle, address = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_uint64()
        try:
            # Asked for anew, since somebody may have reset the one of before.
            driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._undo.append(("cuDevicePrimaryCtxRelease_v2", device))
            self._context = context
            driver.call("cuCtxSetCurrent", context)
            driver.call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), _POSIX_DESCRIPTOR)
            self._undo.append(("cuMemRelease", handle))
            driver.call("cuMemAddressReserve", ctypes.byref(address), mapped, 0, 0, 0)
            self._undo.append(("cuMemAddressFree", address, mapped))
            driver.call("cuMemMap", address, mapped, 0, handle, 0)
            self._undo.append(("cuMemUnmap", address, mapped))
            access = _Access(_Location(_ON_DEVICE, device), _READ)
            driver.call("cuMemSetAccess", address, mapped, ctypes.byref(access), 1)
        except BaseException:
            self._end()
            raise
        self.address: int = address.value + offset

    @staticmethod
    def take(descriptor: int, memory: dict[str, Any]) -> DeviceMapping:
        """Maps it and closes the descriptor, which is not needed any longer."""
        try:
            return DeviceMapping(descriptor, memory)
        finally:
            os.close(descriptor)

    def _end(self) -> None:
        if not self._undo:
            return
        driver = self._driver
        driver.library.cuCtxSetCurrent(self._context)
        while self._undo:
            name, *arguments = self._undo.pop()
            getattr(driver.library, name)(*arguments)

    def __del__(self) -> None:
        self._end()


class DeviceArray:
    """A tensor in leased device memory, for whoever reads the CUDA array interface: torch, cupy, numba.

    The interface's read-only flag stays off, since torch refuses it; the mapping refuses writes.
    """

    def __init__(self, shape: tuple[int, ...], typestr: str, address: int, keep: tuple[Any, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": typestr, "data": (address, False), "version": 3, "strides": None, "stream": None,
        }
        self._keep = keep
