"""The page in headless Chromium: it generates, colours every token, and needs nothing from elsewhere."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from http_server import Running

from flexquant_rl.agents.server.page import page, page_headers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_the_page_is_one_file_without_outside_resources() -> None:
    text = page()
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://|@import|url\(""", text)
    assert len(text) < 40_000
    policy = page_headers()["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"\son[a-z]+=|\sstyle=|innerHTML", text), "the policy forbids it, or text could become code"


def test_the_page_is_served(server: Running) -> None:
    with server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text == page()
    assert answer.headers["content-security-policy"] == page_headers()["Content-Security-Policy"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package `playwright`")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """The page, ready to generate, and what it complains of."""
    tab, complaints = browser.new_page(**options), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector("#go:enabled")
    return tab, complaints


def generated(tab: Any) -> None:
    """Generates by keyboard alone, and waits for the end."""
    tab.fill("#tokens", "16")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("body[data-state=idle]")
    assert tab.locator("#problem").is_hidden(), tab.inner_text("#problem")


def test_drafts_are_marked_and_the_dial_says_why_it_is_grey(browser: Any, server: Running) -> None:
    tab, complaints = opened(browser, server.url)
    assert tab.locator("#dial").is_disabled()
    assert "has no dial" in tab.inner_text("#why")
    generated(tab)
    tokens = tab.locator("#owntext .token")
    assert tokens.count() > 5
    assert tab.locator("#owntext .token.draft").count() > 0
    assert "accepted drafts" in tab.inner_text("#ownnumbers")
    assert "tokens/s" in tab.inner_text("#ownnumbers")
    assert complaints == []


def test_the_dial_sets_the_widths_and_full_precision_stands_beside(
    browser: Any, dial_server: Running, tmp_path: Any
) -> None:
    tab, complaints = opened(browser, dial_server.url)
    assert tab.locator("#dial").is_enabled()
    assert tab.inner_text("#dialsays") == "2.00x"
    tab.focus("#dial")
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#dialsays") == "1.50x"
    tab.focus("#beside")
    tab.keyboard.press("Space")
    generated(tab)
    own, full = (
        {token.get_attribute("title") for token in tab.locator(f"#{name}text .token").all()} for name in ("own", "full")
    )
    assert len(own) > 1
    assert full == {"8.00 bits"}
    first, second = (tab.locator(f"#{name}text").bounding_box() for name in ("own", "full"))
    assert first["x"] < second["x"]
    assert tab.screenshot(path=tmp_path / "page.png")[:4] == b"\x89PNG"
    assert complaints == []


def asked(tab: Any, text: str, tokens: int = 8) -> None:
    """Sends a message and waits for the end of the answer."""
    tab.evaluate("delete document.body.dataset.state")
    tab.fill("#prompt", text)
    tab.fill("#tokens", str(tokens))
    tab.click("#go")
    tab.wait_for_selector("body[data-state=idle]")


def test_a_chat_goes_on_and_begins_anew(browser: Any, dial_server: Running) -> None:
    tab, complaints = opened(browser, dial_server.url)
    sent: list[Any] = []
    tab.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    tab.check("#beside")
    asked(tab, "first")
    assert (tab.inner_text("#question"), tab.input_value("#prompt")) == ("first", "")
    assert re.search(r"tokens/s \(\d+\.\d\dx\)", tab.inner_text("#ownnumbers")), "how fast beside the largest width"
    first = tab.inner_text("#owntext")
    asked(tab, "second")
    assert tab.locator("#history .you").all_inner_texts() == ["first"]
    assert tab.locator("#history .text").all_inner_texts() == [first]
    assert [message["role"] for message in sent[-1]["messages"]] == ["user", "assistant", "user"]
    assert sent[-1]["full_width"]
    assert sent[-2]["messages"] == sent[-1]["messages"]
    tab.click("#clear")
    assert tab.locator("#history .you, #owntext .token, #question:visible").count() == 0
    asked(tab, "third")
    assert sent[-1]["messages"] == [{"role": "user", "content": "third"}]
    assert complaints == []


def test_a_chat_that_is_left_while_it_runs_is_gone(browser: Any, dial_server: Running) -> None:
    tab, complaints = opened(browser, dial_server.url)
    sent: list[Any] = []
    tab.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    asked(tab, "first")
    tab.evaluate("delete document.body.dataset.state")
    tab.fill("#prompt", "second")
    tab.fill("#tokens", "400")
    tab.click("#go")
    tab.locator("#owntext .token").nth(2).wait_for(state="attached")
    tab.click("#clear")
    tab.wait_for_selector("body[data-state=idle]")
    assert tab.locator("#owntext .token").count() == 0
    asked(tab, "third")
    assert sent[-1]["messages"] == [{"role": "user", "content": "third"}]
    assert tab.locator("#history .you").count() == 0
    assert complaints == []


def test_what_fails_leaves_the_chat_and_the_message(browser: Any, dial_server: Running) -> None:
    tab, _ = opened(browser, dial_server.url)
    asked(tab, "first")
    asked(tab, "far too long " * 600)
    assert "do not fit" in tab.inner_text("#problem")
    assert tab.input_value("#prompt").startswith("far too long")
    asked(tab, "second")
    assert tab.locator("#problem").is_hidden()
    assert tab.locator("#history .you").all_inner_texts() == ["first"]


def test_each_width_has_a_colour_of_its_own(browser: Any, dial_server: Running) -> None:
    for scheme in ("light", "dark"):
        tab, _ = opened(browser, dial_server.url, color_scheme=scheme)
        grounds = tab.eval_on_selector_all("#legend i", "all => all.map(one => getComputedStyle(one).backgroundColor)")
        colours = [tuple(map(int, re.findall(r"\d+", ground)[:3])) for ground in grounds]
        assert len(colours) == 5
        for one, other in itertools.pairwise(colours):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 40, (scheme, one, other)
        tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_reads_it_without_scrolling_sideways(browser: Any, dial_server: Running, scheme: str) -> None:
    size = {"width": 360, "height": 740}
    tab, complaints = opened(browser, dial_server.url, viewport=size, color_scheme=scheme)
    tab.check("#beside")
    generated(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    first, second = (tab.locator(f"#{name}text").bounding_box() for name in ("own", "full"))
    assert first["y"] < second["y"]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    assert complaints == []


def test_a_key_is_asked_for(browser: Any, embedded_drafts: Any) -> None:
    from http_server import running

    with running(embedded_drafts, api_key="s3cret") as server:
        tab = browser.new_page()
        tab.goto(server.url)
        tab.wait_for_selector("#keyline:visible")
        tab.fill("#key", "wrong")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#problem:visible")
        tab.fill("#key", "s3cret")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#go:enabled")
        generated(tab)
        tab.close()
