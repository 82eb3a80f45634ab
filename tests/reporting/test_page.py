"""The page in a real browser, and what is in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aphroquant.errors import UsageError
from aphroquant.evaluation.gate import GateCheck
from aphroquant.evaluation.result import EvaluationRun
from aphroquant.reporting import Report, candidate, render, report_of_run, write_report
from aphroquant.reporting.report import Candidate, ModuleError

HOSTILE = '</title></style><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">'
Make = Callable[..., Candidate]


@pytest.fixture
def report(make_candidate: Make) -> Report:
    names = ("awq-4bit", "gptq-3bit", "a-name-so-long-that-no-table-or-plot-has-room-for-all-of-it-" * 2, HOSTILE)
    return Report(
        title="Candidates for org/base",
        candidates=tuple(
            make_candidate(name, 0.1 + 0.2 * i, megabytes=200 + 40 * i, tokens=HOSTILE) for i, name in enumerate(names)
        ),
    )


@pytest.fixture
def page(report: Report, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_report(path, report)
    return path


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_nothing_is_fetched_and_nothing_is_complained_of(
    width: int, dark: bool, browser: Any, page: Path
) -> None:
    browser.log("performance")
    browser.open(page, width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    wide = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .guesses code')"
        f" && e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    fetched = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in fetched if not url.startswith("data:")} <= {page.as_uri()}
    picture = browser.screenshot()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000


def test_names_and_tokens_are_text_whatever_is_in_them(browser: Any, page: Path) -> None:
    browser.open(page, 1400)
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object, link').length") == 0
    assert browser.evaluate("window.pwned === undefined")
    assert browser.evaluate("document.querySelector('mark').textContent") == HOSTILE.replace(" ", "␣")
    assert HOSTILE not in page.read_text(encoding="utf-8")


def test_dark_mode_is_dark_and_paper_is_white(browser: Any, page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, 1400, dark=True)
    assert max(map(int, re.findall(r"\d+", browser.evaluate(background)))) < 50
    browser.command("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.evaluate(background) == "rgb(255, 255, 255)"
    assert browser.pdf().startswith(b"%PDF-")
    browser.open(page, 1400)
    assert min(map(int, re.findall(r"\d+", browser.evaluate(background)))) > 230


def test_texts_of_plots_can_be_read_on_a_telephone(browser: Any, page: Path) -> None:
    browser.open(page, 360)
    heights = browser.evaluate(
        "[...document.querySelectorAll('svg.plot')]"
        ".map(s => 11.5 * s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert len(heights) >= 8
    assert min(heights) >= 8.5


def test_every_plot_has_a_title_and_a_description(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    plots = re.findall(r"<svg [^>]*class=\"plot\".*?</svg>", text, re.S)
    assert len(plots) >= 8
    for plot in plots:
        assert 'role="img"' in plot
        assert re.search(r"<title>[^<]+</title><desc>[^<]+</desc>", plot)


class Balance(HTMLParser):
    """Fails at the first tag that closes what was not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_tags_are_balanced(page: Path) -> None:
    parser = Balance()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_kld": math.inf, "max_kld": math.inf, "mean_kld_interval": None, "non_finite_share": 1.0},
        {"mean_kld": 0.0, "p99_kld": 0.0},
        {"histogram": None, "entropy_buckets": (), "worst": (), "noise_floor": None, "mean_kld_interval": None},
        {"errors": (), "steps": (), "checks": ()},
        {"errors": tuple(ModuleError(i, f"experts.{m}", 0.0) for i in range(126) for m in ("up_proj", "w1", "w2"))},
        {"log_ratio": math.inf, "log_ratio_interval": None, "perplexity": math.inf},
    ],
)
def test_extremes_make_a_page(changes: dict[str, Any], make_candidate: Make) -> None:
    text = render(Report(title="one", candidates=(make_candidate("one", **changes),)))
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_many_candidates_all_have_their_place(make_candidate: Make) -> None:
    candidates = tuple(make_candidate(f"candidate {i}", 0.05 * (i + 1), megabytes=100 + 20 * i) for i in range(14))
    text = render(Report(title="many", candidates=candidates))
    for one in candidates:
        assert text.count(one.name) > 5


def test_colours_of_texts_and_series_stand_out_in_both_modes() -> None:
    """WCAG 2: 4.5 for text, 3 for what is drawn."""
    style = (Path(__file__).parents[2] / "aphroquant" / "reporting" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 2)[:2])
    for colours in (light, dark):
        for ground in ("page", "card"):
            for ink in ("ink", "soft", "accent", "pass", "fail"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground, colours[ink])
            for series in range(8):
                assert contrast(colours[f"s{series}"], colours[ground]) >= 3, (series, ground)
        for ink, ground in (("pass", "pass-soft"), ("fail", "fail-soft"), ("mark-ink", "mark"), ("ink", "note")):
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_run_brings_the_records_beside_its_models(make_candidate: Make, tmp_path: Path) -> None:
    model = tmp_path / "model-awq"
    model.mkdir()
    modules = {
        "model.layers.0.self_attn.q_proj": {"relative_error": 0.01},
        "model.layers.3.mlp.experts.5.up_proj": {"relative_error": 0.5},
        "model.layers.3.mlp.experts.6.up_proj": {"relative_error": 0.25},
        "lm_head": {"relative_error": 0.1},
        "model.layers.1.mlp.up_proj": {"relative_error": None},
    }
    result = {"to": "awq", "scheme": "int4", "solver": "gptq", "modules": modules}
    timings = {"seconds": 5.0, "peak_memory_bytes": 10**6, "stages": {"plan": 1.0}}
    (model / "aphroquant.json").write_text(json.dumps({"result": result, "timings": timings}))
    evaluation = make_candidate(str(model)).evaluation
    made = report_of_run(EvaluationRun((evaluation,)), [[GateCheck("max_kld", 0.1, 1.0, True)]])
    (found,) = made.candidates
    assert found.name == "model-awq"
    assert found.made_by == "awq, int4, gptq"
    assert [(one.layer, one.module, one.error) for one in found.errors] == [
        (0, "q_proj", 0.01), (3, "experts.up_proj", 0.5),
    ]  # fmt: skip
    assert [step.name for step in found.steps] == ["convert: plan", "convert, in all"]


@pytest.mark.parametrize("record", [{}, {"result": 3, "modules": []}, {"timings": {"stages": [1]}}, {"environment": 5}])
def test_a_record_that_is_not_ours_adds_nothing(record: dict[str, Any], make_candidate: Make) -> None:
    found = candidate("one", make_candidate("one").evaluation, conversion=record)
    assert (found.errors, found.steps, found.made_by) == ((), (), "")


def test_a_page_that_cannot_be_written_leaves_nothing(report: Report, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(tmp_path / "folder", report)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
