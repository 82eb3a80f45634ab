"""Ask a server that is starting up one question over its HTTP API; print the answer and the speed.

Usage: ask.py SERVER_LOG SERVER_PID QUESTION
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from openai import OpenAI

STARTUP_SECONDS = 120


def wait_for_url(log: Path, pid: int) -> str:
    """The address in the server's ready line."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"http://[\w.\[\]:]+", log.read_text()):
            return found.group()
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    sys.exit(f"the server did not start:\n{log.read_text()}")


def ask(url: str, question: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    start = time.perf_counter()
    first = None
    tokens = 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=128,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            print(chunk.choices[0].delta.content, end="", flush=True)
    end = time.perf_counter()
    first = first or end
    speed = (tokens - 1) / (end - first) if tokens > 1 and end > first else 0.0
    print(f"\n\n{tokens} tokens, first after {first - start:.2f} s, then {speed:.0f} tokens/s")


if __name__ == "__main__":
    ask(wait_for_url(Path(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
