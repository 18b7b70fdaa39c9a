"""Checks on a machine with a GPU that a second process reads leased device memory with PyTorch, and takes none of its own.

    python pytorch.py --make FILE BYTES
    HOTSET_SOCKET=.. python pytorch.py MODEL FILE [DEVICE]

MODEL is the name by which the server knows the safetensors file FILE. Says what it did not check and why, where torch or a GPU is missing;
the exit status is 0 then too, and 1 where something is wrong. The first form writes a safetensors file of random bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

# Beside the context: what torch's allocator takes for a checksum, and what the driver rounds up.
SLACK = 96 << 20


def skip(reason: str) -> None:
    print(f"SKIPPED the check with PyTorch: {reason}")
    sys.exit(0)


class Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml:
    """The GPU's used memory, over all processes."""

    def __init__(self, uuid: str) -> None:
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self.device = ctypes.c_void_p()
        self.call("nvmlInit_v2")
        self.call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} failed with {code}")

    def used(self) -> int:
        memory = Memory()
        self.call("nvmlDeviceGetMemoryInfo", self.device, ctypes.byref(memory))
        return memory.used


def words(torch, tensor):
    """The tensor's bytes as 64-bit words, without a copy, and what is left over."""
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    return flat[:whole].view(torch.int64), flat[whole:]


def checksum(torch, tensors) -> int:
    total = 0
    for tensor in tensors:
        whole, rest = words(torch, tensor)
        total += int(whole.sum()) + int(rest.sum(dtype=torch.int64))
    return total % (1 << 64)


def write(model: str, device: str) -> None:
    """In a process of its own, since it does not survive it: exit status 3 where the write is refused."""
    import torch

    import hotset

    with hotset.connect(os.environ["HOTSET_SOCKET"]) as hs, hs.load(model, device=device) as loaded:
        component = loaded.components[0]
        tensor = component[next(iter(component))]
        try:
            tensor.view(torch.uint8).fill_(0)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"a write through the mapping is refused: {str(error).splitlines()[0]}")
            sys.stdout.flush()
            os._exit(3)
    os._exit(0)


def make(file: str, size: int) -> None:
    tensors, each = 16, size // 16 // 4096 * 4096
    header = {
        f"model.layers.{i}.mlp.weight": {"dtype": "F16", "shape": [each // 64, 32], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(tensors)
    }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with open(file, "wb") as opened:
        opened.write(len(written).to_bytes(8, "little") + written)
        for _ in range(tensors):
            opened.write(os.urandom(each))


def main(model: str, file: str, device: str) -> None:
    try:
        import torch
    except ImportError as error:
        skip(str(error))
    if not torch.cuda.is_available():
        skip("torch sees no GPU")
    try:
        from safetensors.torch import load_file

        import hotset
    except ImportError as error:
        skip(f"{error}; pip install msgpack safetensors")

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    nvml = Nvml(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    with hotset.connect(os.environ["HOTSET_SOCKET"]) as hs:
        # It is on the GPU before anything is measured, and stays there.
        with hs.load(model, device=device) as held:
            del held
        before = nvml.used()
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        context = nvml.used() - before
        with hs.load(model, device=device) as loaded:
            component = loaded.components[0]
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                names = [name for name in json.loads(opened.read(length)) if name != "__metadata__"]
            assert set(names) == set(component), "the tensors are not those of the file"
            seen = checksum(torch, (component[name] for name in names))
            grown = nvml.used() - before
            expected = checksum(torch, load_file(file).values())
            assert seen == expected, f"checksum {seen:#x} on the GPU, {expected:#x} in the file"
            print(f"checksum {seen:#018x} of {len(names)} tensors, {os.path.getsize(file) >> 20} MiB, equals the file's")
            print(f"used memory grew by {grown >> 20} MiB, of which this process's context takes {context >> 20} MiB")
            assert grown <= context + SLACK, "the import takes memory of its own"
            child = subprocess.run([sys.executable, __file__, "--write", model, device], check=False)
            # Refused with an error, or the process did not survive it.
            refused = child.returncode == 3 or child.returncode < 0
            assert refused, f"a write through the mapping went through (exit status {child.returncode})"
            assert checksum(torch, (component[name] for name in names)) == expected, "the write changed the weights"
            del component
    print("ok: the check with PyTorch")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--write":
        write(sys.argv[2], sys.argv[3])
    elif len(sys.argv) == 4 and sys.argv[1] == "--make":
        make(sys.argv[2], int(sys.argv[3]))
    elif len(sys.argv) in (3, 4):
        main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) == 4 else "cuda:0")
    else:
        sys.exit(__doc__)
