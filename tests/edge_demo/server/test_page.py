"""The page in a real browser, with a real model."""

from __future__ import annotations

import json
import re
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.sample,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: make browser"),
]

QUESTION = "What is the capital of France?"
PHONE = {"width": 375, "height": 667}
# Chromium asks the network for its own sake too.
SILENT = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SILENT += ["--no-first-run", "--disable-quic", "--no-proxy-server"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", *SILENT]
        )
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(accept_downloads=True)
    yield context
    context.close()


@pytest.fixture
def page(context, real_server):
    """The page, greedy; nothing may fail in it, and it may ask nobody else."""
    page, errors, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(120_000)  # other tests run beside it
    page.goto(f"{real_server.url}/")
    page.get_by_role("heading", name=real_server.model).wait_for()
    set_up(page, temperature="0", max_tokens="64")
    yield page
    assert not errors
    own = (real_server.url, "data:", "blob:")
    assert asked and all(url.startswith(own) for url in asked)


def set_up(page, system=None, **numbers):
    page.get_by_role("button", name="Settings").click()
    for name, value in numbers.items():
        page.locator(f"#{name}").fill(value)
    if system is not None:
        page.get_by_label("System prompt").fill(system)
    page.get_by_role("button", name="Done").click()
    # A dialog tells that it is closed later than the click ends.
    taken = "asked => Object.keys(asked).every(name => chat.numbers[name] === Number(asked[name]))"
    page.wait_for_function(taken, arg=numbers)
    if system is not None:
        page.wait_for_function("system => chat.system === system", arg=system)


def ask(page, text, wait=True):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    if wait:
        page.get_by_role("button", name="Regenerate").wait_for()


def answers(page):
    return page.locator("article.assistant .body").all_inner_texts()


def test_ask_and_see_the_answer_with_its_figures(page):
    ask(page, QUESTION)
    assert "Paris" in answers(page)[-1]
    figures = page.locator("article.assistant footer span").inner_text()
    assert re.search(r"\d+ tokens · first after \d+\.\d s · \d+\.\d tokens/s · .*\d+ MB", figures)
    assert page.get_by_role("status").inner_text() == "The answer is complete"


def test_tokens_come_one_by_one_and_stop_stops_them(page, real_server):
    set_up(page, max_tokens="4000")
    page.evaluate(
        """() => {
            window.lengths = new Set();
            new MutationObserver(() => {
                const body = document.querySelector('article.assistant .body');
                if (body) window.lengths.add(body.textContent.length);
            }).observe(document.getElementById('log'), { childList: true, subtree: true });
        }"""
    )
    ask(page, "Write a long story about a river.", wait=False)
    page.wait_for_function("() => window.lengths.size > 5")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Regenerate").wait_for()
    assert "stopped" in page.locator("article.assistant footer").inner_text()
    said = answers(page)[-1]
    assert said
    page.wait_for_timeout(300)
    assert answers(page)[-1] == said and real_server.metric("answering") == 0


def test_escape_stops_too_and_regenerate_answers_again(page):
    set_up(page, max_tokens="4000")
    ask(page, "Write a long story about a river.", wait=False)
    page.locator("article.assistant .body p").first.wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Regenerate").wait_for()
    half = answers(page)[-1]
    set_up(page, max_tokens="4")
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("cut at the limit").wait_for()
    assert len(answers(page)) == 1 and answers(page)[-1] != half


def test_a_message_can_be_edited(page):
    ask(page, QUESTION)
    ask(page, "Thank you.")
    page.get_by_role("button", name="Edit", exact=True).first.click()
    box = page.get_by_label("Edit your message")
    assert box.input_value() == QUESTION
    box.fill("What is the capital of Italy?")
    box.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    assert page.locator("article.user .body").all_inner_texts() == ["What is the capital of Italy?"]
    assert len(answers(page)) == 1


def test_a_system_prompt_and_a_seed_are_sent(page, real_server):
    set_up(page, system="You are a cook.", seed="5", top_k="3")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hello")
    body = json.loads(sent.value.post_data)
    assert body["messages"][0] == {"role": "system", "content": "You are a cook."}
    assert (body["seed"], body["top_k"], body["temperature"]) == (5, 3, 0)


def test_conversations_stay_in_the_browser_and_can_be_taken_along(page, tmp_path):
    ask(page, QUESTION)
    said = answers(page)[-1]
    page.get_by_role("button", name="New chat").first.click()
    assert answers(page) == []
    page.reload()
    page.locator("#chats button").first.wait_for()
    page.get_by_role("button", name=QUESTION, exact=True).click()
    assert answers(page)[-1] == said
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "conversation.json")
    messages = json.loads((tmp_path / "conversation.json").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": QUESTION} and len(messages) == 2
    page.get_by_role("button", name=f"Delete {QUESTION}").click()
    page.reload()
    page.get_by_role("heading").wait_for()
    assert page.get_by_role("button", name=QUESTION, exact=True).count() == 0


def test_two_tabs_lose_nothing_of_each_other(context, page, real_server):
    other = context.new_page()
    other.set_default_timeout(120_000)
    other.goto(f"{real_server.url}/")
    other.get_by_role("heading", name=real_server.model).wait_for()
    set_up(other, temperature="0", max_tokens="4")
    set_up(page, max_tokens="4")
    ask(other, "Name a river.")
    ask(page, "Name a hill.")
    page.get_by_role("button", name="Name a river.", exact=True).wait_for()
    page.reload()
    for title in ("Name a river.", "Name a hill."):
        page.get_by_role("button", name=title, exact=True).wait_for()
    page.get_by_role("button", name="Delete Name a river.").click()
    other.get_by_role("button", name="Name a hill.", exact=True).wait_for()
    ask(other, "And one more.")  # who still reads a deleted chat may go on with it
    assert len(answers(other)) == 2


def test_text_never_becomes_html(page):
    hostile = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"
    page.evaluate(
        """([text]) => localStorage.setItem('gemma-keras.chats', JSON.stringify([{
            id: 'a', system: '', numbers: {}, messages: [
                { role: 'user', content: text },
                { role: 'assistant', content: text + '\\n\\n**bold** `code` [a](javascript:alert(1)) '
                    + '[b](https://example.org/)\\n\\n```\\n' + text + '\\n```\\n\\n1. one\\n2. two\\n\\n# head' },
            ],
        }]))""",
        [hostile],
    )
    page.reload()
    page.locator("article.assistant").wait_for()
    assert page.locator("article img, article script").count() == 0
    assert page.title() != "bad" and hostile in page.locator("article.user").inner_text()
    body = page.locator("article.assistant .body")
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("a").get_attribute("href") == "https://example.org/"
    assert body.locator("a").count() == 1 and body.locator("ol li").count() == 2
    assert body.locator("pre").inner_text().strip() == hostile


def test_the_keyboard_alone_suffices(page):
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    assert page.locator("article.user .body").inner_text() == "Hello\nthere"
    assert page.evaluate("document.activeElement.id") == "message"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea')].filter((e) =>
            !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"""
    )
    assert nameless == 0


def test_on_a_phone_nothing_is_cut(context, page):
    page.set_viewport_size(PHONE)
    ask(page, QUESTION)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["width"]
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send["y"] + send["height"] <= PHONE["height"] and send["height"] >= 40
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="New chat").click()
    assert answers(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser, real_server, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{real_server.url}/")
    page.get_by_role("heading", name=real_server.model).wait_for()
    ratio = page.evaluate(
        """() => {
            const light = (c) => {
                const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
                    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
                return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2];
            };
            const style = getComputedStyle(document.body);
            const [a, b] = [style.color, style.backgroundColor].map(light);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
    )
    assert ratio > 7  # WCAG 2.2, level AAA
    context.close()


def test_a_key_is_asked_for(browser, tiny_bundles, tmp_path):
    from tests.edge_demo.server.conftest import serving

    with serving(tmp_path, tiny_bundles / "chat", EDGE_DEMO_API_KEY="secret") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/")
        page.get_by_text("wants an API key").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Done").click()
        page.get_by_role("heading", name=server.model).wait_for()
        set_up(page, max_tokens="5")
        ask(page, "Hello")
        context.close()


def test_a_server_that_is_gone_is_told(browser, tiny_bundles, tmp_path):
    from tests.edge_demo.server.conftest import serving

    with serving(tmp_path, tiny_bundles / "chat") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/")
        page.get_by_role("heading", name=server.model).wait_for()
        server.process.kill()
        server.process.wait()
        ask(page, "Hello", wait=False)
        page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
        assert page.locator("article.user .body").inner_text() == "Hello"
        context.close()
