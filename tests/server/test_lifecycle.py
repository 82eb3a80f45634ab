"""Starting, failing and stopping: exit codes, one sentence each, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Launch = Callable[..., tuple[subprocess.Popen[str], Path]]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_engine_that_cannot_start_ends_the_server_with_its_reason(launch: Launch) -> None:
    process, directory = launch(start="missing")
    assert process.wait(30) == 3
    assert (directory / "log").read_text() == "error: nowhere: no such checkpoint\nlook elsewhere\n"
    assert not list((directory / "tmp").iterdir())


def test_a_taken_port_is_found_before_the_model_is_loaded(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process, directory = launch({"port": port}, start="hang")
        assert process.wait(30) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in (directory / "log").read_text()


def test_a_host_that_does_not_resolve_is_a_usage_error(launch: Launch) -> None:
    process, directory = launch({"host": "no.such.host.invalid"}, start="hang")
    assert process.wait(30) == 2
    assert "cannot listen on no.such.host.invalid" in (directory / "log").read_text()


def test_a_signal_while_loading_leaves_nothing_behind(launch: Launch) -> None:
    process, directory = launch(start="hang")
    wait_until(lambda: len(list((directory / "tmp").glob("aphroquant-*/*"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not list((directory / "tmp").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_with_success(start_server: Any, number: signal.Signals) -> None:
    server = start_server()
    (engine,) = server.children()
    server.process.send_signal(number)
    assert server.process.wait(10) == 0
    assert server.log.read_text() == ""
    assert not is_running(engine)
    assert not list(server.temporary.iterdir())


def test_open_answers_complete_before_the_server_ends(start_server: Any) -> None:
    server = start_server()
    answers: list[httpx.Response] = []
    body = {"prompt": "SLOW", "max_tokens": 40}
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    asking.start()
    server.wait_for_metric("aphroquant_requests_running", 1)
    server.process.terminate()
    asking.join(20)
    assert server.process.wait(10) == 0
    assert answers[0].json()["usage"]["completion_tokens"] == 40


def test_a_second_signal_ends_open_answers_at_once(start_server: Any) -> None:
    server = start_server()
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", {"prompt": "STALL"})))
    asking.start()
    server.wait_for_metric("aphroquant_requests_running", 1)
    server.process.terminate()
    time.sleep(0.3)
    server.process.terminate()
    asking.join(5)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "shutting_down"
    assert server.process.wait(10) == 0


@pytest.mark.parametrize(("prompt", "code"), [("CRASH", 1), ("KILL", 5)])
def test_a_crashed_engine_fails_all_requests_and_ends_the_server(start_server: Any, prompt: str, code: int) -> None:
    server = start_server()
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", {"prompt": "STALL"})))
    waiting.start()
    server.wait_for_metric("aphroquant_requests_running", 1)
    crashed = server.post("/v1/completions", {"prompt": prompt})
    assert crashed.status_code == 500
    assert crashed.json()["error"]["message"] == "the engine has stopped"
    assert server.get("/health").status_code == 503
    assert server.post("/v1/completions", {"prompt": "more"}).status_code == 503
    waiting.join(5)
    assert answers[0].status_code == 500
    assert server.process.wait(10) == code
    assert not list(server.temporary.iterdir())


def test_the_engine_ends_when_the_http_process_is_killed(start_server: Any) -> None:
    server = start_server()
    (engine,) = server.children()
    server.process.kill()
    wait_until(lambda: not is_running(engine))
    assert not list(server.temporary.iterdir())


def test_the_sockets_lie_where_no_other_user_can_go(start_server: Any) -> None:
    server = start_server()
    (directory,) = server.temporary.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert directory.stat().st_uid == os.getuid()
    assert {path.name for path in directory.iterdir()} == {"requests", "events"}
    inodes = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
    assert {str(directory / "requests"), str(directory / "events")} <= inodes


def test_an_ipv6_host_is_announced_in_brackets(start_server: Any) -> None:
    server = start_server({"host": "::1"})
    assert server.url.startswith("http://[::1]:")
    assert server.get("/health").json() == {"status": "ok"}


def test_the_ready_line_says_what_is_served(start_server: Any) -> None:
    line = start_server().ready_line
    assert line.endswith(" serves fake (KV cache 4096 tokens, backend fake: asked for)\n")


def test_an_open_server_without_keys_is_warned_about(start_server: Any) -> None:
    warning = "other machines can reach this server, and it has no API key"
    assert warning in start_server({"host": "0.0.0.0"}).log.read_text()
    assert warning not in start_server({"host": "0.0.0.0", "api_keys": ["key"]}).log.read_text()


def test_each_request_leaves_a_line_in_the_log_and_nothing_of_its_text(start_server: Any) -> None:
    server = start_server({"log_level": "info"})
    server.post("/v1/completions", {"prompt": "private", "max_tokens": 3})
    log = server.log.read_text()
    assert ": ok, 7 + 3 tokens, 0." in log
    assert "private" not in log
