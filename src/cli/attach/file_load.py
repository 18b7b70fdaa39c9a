"""How long `load_file` takes for a file that is resident and in the page cache, beside the safetensors package's own."""

import gc
import json
import statistics
import sys
import time

import hotset
import hotset.safetensors
import numpy
import safetensors.torch

socket, path, size, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
hs = hotset.connect(socket, "bench")
PIECE = 64 << 20
buffer = numpy.zeros(PIECE, numpy.uint8)


def ours():
    return hotset.safetensors.load_file(path, client=hs)


def theirs():
    return safetensors.torch.load_file(path)


def made(load):
    return list(load().values())


def arrays(load):
    return [tensor.view(-1).numpy().view(numpy.uint8) for tensor in load().values()]


def touched(load):
    """One byte of each page."""
    return sum(int(array[::4096].sum()) for array in arrays(load))


def copied(load):
    """All bytes, into memory that is warm."""
    for array in arrays(load):
        for at in range(0, len(array), PIECE):
            piece = array[at : at + PIECE]
            numpy.copyto(buffer[: len(piece)], piece)


def timed(work, times=1):
    """Seconds of one call, over several in a row; what it gives is let go outside of the time."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        kept = work()
        seconds.append(time.perf_counter() - began)
        del kept
        hs._call("ping")
    return statistics.median(seconds)


def spread(figures):
    figures = sorted(figures)
    return {"median_us": statistics.median(figures) * 1e6, "least_us": figures[0] * 1e6, "most_us": figures[-1] * 1e6}


# Both are warm: the server has it resident, the kernel has it cached.
kept = ours()
names = len(kept)
copied(theirs)
ways = {
    "call": lambda load: timed(load, 20),
    "all_tensors": lambda load: timed(lambda: made(load), 5),
    "each_page_touched": lambda load: timed(lambda: touched(load)),
    "all_bytes_copied": lambda load: timed(lambda: copied(load)),
}
report = {"bytes": size, "tensors": names, "rounds": rounds}
found = {}
for _ in range(rounds):
    for way, measure in ways.items():
        found.setdefault(("hotset_held", way), []).append(measure(ours))
        kept = None
        gc.collect()
        hs._call("ping")
        found.setdefault(("hotset", way), []).append(measure(ours))
        found.setdefault(("safetensors", way), []).append(measure(theirs))
        kept = ours()
        made(lambda: kept)
for (who, way), figures in found.items():
    report.setdefault(who, {})[way] = spread(figures)
for who in ("hotset", "hotset_held"):
    report[who + "_times_faster"] = {
        way: report["safetensors"][way]["median_us"] / report[who][way]["median_us"] for way in ways
    }
print(json.dumps(report))
