"""A chat template that takes far too much time or memory is refused before it runs in this process."""

import time

import pytest

from common.embedded.policy import build_tokenizer
from common.models import template_limit
from common.models.chat import render_chat
from common.models.template_limit import check_template

MESSAGES = [{"role": "user", "content": "hi"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
REFUSING = "{% if messages|length == 1 and messages[0]['content'] == 'hi' %}{{ raise_exception('no') }}{% endif %}"


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "1 s of processor time"),
        pytest.param(REFUSING + LOOP, "1 s of processor time", marks=pytest.mark.slow),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% set x = 10**9 %}{{ 'a' * (x * 9) }}", "1 GB of memory"),
        ("{{ 'a' * 10**30 }}", "cannot fit"),
        ("{{ 'a' * (3 * 10**7) }}", "writes more than 20000000 characters"),
        pytest.param("{{ 10**(10**10) }}", "1 s of processor time", marks=pytest.mark.slow),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
    ],
)
def test_a_template_that_costs_too_much_is_refused(tokenizer, template, said, monkeypatch):
    monkeypatch.setattr(template_limit, "SECONDS", 1)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(ValueError, match="the chat template does not write") as caught:
        render_chat(tokenizer, MESSAGES)
    assert said in str(caught.value) and str(caught.value).count("\n") == 0
    assert time.monotonic() - began < 40  # 1 s on a machine without other work
    again = time.monotonic()
    with pytest.raises(ValueError, match="the chat template does not write"):
        render_chat(tokenizer, MESSAGES)
    assert time.monotonic() - again < 1


def test_an_ordinary_template_runs_and_is_tried_once():
    calls = []
    template = f"of this test {time.monotonic()}"
    began = time.monotonic()
    check_template(template, [lambda: calls.append(1) or "text"])  # its list is the child's
    assert time.monotonic() - began < 2 and calls == []
    check_template(template, [lambda: pytest.fail("a second time")])


def test_messages_that_a_template_refuses_are_no_matter_of_its_cost():
    def refuse() -> str:
        raise ValueError("no such role")

    check_template(f"refusing {time.monotonic()}", [refuse])
