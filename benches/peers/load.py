#!/usr/bin/env python3
"""Measures the Python loaders of safetensors files that are installed, on the files given, and prints JSON.

Each loader runs in a process of its own and ends with all bytes touched. Where it has copied them, a byte of each page is
read, which costs nothing; where it has mapped the file, all of them are, since a mapping that nobody has read is no load.
With `--device=cuda:0` they load onto that GPU instead, and end when it is idle again; the GPU's context is there before.
Cold and cached runs alternate over all loaders, with plain direct reads as the control
of each round; reported are medians of three rounds, in GB (10^9 bytes) each second.

`hotset bench load --peers` runs this on the files of its own measurement.
"""

import json
import mmap
import os
import subprocess
import sys
import time

ROUNDS = 3
PAGE = 4096


def touch(array):
    """Reads a byte of each page; gives something that depends on all of them."""
    return int(array.reshape(-1).view("uint8")[::PAGE].sum(dtype="uint64"))


def touch_torch(tensor):
    import torch

    return int(tensor.reshape(-1).view(torch.uint8)[::PAGE].sum(dtype=torch.int64))


def read_torch(tensor):
    """Reads every byte."""
    import torch

    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat[: flat.numel() // 8 * 8].view(torch.int64)
    return int(whole.sum()) + int(flat[whole.numel() * 8 :].sum(dtype=torch.int64))


def safetensors_numpy(files):
    from safetensors.numpy import load_file

    return sum(touch(tensor) for file in files for tensor in load_file(file).values())


def safetensors_torch(files):
    from safetensors.torch import load_file

    # It maps the file.
    return sum(read_torch(tensor) for file in files for tensor in load_file(file).values())


def runai_streamer(files):
    from runai_model_streamer import SafetensorsStreamer

    total = 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files))
        for _, tensor in streamer.get_tensors():
            total += touch_torch(tensor)
    return total


def fastsafetensors_cpu(files):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: list(files)})
    buffers = loader.copy_files_to_device()
    total = sum(touch_torch(buffers.get_tensor(name)) for name in list(buffers.key_to_rank_lidx))
    buffers.close()
    loader.close()
    return total


def safetensors_cuda(files, device):
    from safetensors.torch import load_file

    return [load_file(file, device=device) for file in files]


def runai_cuda(files, device):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(list(files), device=device)
        # What is on the GPU already stays there.
        return [tensor.to(device) for _, tensor in streamer.get_tensors()]


def fastsafetensors_cuda(nogds):
    def load(files, device):
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), device=device, nogds=nogds)
        loader.add_filenames({0: list(files)})
        buffers = loader.copy_files_to_device()
        return loader, buffers, [buffers.get_tensor(name) for name in list(buffers.key_to_rank_lidx)]

    return load


def instanttensor_cuda(files, device):
    from instanttensor import safe_open

    kept = []
    for file in files:
        with safe_open(file, framework="pt", device=int(device.partition(":")[2] or 0)) as opened:
            kept.extend(tensor for _, tensor in opened.tensors())
    return kept


# The same onto a GPU. What they give lives until the GPU is idle.
ON_GPU = {
    "safetensors": ("safetensors", ["torch"], safetensors_cuda),
    "runai-model-streamer": ("runai-model-streamer", ["torch"], runai_cuda),
    "fastsafetensors": ("fastsafetensors", ["torch"], fastsafetensors_cuda(False)),
    "fastsafetensors, no GDS": ("fastsafetensors", ["torch"], fastsafetensors_cuda(True)),
    "instanttensor": ("instanttensor", ["torch"], instanttensor_cuda),
}

# Name, package, what it needs beside, and how it loads.
PEERS = {
    "safetensors.numpy": ("safetensors", ["numpy"], safetensors_numpy),
    "safetensors.torch": ("safetensors", ["torch"], safetensors_torch),
    "runai-model-streamer": ("runai-model-streamer", ["torch"], runai_streamer),
    "fastsafetensors, no GDS": ("fastsafetensors", ["torch"], fastsafetensors_cpu),
}


def drop_cached(files):
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(files):
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass


def control(files):
    """Plain direct reads into memory that is there, four at a time: what the disk gives in this round."""
    from concurrent.futures import ThreadPoolExecutor

    piece = 8 << 20
    buffers = []
    for _ in range(4):
        buffer = mmap.mmap(-1, piece, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer[:] = bytes(piece)
        buffers.append(buffer)

    def read(descriptor, size, first):
        for offset in range(first * piece, size, len(buffers) * piece):
            os.preadv(descriptor, [buffers[first]], offset)

    began = time.perf_counter()
    with ThreadPoolExecutor(len(buffers)) as pool:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            list(pool.map(lambda first: read(descriptor, os.path.getsize(file), first), range(len(buffers))))
            os.close(descriptor)
    return time.perf_counter() - began


def measured(name, files, device):
    """Seconds of one load, in a process of its own and without the time of its imports."""
    command = [sys.executable, os.path.abspath(__file__), "--run", device, name, *files]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if said.returncode != 0:
        raise RuntimeError(said.stderr.strip().splitlines()[-1] if said.stderr.strip() else f"status {said.returncode}")
    return float(said.stdout.strip().splitlines()[-1])


def run(device, name, files):
    import importlib

    package, needs, load = (ON_GPU if device else PEERS)[name]
    for module in [package.replace("-", "_"), *needs]:
        importlib.import_module(module)
    if not device:
        began = time.perf_counter()
        load(files)
        print(time.perf_counter() - began)
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    kept = load(files, device)
    torch.cuda.synchronize(device)
    print(time.perf_counter() - began)
    del kept


def installed(package, needs):
    from importlib import metadata

    try:
        for name in needs:
            metadata.version(name)
        return metadata.version(package)
    except metadata.PackageNotFoundError as missing:
        print(f"not installed: {missing}", file=sys.stderr)
        return None


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def main(device, files):
    loaders = ON_GPU if device else PEERS
    gigabytes = sum(os.path.getsize(file) for file in files) / 1e9
    peers = []
    for name, (package, needs, _) in loaders.items():
        version = installed(package, needs)
        peers.append({"name": name, "version": version})
        if version is None:
            peers[-1]["skipped"] = f"not installed: {package} with {', '.join(needs)}"
    cold = {peer["name"]: [] for peer in peers}
    ratios = {peer["name"]: [] for peer in peers}
    cached = {peer["name"]: [] for peer in peers}
    for _ in range(ROUNDS):
        for peer in peers:
            if "skipped" in peer:
                continue
            name = peer["name"]
            try:
                drop_cached(files)
                raw = control(files)
                drop_cached(files)
                seconds = measured(name, files, device)
                cold[name].append(gigabytes / seconds)
                ratios[name].append(raw / seconds)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                peer["skipped"] = str(error)
    warm(files)
    for _ in range(ROUNDS):
        for peer in peers:
            if "skipped" in peer:
                continue
            try:
                cached[peer["name"]].append(gigabytes / measured(peer["name"], files, device))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                peer["skipped"] = str(error)
    for peer in peers:
        if "skipped" not in peer:
            name = peer["name"]
            peer["cold_gbps"] = median(cold[name])
            peer["cold_over_raw"] = median(ratios[name])
            peer["cached_gbps"] = median(cached[name])
    json.dump(peers, sys.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] == "--run":
        run(sys.argv[2], sys.argv[3], sys.argv[4:])
    elif len(sys.argv) > 2 and sys.argv[1].startswith("--device="):
        main(sys.argv[1].partition("=")[2], sys.argv[2:])
    elif len(sys.argv) > 1:
        main("", sys.argv[1:])
    else:
        sys.exit("usage: load.py [--device=cuda:N] FILE..")
