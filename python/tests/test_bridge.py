"""Several real processes on one server."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
import threading
import unittest

import ml_dtypes
import numpy
from safetensors.numpy import load_file as plain_load_file
from support import Place, pss_kib, until

import hotset
import hotset.aio
import hotset.safetensors

# Size of the component that two processes map. The issue's own size with HOTSET_TEST_LARGE=1.
LARGE_BYTES = (2 << 30) if os.environ.get("HOTSET_TEST_LARGE") == "1" else (256 << 20)


def large() -> dict[str, numpy.ndarray]:
    words = numpy.arange(LARGE_BYTES // 8, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
    half = len(words) // 2
    return {"first": words[:half].view(numpy.float16), "second": words[half:]}


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


def worker(socket: str, told, answers) -> None:
    """A process that leases, looks at every byte, and waits to be told what to do."""
    client = hotset.connect(socket, label="worker")
    leased = client.load("large", device="cpu")
    component = leased.components[0]
    array = numpy.frombuffer(component.memory(), numpy.uint8)
    answers.put(("sum", int(component.numpy("second").sum(dtype=numpy.uint64)), int(array.sum(dtype=numpy.uint64))))
    while (word := told.get()) != "end":
        if word == "pss":
            answers.put(pss_kib(array.ctypes.data))
        elif word == "write":
            # The protection of the pages themselves: a stray write ends the process.
            import ctypes

            ctypes.memset(array.ctypes.data, 1, 1)
            answers.put("written")


class Two(unittest.TestCase):
    """Two workers on the same component."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Place()
        cls.tensors = large()
        cls.file = cls.place.write("large.safetensors", cls.tensors)
        cls.place.serve()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.place.close()

    def test_two_processes_share_the_bytes_and_die_alone(self) -> None:
        client = connected(self.place)
        context = multiprocessing.get_context("spawn")
        workers = []
        for _ in range(2):
            told, answers = context.Queue(), context.Queue()
            process = context.Process(target=worker, args=(self.place.socket, told, answers), daemon=True)
            process.start()
            workers.append((process, told, answers))
        expected = int(plain_load_file(self.file)["second"].sum(dtype=numpy.uint64))
        sums = [answers.get(timeout=60) for _, _, answers in workers]
        self.assertEqual(sums[0], sums[1])
        self.assertEqual(sums[0][1], expected)

        def leases() -> int:
            sessions = client.status()["sessions"]
            return sum(s["leases"] for s in sessions if s["label"].startswith("worker"))

        self.assertEqual(leases(), 2)
        # Three processes have these pages, the server among them: each is charged a part, all parts together the bytes once.
        for process, told, answers in workers:
            told.put("pss")
            resident, part = answers.get(timeout=60)
            self.assertGreaterEqual(resident * 1024, LARGE_BYTES)
            self.assertLess(part * 1024, LARGE_BYTES * 0.55)
        # Killed in the middle: the other one does not notice, and the leases are back.
        (first, _, _), (second, told, answers) = workers
        os.kill(first.pid, signal.SIGKILL)
        until("the killed worker's lease to end", lambda: leases() == 1)
        told.put("pss")
        self.assertGreaterEqual(answers.get(timeout=60)[0] * 1024, LARGE_BYTES)
        # Writing through the back door is caught by the hardware.
        told.put("write")
        second.join(60)
        self.assertEqual(second.exitcode, -signal.SIGSEGV)
        until("all leases to end", lambda: leases() == 0)
        first.join(60)
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

    def test_mappings_outlive_a_killed_server_and_are_counted_by_the_next(self) -> None:
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

        def committed() -> int:
            return next(tier["committed"] for tier in self.client.status()["tiers"] if tier["tier"] == "ram")

        self.assertGreaterEqual(committed(), self.file.stat().st_size)
        self.assertEqual(self.leases(), 0)
        # A new lease is on new memory; the old one is counted until the last view of it goes.
        new = self.client.load("small", device="cpu")
        self.assertNotEqual(new.components[0].numpy("a.weight").ctypes.data, array.ctypes.data)
        both = committed()
        leased.release()
        del leased, array
        until("the old memory to be uncounted", lambda: committed() < both)

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
                self.place.kill()
                with self.assertRaises(hotset.ConnectionLost):
                    await client.status()

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
