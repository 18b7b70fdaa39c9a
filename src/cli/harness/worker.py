"""A worker as `hotset chaos-worker` is one, with the Python client."""

import argparse
import hashlib
import json
import random
import struct
import sys
import threading
import time

import hotset

WHOLE, PART = 4 << 20, 1 << 18


def say(**said):
    # One write, so that lines of several threads do not mix.
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def digest(component):
    """What `digest.rs` says of the same tensors; None where they cannot be read here."""
    rows, read = [], 0
    for name in component:
        try:
            data = component.memory(name)
        except hotset.HotsetError:
            return None, 0
        own = hashlib.sha256(component.dtype(name).encode())
        for dimension in component.shape(name):
            own.update(struct.pack("<Q", dimension))
        size = len(data)
        parts = [(0, size)] if size <= WHOLE else [(0, PART), ((size - PART) // 2, PART), (size - PART, PART)]
        for offset, length in parts:
            own.update(data[offset : offset + length])
            read += length
        rows.append((name.encode(), own.digest()))
    whole = hashlib.sha256()
    for name, own in sorted(rows):
        whole.update(struct.pack("<Q", len(name)) + name + own)
    return whole.hexdigest(), read


def check(models):
    seen = []
    for component in models.values():
        value, read = digest(component)
        say(said="leased", component=component.id, content=component.content, digest=value, bytes=read)
        seen.append(value)
    return seen


def connect(arguments, label):
    while True:
        try:
            return hotset.connect(arguments.socket, label=label)
        except hotset.HotsetError:
            time.sleep(0.005)


def work(arguments, label, rng):
    client, lost, known = connect(arguments, label), None, None
    while True:
        try:
            names = [m["name"] for m in client.models() if not m.get("error")]
            if client.instance != known:
                say(said="connected", after_ms=None if lost is None else (time.monotonic() - lost) * 1e3)
                lost, known = None, client.instance
            if not names:
                time.sleep(0.1)
                continue
            chosen = [rng.choice(names) for _ in range(rng.randint(1, 3))]
            say(said="asked")
            with client.load(*chosen, device="ram", deadline=10) as models:
                before = check(models)
                time.sleep(rng.random() * 0.05)
                if before != check(models):
                    say(said="wrong", invariant="leased-bytes-stay", message=f"{chosen} changed")
        except hotset.Refused as error:
            say(said="refused", code=error.code)
        except hotset.ConnectionLost:
            if lost is None:
                say(said="lost")
                lost = time.monotonic()
            known = None
            try:
                client.reconnect(wait=30)
            except hotset.HotsetError:
                pass  # Tried again with the next request.


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--label")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--sessions", type=int, default=1)
    arguments = parser.parse_args()
    for session in range(arguments.sessions):
        label = arguments.label if arguments.sessions == 1 else f"{arguments.label}.{session}"
        rng = random.Random(arguments.seed + (session << 48))
        threading.Thread(target=work, args=(arguments, label, rng), daemon=True).start()
    sys.stdin.read()


main()
