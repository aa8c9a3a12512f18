# SPDX-License-Identifier: Apache-2.0
"""The dashboard in a real browser: a chat is held, charts move, a promotion appears."""

import math
import re
import shutil

import pytest
from served import PROPOSERS, TOKENS_A_PASS, FakeService, serving

from ospec_jax.serving.history import SECONDS
from ospec_jax.serving.settings import HttpConfig

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser")
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
WAIT = 10_000


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium."""
    with playwright.sync_playwright() as p:
        # As root, in a container, it has no sandbox of its own.
        yield p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chat_is_held_and_the_charts_move(browser, scheme):
    service = FakeService()
    service.answer = "Grüße 🚀 aus dem Entwurf"
    failures = []
    with serving(service) as address:
        page = browser.new_context(color_scheme=scheme).new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text))
        page.goto(address)
        page.get_by_role("status").get_by_text("connected").wait_for(timeout=WAIT)
        page.get_by_label("Message").fill("Hi")
        page.keyboard.press("Control+Enter")
        page.get_by_text("answered", exact=True).wait_for(timeout=WAIT)

        said = page.locator("#turns span").all_inner_texts()
        assert "".join(said) == service.answer
        assert "🚀" in said
        drafted = "".join(page.locator("#turns .drafted").all_inner_texts())
        assert 0 < len(drafted) < len(service.answer)
        for source in PROPOSERS:
            assert page.locator(f"#turns .drafted.{source}").count() > 0
        note = page.locator("#turns .note").inner_text()
        size = len(service.answer.encode())
        num_own = math.ceil(size / TOKENS_A_PASS)
        assert f"{size - num_own} proposed tokens accepted" in note
        title = page.locator("#turns .ngrams").first.get_attribute("title")
        assert title == "step 2, proposed by n-grams of the chat"

        service.version = 4
        page.locator("#marks").get_by_text("promotion").wait_for(timeout=WAIT)
        assert page.locator("#version").inner_text() == "4"
        page.wait_for_timeout(2000 * SECONDS)
        assert page.locator("#charts canvas").count() == 5
        per_step = size / math.ceil(size / TOKENS_A_PASS)
        assert page.locator("#tokens-per-pass").inner_text() == f"{per_step:.2f}"
        assert not failures
        page.context.close()


def luminance(color):
    """Relative luminance of `rgb(r, g, b)`, as the WCAG has it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_proposers_are_told_apart_without_their_colours(browser, scheme):
    looks = """span => {
        const style = getComputedStyle(span);
        return [style.color, style.backgroundColor, style.textDecorationStyle];
    }"""
    with serving(FakeService()) as address:
        page = browser.new_context(color_scheme=scheme).new_page()
        page.goto(address)
        lines = set()
        for source in PROPOSERS:
            entry = page.locator(f"#sources .{source}")
            text, ground, line = entry.evaluate(looks)
            pair = sorted([luminance(text), luminance(ground)])
            # The contrast that the WCAG ask of text, level AA.
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5
            lines.add(line)
        assert len(lines) == len(PROPOSERS)
        page.context.close()


def test_what_is_refused_can_be_mended(browser):
    with serving(FakeService()) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("status").get_by_text("connected").wait_for(timeout=WAIT)
        page.get_by_label("Message").fill("refuse me")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("the model's chat template refuses it").wait_for(timeout=WAIT)
        assert page.get_by_label("Message").input_value() == "refuse me"
        assert page.locator("#turns .turn").count() == 0
        page.get_by_label("Message").fill("Hi")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("answered", exact=True).wait_for(timeout=WAIT)
        assert page.locator("#turns .turn").count() == 2
        page.close()


def test_a_key_is_asked_for(browser, tmp_path):
    (tmp_path / "keys").write_text("secret-01")
    config = HttpConfig(port=0, api_key_file=tmp_path / "keys")
    with serving(FakeService(), config) as address:
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("API key").fill("secret-01")
        page.get_by_role("button", name="Use").click()
        page.get_by_role("status").get_by_text("connected").wait_for(timeout=WAIT)
        assert page.get_by_label("API key").is_hidden()
        page.close()
