"""The HTTP face, with the client that people use: tritonclient."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
import unittest
from pathlib import Path

import numpy
import tritonclient.http
from support import Place, until
from test_bridge import connected
from tritonclient.utils import InferenceServerException


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Http(unittest.TestCase):
    def setUp(self) -> None:
        self.place = Place()
        self.place.write("loras/ink.safetensors", {"weight": numpy.arange(1000, dtype=numpy.float32)})
        self.place.write("plain.safetensors", {"weight": numpy.arange(5000, dtype=numpy.float32)})
        (self.place.models / "broken.safetensors").write_bytes(b"no weights")
        self.port = free_port()

    def tearDown(self) -> None:
        self.place.close()

    def serve(self, *sets: str) -> None:
        self.place.serve(f"http.listen=127.0.0.1:{self.port}", *sets)
        connected(self.place).close()
        until("HTTP", lambda: self.get("/v2/health/live")[0] == 200)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        except ConnectionError:
            return 0, ""
        finally:
            connection.close()

    def test_tritonclient_drives_the_repository(self) -> None:
        self.serve()
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{self.port}")
        self.assertTrue(client.is_server_live())
        self.assertTrue(client.is_server_ready())
        self.assertEqual(client.get_server_metadata()["name"], "hotset")
        index = {row["name"]: row for row in client.get_model_repository_index()}
        self.assertEqual(sorted(index), ["broken", "loras/ink", "plain"])
        self.assertEqual({row["state"] for row in index.values()}, {"UNAVAILABLE"})
        self.assertNotEqual(index["broken"]["reason"], "")
        self.assertFalse(client.is_model_ready("plain"))
        for name in ("plain", "loras/ink"):
            client.load_model(name)
            self.assertTrue(client.is_model_ready(name))
        self.assertEqual(client.get_model_metadata("plain")["versions"], ["1"])
        index = {row["name"]: row["state"] for row in client.get_model_repository_index()}
        self.assertEqual(index, {"broken": "UNAVAILABLE", "loras/ink": "READY", "plain": "READY"})
        # It is held by the server itself, for every worker to find.
        bridge = connected(self.place)
        leases = {session["label"]: session["leases"] for session in bridge.status()["sessions"]}
        self.assertEqual(leases["http"], 2)
        client.unload_model("plain")
        self.assertFalse(client.is_model_ready("plain"))
        for name in ("none", "broken"):
            with self.assertRaises(InferenceServerException):
                client.load_model(name)
        with self.assertRaises(InferenceServerException):
            client.unload_model("plain")
        bridge.close()

        status, text = self.get("/metrics")
        self.assertEqual(status, 200)
        for line in (
            'hotset_leases{tier="ram"} 1',
            'hotset_components{tier="ram",state="resident"} 2',
            "hotset_loads_granted_total 2",
            'hotset_queue_seconds_count{tier="ram"} 2',
            "hotset_health 2",
            'hotset_load_seconds_count{phase="read"} 2',
            'hotset_load_seconds_bucket{le="+Inf",phase="whole"} 2',
            'hotset_mailbox_depth{actor="ram-cache"} 0',
            'hotset_arena_bytes{state="lingering"} 0',
            "# EOF",
        ):
            self.assertIn(line, text.splitlines())
        # What the dashboard shows is there; of GPUs, control groups and evictions, where there are some.
        dashboard = Path(__file__).parents[2].joinpath("docs/grafana.json").read_text()
        shown = set(re.findall(r"hotset_[a-z_0-9]+", dashboard))
        self.assertGreater(len(shown), 25)
        absent = ("hotset_cgroup_", "hotset_gpu", "hotset_evictions_")
        told = set(re.findall(r"^# TYPE (hotset_[a-z_0-9]+)", text, re.MULTILINE))
        told |= {f"{name}_{suffix}" for name in told for suffix in ("total", "bucket")}
        self.assertLessEqual({name for name in shown - told if not name.startswith(absent)}, set())
        status, text = self.get("/healthz")
        self.assertEqual((status, json.loads(text)["health"]["state"]), (200, "green"))
        status, text = self.get("/openapi.json")
        self.assertIn("/v2/repository/index", json.loads(text)["paths"])

    def test_events_are_streamed(self) -> None:
        self.serve()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/events")
        response = connection.getresponse()
        self.assertEqual(response.getheader("content-type"), "text/event-stream")
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{self.port}")
        client.load_model("plain")
        kinds = []
        while "decision" not in kinds:
            line = response.readline().decode().strip()
            if line.startswith("event:"):
                kinds.append(line.removeprefix("event:").strip())
        decision = json.loads(response.readline().decode().removeprefix("data:"))
        self.assertEqual(decision["decision"]["act"], "admit")
        connection.close()

    def test_without_a_token_this_machine_alone_is_answered(self) -> None:
        self.serve()
        self.assertEqual(self.get("/v2", {"Host": "evil.example"})[0], 403)
        self.assertEqual(self.get("/v2", {"Host": f"localhost:{self.port}"})[0], 200)

    def test_a_token_guards_all_but_probes(self) -> None:
        self.serve("http.token=secret")
        self.assertEqual(self.get("/v2")[0], 401)
        self.assertEqual(self.get("/v2", {"Authorization": "Bearer wrong"})[0], 401)
        self.assertEqual(self.get("/v2", {"Authorization": "Bearer secret"})[0], 200)
        self.assertEqual(self.get("/healthz")[0], 200)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
