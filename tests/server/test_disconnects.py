"""A client that leaves stops its request in the engine, whatever the request was doing."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

RUNNING = "aphroquant_requests_running"
CANCELLED = 'aphroquant_requests_total{outcome="cancelled"}'


def open_request(server: Any, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["SLOW", "STALL"])
def test_a_client_that_leaves_stops_its_request(server: Any, path: str, stream: bool, prompt: str) -> None:
    before = server.metric(CANCELLED)
    text = {"prompt": prompt} if path == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
    connection = open_request(server, path, {**text, "stream": stream, "max_tokens": 400, "n": 2})
    server.wait_for_metric(RUNNING, 2)
    connection.close()
    server.wait_for_metric(RUNNING, 0)
    assert server.metric(CANCELLED) == before + 1


def test_a_client_that_stops_reading_a_stream_stops_its_request(server: Any) -> None:
    body = {"prompt": "SLOW", "stream": True, "max_tokens": 400}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        server.wait_for_metric(RUNNING, 1)
    server.wait_for_metric(RUNNING, 0)


def test_many_clients_that_leave_at_once_stop_all_their_requests(server: Any) -> None:
    connections = [open_request(server, "/v1/completions", {"prompt": f"STALL {number}"}) for number in range(40)]
    server.wait_for_metric(RUNNING, 40)
    for connection in connections:
        connection.close()
    server.wait_for_metric(RUNNING, 0)


def test_other_requests_go_on_when_a_client_leaves(server: Any) -> None:
    leaving = open_request(server, "/v1/completions", {"prompt": "STALL"})
    body = {"prompt": "SLOW", "stream": True, "max_tokens": 30}
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        leaving.close()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert sum(line.startswith("data: {") for line in rest) == 29


def test_a_client_that_leaves_in_the_middle_of_its_body_does_no_harm(server: Any) -> None:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    connection.sendall(head.encode())
    connection.close()
    assert server.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()
