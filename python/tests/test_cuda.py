"""Leases in device memory: mapped read-only into this process, equal to the file. Where there is no GPU the doubles of the driver stand in
for one (`cargo test --test vram`); by hand: HOTSET_SOCKET=.. MODELS=.. python test_cuda.py NAME.."""

import ctypes
import json
import os
import sys

import hotset


def read(array: hotset._cuda.DeviceArray, size: int) -> bytes:
    """The bytes of an array, copied back through pinned memory."""
    library = ctypes.CDLL("libcuda.so.1")
    pinned, stream = ctypes.c_void_p(), ctypes.c_void_p()
    address = ctypes.c_uint64(array.__cuda_array_interface__["data"][0])

    def call(name: str, *arguments: object) -> None:
        code = getattr(library, name)(*arguments)
        assert code == 0, (name, code)

    call("cuMemHostAlloc", ctypes.byref(pinned), ctypes.c_size_t(size), 0)
    call("cuStreamCreate", ctypes.byref(stream), 1)
    call("cuMemcpyDtoHAsync_v2", pinned, address, ctypes.c_size_t(size), stream)
    call("cuStreamSynchronize", stream)
    found = ctypes.string_at(pinned.value, size)
    call("cuStreamDestroy_v2", stream)
    call("cuMemFreeHost", pinned)
    return found


def main(names: list[str]) -> None:
    with hotset.connect(os.environ["HOTSET_SOCKET"]) as hs:
        for name in names:
            with open(os.path.join(os.environ["MODELS"], f"{name}.safetensors"), "rb") as opened:
                file = opened.read()
            start = 8 + int.from_bytes(file[:8], "little")
            header = json.loads(file[8:start])
            header.pop("__metadata__", None)
            with hs.load(name, device="cuda:0") as loaded:
                component = loaded.components[0]
                assert component.tier == "vram:0", component.tier
                assert set(component) == set(header)
                for tensor, told in header.items():
                    begin, end = (start + offset for offset in told["data_offsets"])
                    array = component.device_array(tensor)
                    assert array.__cuda_array_interface__["shape"] == tuple(told["shape"])
                    assert read(array, end - begin) == file[begin:end], (name, tensor)
                    del array
                try:
                    component.memory()
                except hotset.HotsetError as error:
                    assert "GPU" in str(error)
                else:
                    raise AssertionError("device memory is not host memory")
                del component
            print(f"ok {name}")


main(sys.argv[1:])
