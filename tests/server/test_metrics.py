"""/metrics: what it counts, read back with Prometheus' own parser."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families


def samples(server: Any) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        sample.name + "".join(f"[{sample.labels[key]}]" for key in sorted(sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def change(server: Any) -> Any:
    """What an action adds to every metric."""

    def measure(action: Any) -> dict[str, float]:
        before = samples(server)
        action()
        after = samples(server)
        return {name: after[name] - before.get(name, 0) for name in after}

    return measure


def test_everything_is_shown_before_the_first_request(start_server: Any) -> None:
    shown = samples(start_server())
    for outcome in ("ok", "cancelled", "refused", "error"):
        assert shown[f"aphroquant_requests_total[{outcome}]"] == 0
    assert shown["aphroquant_kv_cache_blocks_total"] == 256
    assert shown["aphroquant_requests_running"] == shown["aphroquant_requests_waiting"] == 0


def test_an_answer_is_counted_and_timed(server: Any, change: Any) -> None:
    body = {"prompt": "0123456789", "max_tokens": 5, "n": 2}
    added = change(lambda: server.post("/v1/completions", body))
    assert added["aphroquant_requests_total[ok]"] == 1
    assert added["aphroquant_prompt_tokens_total"] == 10
    assert added["aphroquant_cached_prompt_tokens_total"] == 3
    assert added["aphroquant_generation_tokens_total"] == 10
    assert added["aphroquant_time_to_first_token_seconds_count"] == 2
    assert added["aphroquant_time_per_output_token_seconds_count"] == 8
    assert added["aphroquant_request_seconds_count"] == 1
    assert 0 < added["aphroquant_time_to_first_token_seconds_sum"] < 5


def test_times_are_the_times_that_passed(server: Any, change: Any) -> None:
    body = {"prompt": "SLOW", "max_tokens": 11, "stream": True}  # the fake engine takes 20 ms a step
    added = change(lambda: server.post("/v1/completions", body))
    assert added["aphroquant_time_per_output_token_seconds_sum"] == pytest.approx(0.2, rel=0.5)
    assert added["aphroquant_request_seconds_sum"] == pytest.approx(0.22, rel=0.5)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [({"prompt": []}, "refused"), ({"prompt": "REJECT"}, "refused"), ({"prompt": "BROKEN"}, "error"),
     ({"prompt": "ERROR"}, "error"), ({"prompt": "ERROR", "stream": True}, "error")],
)  # fmt: skip
def test_failures_are_counted_once_and_by_kind(server: Any, change: Any, body: Any, outcome: str) -> None:
    added = change(lambda: server.post("/v1/completions", body))
    outcomes = {name: value for name, value in added.items() if name.startswith("aphroquant_requests_total") and value}
    assert outcomes == {f"aphroquant_requests_total[{outcome}]": 1}


def test_the_engines_own_figures_are_shown(server: Any) -> None:
    server.post("/v1/completions", {"prompt": "ab"})
    shown = samples(server)
    assert shown["aphroquant_prefix_cache_queries_total"] == 40
    assert shown["aphroquant_prefix_cache_hits_total"] == 30
    assert shown["aphroquant_engine_generation_tokens_total"] >= 16
