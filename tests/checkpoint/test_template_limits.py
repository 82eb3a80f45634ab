"""Chat templates that loop, grow or compute without end are stopped; those in use are not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aphroquant.checkpoint import template_limits
from aphroquant.checkpoint.template_limits import TemplateLimitError, check_template
from aphroquant.checkpoint.tokenizer import load_tokenizer
from aphroquant.engine.prompts import chat_prompt
from aphroquant.errors import RequestError

MESSAGES = [{"role": "user", "content": "How are you?"}]
COMMON = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = {
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "seconds"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "seconds",
    ),
    "generated text": ("{{ lipsum(n=900000) }}", "seconds"),
    "text that doubles": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "too large|characters",
    ),
    "a long text many times": (
        "{% set t = 'x' | center(900000) %}{% for i in range(9999) %}{{ t }}{% endfor %}",
        "more than 16777216 characters|seconds",
    ),
    "numbers that multiply": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = n.x * 100 %}{% endfor %}{{ n.x }}",
        "too large",
    ),
}
REFUSED = {
    "{{ 'x' * 10000000000 }}": "uses [*]",
    "{{ 'x' * 10_000 * 10_000 }}": "uses [*]",
    "{{ x * y }}": "uses [*]",
    "{{ 9 ** 99999999 }}": "uses [*][*]",
    "{{ messages | center(10000000000) }}": "the number 10000000000",
    "{{ messages | center(0xfffffff) }}": "the number 0xfffffff",
    "{{ '%1000000000d' | format(1) }}": "widens text",
    "{{ '{:>1000000000}'.format(1) }}": "widens text",
}


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Any:
    return load_tokenizer(tiny_checkpoint())


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_end_is_stopped(case: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.5)
    tokenizer.chat_template, message = ENDLESS[case]
    began = time.monotonic()
    with pytest.raises(RequestError, match=message):
        chat_prompt(tokenizer, MESSAGES)
    assert time.monotonic() - began < 20  # of a busy machine


@pytest.mark.parametrize("template", REFUSED)
def test_work_without_end_in_one_line_is_refused_before_it_is_done(template: str) -> None:
    with pytest.raises(TemplateLimitError, match=REFUSED[template]):
        check_template(template)


@pytest.mark.parametrize(
    "template",
    [
        COMMON,
        "{{ '-' * 20 }}{{ loop.index0 % 2 }}{{ 2 * messages | length }} in 20240101 and 12345678",
        "{% set date = '2024-12-31' %}{{ '%d %s' | format(3, date) }}{{ '{}'.format(date) }}",
        "{% generation %}a{% endgeneration %}{% if",
    ],
)
def test_what_templates_do_is_allowed(template: str) -> None:
    check_template(template)


def test_limits_leave_the_tokens_and_the_thread_as_they_are(tokenizer: Any) -> None:
    import sys

    tokenizer.chat_template = COMMON
    before = sys.gettrace()
    plain = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat_prompt(tokenizer, MESSAGES) == plain
    assert sys.gettrace() is before


def test_a_template_that_recurses_for_ever_is_the_requests_error(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    with pytest.raises(RequestError, match="do not fit the model's chat template: maximum recursion depth"):
        chat_prompt(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"]
)
def test_the_sandbox_keeps_templates_from_the_machine(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match="do not fit the model's chat template"):
        chat_prompt(tokenizer, MESSAGES)
