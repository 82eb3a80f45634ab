"""A real browser for the report: Debian's chromium driven over WebDriver, and evaluations without any model."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.noise import NoiseFloor
from aphroquant.evaluation.positions import compare_logits
from aphroquant.evaluation.result import Evaluation, Protocol
from aphroquant.evaluation.size import StoredSize
from aphroquant.evaluation.summary import summarize
from aphroquant.evaluation.texts import TextSource
from aphroquant.evaluation.worst import TokenProbability, WorstToken
from aphroquant.reporting import Candidate, Step
from aphroquant.reporting.report import ModuleError

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_DRIVERS = ("chromedriver", "/usr/lib/chromium-browser/chromedriver")
_SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
_NEWS = {"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}


class Browser:
    """One window. Sizes are in CSS pixels."""

    def __init__(self, address: str, binary: str) -> None:
        options = {"binary": binary, "args": list(_SWITCHES)}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options, **_NEWS}}
        self._client = httpx.Client(base_url=address, timeout=60, trust_env=False)
        self._session = self._started(wanted)

    def open(self, page: Path, width: int, *, dark: bool = False) -> None:
        """Load a file in a window of that width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("url", url=page.as_uri())

    def evaluate(self, expression: str) -> Any:
        """What an expression is in the page."""
        return self.call("execute/sync", script=f"return {expression}", args=[])

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("print", background=False))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: "browser" is the console, "performance" the network too."""
        entries: list[dict[str, Any]] = self.call("se/log", type=kind)
        return entries

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the devtools protocol."""
        return self.call("goog/cdp/execute", cmd=name, params=parameters)

    def call(self, path: str, **body: Any) -> Any:
        return self._post(f"/session/{self._session}/{path}", **body)

    def close(self) -> None:
        self._client.delete(f"/session/{self._session}")
        self._client.close()

    def _started(self, wanted: dict[str, Any]) -> str:
        """The id of a new session; on a busy machine a browser may need a second attempt."""
        for _ in range(2):
            answer = self._client.post("/session", json={"capabilities": wanted}).json()["value"]
            if "sessionId" in answer:
                return str(answer["sessionId"])
        return str(self._post("/session", capabilities=wanted)["sessionId"])

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips where there is no chromium with its driver (Debian: apt-get install chromium chromium-driver)."""
    binary = next((found for name in _NAMES if (found := shutil.which(name))), None)
    driver = next((found for name in _DRIVERS if (found := shutil.which(name))), None)
    if binary is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            [driver, "--port=0"], stdout=subprocess.PIPE, text=True, env={**os.environ, "HOME": home}
        ) as process,
    ):
        assert process.stdout is not None
        port = next(
            match[1] for line in process.stdout if (match := re.search(r"started successfully on port (\d+)", line))
        )
        try:
            found = Browser(f"http://127.0.0.1:{port}", binary)
            yield found
            found.close()
        finally:
            process.terminate()


_SIZE = 240  # positions in four windows


@pytest.fixture
def make_candidate() -> Callable[..., Candidate]:
    """`make_candidate(name, noise)`: a candidate of random logits; more noise is worse."""

    def make(
        name: str, noise: float = 0.3, *, megabytes: float = 200.0, tokens: str = " token", **changes: Any
    ) -> Candidate:
        base = 3 * torch.randn(_SIZE, 50)
        model = base + noise * torch.randn_like(base)
        positions = compare_logits(base, model, torch.randint(0, 50, (_SIZE,)))
        summary = vars(summarize(positions, 4))
        source = TextSource("text.txt", "0" * 64, 1000)
        protocol = Protocol((source,), 1000, 4, 4, 61, _SIZE, None, 50)
        guess = (TokenProbability(tokens, 0.5), TokenProbability("\n", 0.25))
        worst = WorstToken(
            window=0, position=1, kld=2.0, before="before\n", token=tokens, after=" after", base_probability=0.5,
            model_probability=0.01, base_top=guess, model_top=guess[::-1],
        )  # fmt: skip
        evaluation = Evaluation(
            **summary,
            model=name,
            against="org/base",
            size=StoredSize(int(megabytes * 1e6), 4.5, 4.25),
            base_size=StoredSize(int(600e6), 16.0, 16.0),
            protocol=protocol,
            seconds=3.0,
            versions={"aphroquant": "1", "torch": "2"},
            noise_floor=NoiseFloor(**summary | {"mean_kld": 1e-4}, setting="rounded", windows=2, scored_tokens=2),
            worst=(worst,) * 3,
        )
        errors = tuple(ModuleError(i, f"{m}_proj", 1e-4 * (i + 1)) for i in range(6) for m in ("q", "k", "down"))
        steps = (Step("convert", 12.0, 10**9), Step("evaluate", 3.0))
        checks = (GateCheck("max_kld", evaluation.mean_kld, 1.0, evaluation.mean_kld <= 1.0),)
        made = Candidate(
            name=name, evaluation=evaluation, checks=checks, errors=errors, steps=steps, made_by="gptq, int4"
        )
        own = {key: value for key, value in changes.items() if hasattr(made, key)}
        other = {key: value for key, value in changes.items() if key not in own}
        return replace(made, evaluation=replace(evaluation, **other), **own)

    return make
