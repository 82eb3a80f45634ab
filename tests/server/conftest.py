"""Real server processes on loopback: in front of the fake engine, and of a real one on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest


@dataclass
class Server:
    """A server process, its address, and the temporary directory it may use."""

    process: subprocess.Popen[str]
    url: str
    ready_line: str
    temporary: Path
    log: Path
    client: httpx.Client

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(self.url + path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(self.url + path, json=body, **options)

    def metric(self, name: str) -> float:
        """The value of a sample, as /metrics shows it."""
        for line in self.get("/metrics").text.splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"/metrics has no {name}")

    def wait_for_metric(self, name: str, value: float, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while (now := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now} and not {value} after {seconds} s"
            time.sleep(0.02)

    def children(self) -> list[int]:
        """Ids of the processes that the server has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]


StartServer = Callable[..., Server]


def _launch(exits: ExitStack, command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], Path]:
    temporary = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="server-")))
    log = temporary / "log"
    (temporary / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary / "tmp"), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("APHROQUANT_API_KEY", None)
    stderr = exits.enter_context(log.open("w"))
    process = exits.enter_context(
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    )
    exits.callback(process.kill)
    return process, temporary


def _started(exits: ExitStack, process: subprocess.Popen[str], temporary: Path) -> Server:
    assert process.stdout is not None
    line = process.stdout.readline()
    log = temporary / "log"
    assert line.startswith("ready: http://"), f"the server did not start: {log.read_text()}"
    client = exits.enter_context(httpx.Client(timeout=30, verify=False))  # loopback has no TLS to verify
    return Server(process, line.split()[1], line, temporary / "tmp", log, client)


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """`launch(settings, **options)`: the process of a server with the fake engine, and its directory; maybe not up."""
    with ExitStack() as exits:

        def start(settings: dict[str, Any] | None = None, **options: Any) -> tuple[subprocess.Popen[str], Path]:
            script = Path(__file__).with_name("fake_server.py")
            command = [sys.executable, str(script), json.dumps(settings or {})]
            return _launch(exits, command, {"FAKE_ENGINE": json.dumps(options)})

        yield start


@pytest.fixture(scope="module")
def start_server(launch: Callable[..., tuple[subprocess.Popen[str], Path]]) -> Iterator[StartServer]:
    """`start_server(settings, **options)`: a server with the fake engine, ready."""
    with ExitStack() as exits:

        def start(settings: dict[str, Any] | None = None, **options: Any) -> Server:
            return _started(exits, *launch(settings, **options))

        yield start


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    """A server with the fake engine, shared by a module's tests."""
    return start_server()


@pytest.fixture(scope="session")
def start_real_server() -> Iterator[StartServer]:
    """`start_real_server(model, *arguments)`: `aphroquant serve` with the real engine, ready."""
    with ExitStack() as exits:

        def start(model: Path, *arguments: str) -> Server:
            command = [sys.executable, "-m", "aphroquant", "serve", str(model), "--port", "0", *arguments]
            return _started(exits, *_launch(exits, command, {}))

        yield start
