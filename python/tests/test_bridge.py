"""Several real processes on one server."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import queue
import signal
import sys
import threading
import unittest

import ml_dtypes
import numpy
from safetensors import safe_open
from safetensors.numpy import load_file as plain_load_file
from support import Place, available_bytes, pss_kib, until

import hotset
import hotset.aio
import hotset.safetensors

# Size of the component that two processes map: the issue's own where the machine has room for it, in the server's memory, in the
# page cache and to spare.
LARGE_BYTES = (2 << 30) if available_bytes() > (8 << 30) else (256 << 20)


def small(seed: int) -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(seed)
    return {
        "a.weight": random.standard_normal((64, 33)).astype(numpy.float32),
        "a.bias": random.standard_normal(33).astype(ml_dtypes.bfloat16),
        "b.weight": random.standard_normal((8, 8)).astype(ml_dtypes.float8_e4m3fn),
        "count": numpy.array(seed, dtype=numpy.int64),
        "empty": numpy.empty((0, 4), numpy.float16),
        "flags": numpy.array([True, False, True]),
    }


def as_in_file(component: hotset.Component, file: str) -> bool:
    """Whether every byte is what the safetensors package reads, a piece at a time."""
    piece = 16 << 20
    with safe_open(file, "np") as plain:
        for name in plain.keys():  # noqa: SIM118
            array, whole = component.numpy(name), plain.get_slice(name)
            for at in range(0, len(array), piece):
                if array[at : at + piece].tobytes() != whole[at : min(at + piece, len(array))].tobytes():
                    return False
        return sorted(component) == sorted(plain.keys())


def worker(socket: str, name: str, file: str, told, answers) -> None:
    """A process that leases, looks at every byte, and does what it is told."""
    client = hotset.connect(socket, label="worker")
    leased = client.load(name, device="cpu")
    component = leased.components[0]
    array = numpy.frombuffer(component.memory(), numpy.uint8)
    answers.put(as_in_file(component, file))
    while (word := told.get()) != "end":
        if word == "pss":
            answers.put(pss_kib(array.ctypes.data))
        elif word == "check":
            answers.put(as_in_file(component, file))
        elif word == "lost":
            try:
                client.status()
                answers.put("")
            except hotset.ConnectionLost as error:
                answers.put(str(error))
        elif word == "reconnect":
            client.reconnect(wait=60)
            answers.put(client.instance)
        elif word == "again":
            again = client.load(name, device="cpu").components[0]
            answers.put(numpy.frombuffer(again.memory(), numpy.uint8).ctypes.data == array.ctypes.data)
        elif word == "assign":
            try:
                array[0] = 1
            except ValueError as error:
                answers.put(str(error))
        elif word == "write":
            # The protection of the pages themselves: a stray write ends the process.
            import ctypes

            ctypes.memset(array.ctypes.data, 1, 1)
            answers.put("written")


class Workers:
    """Processes that were told to lease the same component."""

    def __init__(self, place: Place, name: str, file: Path, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.all = []
        for _ in range(count):
            told, answers = context.Queue(), context.Queue()
            process = context.Process(target=worker, args=(place.socket, name, str(file), told, answers), daemon=True)
            process.start()
            self.all.append((process, told, answers))

    def ready(self) -> list:
        """What each says next; it may have gigabytes to look at, on a machine that does much else."""
        said = []
        for process, _, answers in self.all:
            while True:
                try:
                    said.append(answers.get(timeout=1))
                    break
                except queue.Empty:
                    if not process.is_alive():
                        raise AssertionError(f"a worker ended with {process.exitcode}") from None
        return said

    def ask(self, word: str) -> list:
        for _, told, _ in self.all:
            told.put(word)
        return self.ready()

    def end(self) -> None:
        for process, told, _ in self.all:
            if process.is_alive():
                told.put("end")
        for process, _, _ in self.all:
            process.join(60)


def worker_leases(client: hotset.Client) -> int:
    sessions = client.status()["sessions"]
    return sum(s["leases"] for s in sessions if s["label"].startswith("worker"))


def committed(client: hotset.Client) -> int:
    return next(tier["committed"] for tier in client.status()["tiers"] if tier["tier"] == "ram")


class Two(unittest.TestCase):
    """Two workers on the same component."""

    def setUp(self) -> None:
        self.place = Place()

    def tearDown(self) -> None:
        self.place.close()

    def test_two_processes_share_the_bytes_and_die_alone(self) -> None:
        file = self.place.write_sparse("large.safetensors", LARGE_BYTES)
        self.place.serve()
        client = connected(self.place)
        workers = Workers(self.place, "large", file, 1)
        self.assertEqual(workers.ready(), [True])
        one = committed(client)
        # The second worker costs nothing: neither in the books, nor in the pages of the machine.
        more = Workers(self.place, "large", file, 1)
        self.assertEqual(more.ready(), [True])
        workers.all += more.all
        self.assertEqual((worker_leases(client), committed(client)), (2, one))
        # Three processes have these pages, the server among them: each is charged a part, all parts together the bytes once.
        for resident, part in workers.ask("pss"):
            self.assertGreaterEqual(resident * 1024, LARGE_BYTES)
            self.assertLess(part * 1024, LARGE_BYTES * 0.55)
        for refused in workers.ask("assign"):
            self.assertIn("read-only", refused)
        # Killed in the middle: the other one does not notice, and the leases are back.
        (first, _, _), (second, told, _) = workers.all
        os.kill(first.pid, signal.SIGKILL)
        until("the killed worker's lease to end", lambda: worker_leases(client) == 1)
        workers.all = workers.all[1:]
        self.assertEqual(workers.ask("check"), [True])
        # Writing through the back door is caught by the hardware.
        told.put("write")
        second.join(60)
        self.assertEqual(second.exitcode, -signal.SIGSEGV)
        until("all leases to end", lambda: worker_leases(client) == 0)
        first.join(60)
        client.close()

    def test_workers_outlive_the_server_and_the_next_one_takes_their_memory_over(self) -> None:
        file = self.place.write_sparse("large.safetensors", 64 << 20)
        # Of files that could be the same, digests are made.
        self.place.write_sparse("twin.safetensors", 64 << 20)
        self.place.serve("catalog.digest_rate=4GiB")
        client = connected(self.place)
        # With the digest known, the next server need not read the file to know its bytes.
        until("the digest", lambda: client.show("large")["components"][0]["content_id"].startswith("blake3:"))
        workers = Workers(self.place, "large", file, 2)
        self.assertEqual(workers.ready(), [True, True])
        before, instance = committed(client), client.instance
        self.place.kill()
        for lost in workers.ask("lost"):
            self.assertIn("connection lost", lost)
        self.assertEqual(workers.ask("check"), [True, True])

        self.place.serve("catalog.digest_rate=4GiB")
        client = connected(self.place)
        self.assertNotIn(instance, workers.ask("reconnect"))
        until("the memory to be taken over", lambda: worker_leases(client) == 2)
        self.assertEqual(committed(client), before)
        # Loading it again is on the same bytes, at the same address.
        self.assertEqual(workers.ask("again"), [True, True])
        counters = client.status()["counters"]
        self.assertEqual((counters["adoptions"], counters["reads"], counters["bytes_read"]), (1, 0, 0))
        (adopted,) = [d for d in client.why("large") if d["act"] == "adopt"]
        self.assertFalse(adopted["read"])
        # What was loaded anew has this memory too.
        with client.load("large", device="cpu") as leased:
            self.assertTrue(as_in_file(leased.components[0], str(file)))
        self.assertEqual(client.status()["counters"]["reads"], 0)
        workers.end()
        until("all leases to end", lambda: worker_leases(client) == 0)
        client.close()


def connected(place: Place, label: str = "test") -> hotset.Client:
    found: list[hotset.Client] = []

    def answers() -> bool:
        try:
            found.append(hotset.connect(place.socket, label))
        except hotset.ConnectionLost:
            return False
        return True

    until("the server", answers)
    return found[0]


class Alone(unittest.TestCase):
    """One process, in detail."""

    def setUp(self) -> None:
        self.place = Place()
        self.tensors = small(1)
        self.file = self.place.write("small.safetensors", self.tensors, {"format": "pt", "made": "here"})
        self.place.serve()
        self.client = connected(self.place)

    def tearDown(self) -> None:
        self.client.close()
        self.place.close()

    def leases(self) -> int:
        return sum(session["leases"] for session in self.client.status()["sessions"])

    def test_arrays_have_the_right_bytes_and_cannot_be_written(self) -> None:
        with self.client.load("small", device="cpu") as leased:
            component = leased["small"] if "small" in leased else leased.components[0]
            self.assertEqual(sorted(component), sorted(self.tensors))
            for name, expected in self.tensors.items():
                array = component.numpy(name)
                self.assertEqual((array.dtype, array.shape), (expected.dtype, expected.shape), name)
                self.assertEqual(array.tobytes(), expected.tobytes(), name)
                self.assertFalse(array.flags.writeable, name)
            array = component.numpy("a.weight")
            with self.assertRaises(ValueError):
                array[0, 0] = 1
            with self.assertRaises(ValueError):
                array.flags.writeable = True
            with self.assertRaises(TypeError):
                component.memory("a.weight")[0] = 1
            with self.assertRaises(KeyError):
                component.numpy("none")

    def test_a_lease_lives_as_long_as_the_last_array(self) -> None:
        leased = self.client.load("small", device="cpu")
        again = self.client.load("small", device="cpu")
        self.assertEqual(self.leases(), 2)
        # Both are on one mapping.
        self.assertEqual(leased.components[0].numpy("a.weight").ctypes.data, again.components[0].numpy("a.weight").ctypes.data)
        part = leased.components[0].numpy("a.weight")[3:5, ::2]
        leased.release()
        del leased
        gc.collect()
        self.assertEqual(self.leases(), 2)
        self.assertEqual(part.tobytes(), self.tensors["a.weight"][3:5, ::2].tobytes())
        del part
        until("the first lease to end", lambda: self.leases() == 1)
        again.release()
        with self.assertRaises(hotset.HotsetError):
            again.components[0].numpy("a.weight")
        until("the second lease to end", lambda: self.leases() == 0)

    def test_many_threads_share_a_client(self) -> None:
        problems: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(50):
                    with self.client.load("small", device="cpu") as leased:
                        found = leased.components[0].numpy("count")
                        assert found == 1
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(problems, [])
        until("all leases to end", lambda: self.leases() == 0)

    def test_refusals_are_exceptions_with_codes(self) -> None:
        with self.assertRaises(hotset.Refused) as caught:
            self.client.load("smal")
        self.assertEqual((caught.exception.code, caught.exception.nearest), ("not-found", ["small"]))
        with self.assertRaises(hotset.Refused) as caught:
            self.client.load(str(self.file))
        self.assertEqual(caught.exception.code, "names-only")
        with self.assertRaises(hotset.Refused) as caught:
            self.client.load("small", device="cuda:5")
        self.assertEqual(caught.exception.code, "no-such-tier")

    def test_the_catalogue_plans_and_decisions(self) -> None:
        self.assertEqual([m["name"] for m in self.client.models()], ["small"])
        self.assertEqual(self.client.models("kind:lora"), [])
        self.assertEqual(self.client.show(str(self.file))["name"], "small")
        self.assertEqual(self.client.plan("small")["fit"], "now")
        seen: list[hotset.Progress] = []
        self.client.load("small", device="ram", progress=seen.append).release()
        self.assertEqual(self.client.why("small")[0]["act"], "admit")
        self.assertEqual(self.client.analyse()["hot"][0]["uses"], 1)
        self.assertTrue(all(p.done <= p.total for p in seen))

    def test_events_come_when_they_are_asked_for(self) -> None:
        self.client.subscribe("catalogue")
        self.place.write("later.safetensors", small(2))
        event = next(self.client.events(timeout=60))
        self.assertEqual(event["changes"], [{"change": "added", "name": "later"}])

    def test_safetensors_functions_are_drop_in(self) -> None:
        # The package's numpy side knows no fp8.
        plain = {name: array for name, array in self.tensors.items() if name != "b.weight"}
        self.file = self.place.write("plain.safetensors", plain, {"format": "pt", "made": "here"})
        loaded = hotset.safetensors.load_file(self.file, framework="np", client=self.client)
        expected = plain_load_file(self.file)
        self.assertEqual(sorted(loaded), sorted(expected))
        for name, array in expected.items():
            self.assertEqual(loaded[name].tobytes(), array.tobytes(), name)
        with hotset.safetensors.safe_open(self.file, "np", client=self.client) as file:
            self.assertTrue(file.resident)
            self.assertEqual(file.metadata(), {"format": "pt", "made": "here"})
            part = file.get_slice("a.weight")
            self.assertEqual((part.get_shape(), part.get_dtype()), ([64, 33], "F32"))
            self.assertEqual(part[2:4].tobytes(), expected["a.weight"][2:4].tobytes())
            with self.assertRaises(KeyError):
                file.get_tensor("none")
        # What comes back is a dict to whoever looks, and makes its values one by one.
        lazy = hotset.safetensors.load_file(self.file, framework="np", client=self.client)
        self.assertIsInstance(lazy, dict)
        self.assertEqual(dict.__len__(lazy), 0)
        self.assertIs(lazy["a.weight"], lazy["a.weight"])
        self.assertEqual((dict.__len__(lazy), len(lazy), "count" in lazy, "none" in lazy), (1, 5, True, False))
        self.assertEqual(list(lazy), sorted(expected))
        self.assertEqual([name for name, _ in lazy.items()], list(dict(lazy)))
        self.assertEqual(sorted({**lazy, "more": 1}), sorted([*expected, "more"]))
        self.assertIsNone(lazy.get("none"))
        with self.assertRaises(KeyError):
            lazy["none"]
        self.assertEqual(int(lazy.pop("count")), 1)
        self.assertEqual(sorted(lazy), sorted(set(expected) - {"count"}))
        # Held still, the file is loaded again without a question to the server; let go, with one.
        asked: list[str] = []
        send = self.client._send
        self.client._send = lambda state, kind, *rest: asked.append(kind) or send(state, kind, *rest)
        again = hotset.safetensors.load_file(self.file, framework="np", client=self.client)
        self.assertEqual((again["a.weight"].ctypes.data, asked), (lazy["a.weight"].ctypes.data, []))
        del loaded, lazy, again, part, file
        gc.collect()
        again = hotset.safetensors.load_file(self.file, framework="np", client=self.client)
        self.assertEqual((again["a.weight"].tobytes(), asked), (expected["a.weight"].tobytes(), ["load"]))
        del again
        # A file that is written anew is never served stale, and one in no scanned folder is read all the same.
        newer = {name: array for name, array in small(7).items() if name != "b.weight"}
        self.place.write("plain.safetensors", newer)
        loaded = hotset.safetensors.load_file(self.file, framework="np", client=self.client)
        self.assertEqual(int(loaded["count"]), 7)
        elsewhere = self.place.path / "elsewhere.safetensors"
        elsewhere.write_bytes(self.file.read_bytes())
        with hotset.safetensors.safe_open(elsewhere, "np", client=self.client) as file:
            self.assertFalse(file.resident)
            self.assertEqual(int(file.get_tensor("count")), 7)

    def test_mappings_outlive_a_killed_server_and_are_taken_over_by_the_next(self) -> None:
        leased = self.client.load("small", device="cpu")
        array = leased.components[0].numpy("a.weight")
        instance = self.client.instance
        self.place.kill()
        with self.assertRaises(hotset.ConnectionLost) as caught:
            self.client.status()
        self.assertIn("connection lost", str(caught.exception))
        with self.assertRaises(hotset.ConnectionLost):
            self.client.load("small")
        self.assertEqual(array.tobytes(), self.tensors["a.weight"].tobytes())
        self.place.serve()
        self.client.reconnect(wait=60)
        self.assertNotEqual(self.client.instance, instance)
        until("the memory to be taken over", lambda: self.leases() == 1)
        counted = committed(self.client)
        self.assertGreaterEqual(counted, self.file.stat().st_size)
        # A new lease is on the same memory, at the same address.
        new = self.client.load("small", device="cpu")
        self.assertEqual(new.components[0].numpy("a.weight").ctypes.data, array.ctypes.data)
        self.assertEqual((committed(self.client), self.leases()), (counted, 2))
        self.assertEqual(self.client.status()["counters"]["reads"], 0)
        new.release()
        leased.release()
        del leased, new, array
        gc.collect()
        until("the leases to end", lambda: self.leases() == 0)

    def test_a_forked_child_is_told_to_connect_anew(self) -> None:
        leased = self.client.load("small", device="cpu")
        array = leased.components[0].numpy("a.weight")
        child = os.fork()
        if child == 0:
            # The memory is inherited, the connection is not.
            good = array.tobytes() == self.tensors["a.weight"].tobytes()
            try:
                self.client.status()
                good = False
            except hotset.HotsetError:
                pass
            leased.release()
            del leased, array
            os._exit(0 if good else 1)
        _, status = os.waitpid(child, 0)
        self.assertEqual(os.waitstatus_to_exitcode(status), 0)
        self.assertEqual(self.leases(), 1)

    def test_asyncio(self) -> None:
        tensors = self.tensors

        async def story() -> None:
            async with await hotset.aio.connect(self.place.socket, "async") as client:
                sets = await asyncio.gather(*(client.load("small", device="cpu") for _ in range(10)))
                for leased in sets:
                    found = leased.components[0].numpy("a.weight").tobytes()
                    self.assertEqual(found, tensors["a.weight"].tobytes())
                self.assertEqual(self.leases(), 10)
                for leased in sets:
                    leased.release()
                del leased, sets
                while self.leases():
                    await asyncio.sleep(0.01)
                with self.assertRaises(hotset.Refused):
                    await client.load("none")
                self.assertEqual((await client.models())[0]["name"], "small")
                kept = await client.load("small", device="cpu")
                array = kept.components[0].numpy("a.weight")
                self.place.kill()
                with self.assertRaises(hotset.ConnectionLost):
                    await client.status()
                self.assertEqual(array.tobytes(), tensors["a.weight"].tobytes())
                self.place.serve()
                await client.reconnect(wait=60)
                event = await client.event()
                while event["type"] != "adopted":
                    event = await client.event()
                self.assertTrue(event["resident"], event)
                again = await client.load("small", device="cpu")
                self.assertEqual(again.components[0].numpy("a.weight").ctypes.data, array.ctypes.data)
                self.assertEqual((await client.status())["counters"]["reads"], 0)

        asyncio.run(asyncio.wait_for(story(), 60))


class Sets(unittest.TestCase):
    """Sets of several components: as they come, kept alive, planned together, split."""

    def setUp(self) -> None:
        self.place = Place()
        self.blocks = {f"layers.{i}.weight": numpy.full(25 << 10, i, numpy.float32) for i in range(8)}
        self.place.write("first.safetensors", small(1))
        self.place.write("second.safetensors", small(2))
        self.place.write("blocks.safetensors", self.blocks)
        # One simulated GPU with room for half of the blocks; its memory cannot be mapped by others.
        gpu = ("gpu.0.device=sim", "gpu.0.sim.memory=8MiB", "gpu.0.sim.granularity=64KiB", "gpu.0.budget=512KiB")
        self.place.serve(*gpu, "gpu.0.headroom=0")
        self.client = connected(self.place)

    def tearDown(self) -> None:
        self.client.close()
        self.place.close()

    def resident(self) -> list[str]:
        ram = next(tier for tier in self.client.status()["tiers"] if tier["tier"] == "ram")
        return [component["component"]["model"] for component in ram["components"]]

    def test_components_come_one_after_the_other(self) -> None:
        came: list[hotset.Component] = []
        leased = self.client.load("first", "second", device="ram", on_component=came.append)
        self.assertEqual(leased.components, came)
        self.assertEqual({component.model for component in came}, {"first", "second"})

        async def story() -> None:
            async with await hotset.aio.connect(self.place.socket) as client:
                seen: list[hotset.Component] = []
                both = await client.load("first", "second", device="ram", on_component=seen.append)
                self.assertEqual(both.components, seen)

        asyncio.run(asyncio.wait_for(story(), 60))

    def test_a_keep_alive_ends(self) -> None:
        self.client.load("first", device="ram").release()
        self.client.load("second", device="ram", keep_alive=0).release()
        until("the second to go", lambda: self.resident() == ["first"])
        self.client.load("first", device="ram", keep_alive="100ms").release()
        until("the first to go", lambda: self.resident() == [])
        with self.assertRaises(hotset.Refused):
            self.client.load("first", keep_alive="soon")

    def test_a_component_that_is_too_large_is_split(self) -> None:
        with self.assertRaises(hotset.Refused) as caught:
            self.client.load("blocks", device="cuda:0")
        self.assertIn("may be split", str(caught.exception))
        self.assertEqual(len(self.client.plan("blocks", device="cuda:0", split=True)["steps"]), 2)
        leased = self.client.load("blocks", device="cuda:0", split=True)
        whole = leased["blocks/weights"] if "blocks/weights" in leased else leased[leased.components[0].part["of"]]
        self.assertIsInstance(whole, hotset.Split)
        self.assertEqual([block for block, _ in whole.blocks], [f"layers.{i}." for i in range(8)])
        self.assertEqual([part.tier for part in whole.parts], ["vram:0", "ram"])
        self.assertEqual(sorted(whole), sorted(self.blocks))
        streamed = [name for name in whole if whole._of(name).tier == "ram"]
        self.assertGreater(len(streamed), 2)
        for name in streamed:
            self.assertEqual(whole._of(name).numpy(name).tobytes(), self.blocks[name].tobytes())

    def test_sets_are_planned_together(self) -> None:
        mix = self.client.plan_mix(["first"], ["blocks"], imagined=[1 << 20, 1 << 20])
        self.assertTrue(mix["fits"])
        mix = self.client.plan_mix(["first"], ["blocks"])
        self.assertFalse(mix["fits"])
        self.assertIn("never fit", mix["sets"][1]["reason"])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
