"""The demo page in headless Chromium, driven as a visitor would."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from .test_demo import make_upload

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: install Debian's package chromium to run this test"),
]

PATIENCE = 180
"""Seconds until a state that does not come counts as missing; a loaded machine takes long over everything."""
TAKEN = "#status .ok:has-text('200 x 300')"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio", reason='the demo needs gradio: pip install "vlm-attn[demo]"')
    from vlm_attn_demo.run import serve

    found: list[str] = []
    page = serve("scenes", port=0, ready=found.append, block=False)
    yield found[0]
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    outside = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert outside == {urlsplit(address).netloc}, f"the page asked elsewhere: {outside}"


def ask(page: Any) -> str:
    """Presses the button and waits for the closing status."""
    # The busy state may pass too fast to be seen, so an old status is marked instead of waiting for it.
    page.evaluate("document.querySelectorAll('#status .ok, #status .error').forEach(e => e.classList.add('old'))")
    page.click("#ask")
    page.wait_for_selector("#status .ok:not(.old), #status .error:not(.old)")
    page.wait_for_selector("#status [data-testid=status-tracker].hide", state="attached")  # it takes the next press
    return str(page.inner_text("#status"))


def fill(page: Any, selector: str, text: str) -> None:
    """Types a value and sees it stay: a control that has just appeared may be given its default once more."""
    for _ in range(20):
        page.fill(selector, text)
        page.wait_for_timeout(250)
        if page.input_value(selector) == text:
            return
    raise TimeoutError(f"{selector} does not keep {text!r}")


def upload(page: Any, path: Path) -> None:
    """Gives the page a file."""
    page.set_input_files("#upload input[type=file]", path)


def size(page: Any, name: str) -> list[int]:
    """Width and height of the picture in a pane."""
    image = page.locator(f"#{name} img").first
    found: list[int] = image.evaluate("async e => { await e.decode(); return [e.naturalWidth, e.naturalHeight] }")
    return found


def test_a_visit(visitor: Any, tmp_path: Path) -> None:
    page = visitor
    # an example picture, two methods, answers, overlays
    page.locator("#examples button").nth(3).click()
    page.wait_for_selector("#status .ok")
    page.fill("#question textarea", "Describe this image.")
    page.click("#parameters-B button")
    fill(page, "#B-fastv-keep textarea, #B-fastv-keep input", "24")
    assert ask(page) == "Done."
    assert page.input_value("#answer-A textarea").strip() and page.input_value("#answer-B textarea").strip()
    assert "100 of 100" in page.inner_text("#facts-A") and "24 of 100" in page.inner_text("#facts-B")
    for name in ("mask-A", "mask-B", "heat"):
        assert size(page, name) == [480, 480]

    # a proposed question, asked at once
    page.get_by_role("button", name="Is there a dog in the image?").click()
    assert ask(page) == "Done."
    assert page.input_value("#question textarea") == "Is there a dog in the image?"
    assert page.input_value("#answer-A textarea").split(",")[0] in ("Yes", "No")

    # bad files: said clearly, and the page goes on working
    for kind, message in (("text", "not a readable picture"), ("truncated", "truncated"), ("bomb", "too large")):
        upload(page, make_upload(tmp_path, kind))
        page.wait_for_selector(f"#status .error:has-text('{message}')")
        assert str(tmp_path) not in page.inner_text("#status")
    upload(page, make_upload(tmp_path, "heavy"))
    page.wait_for_selector("text=exceed the maximum allowed size")
    upload(page, make_upload(tmp_path, "good"))
    page.wait_for_selector(TAKEN)
    page.wait_for_selector("#upload:not(:has-text('Error'))")
    assert page.input_value("#answer-A textarea") == ""

    # a value out of range is said, the other side answers; another method brings its own controls
    fill(page, "#B-fastv-layer input", "99")
    assert "layer=99 is not a layer of this model" in ask(page)
    assert page.input_value("#answer-A textarea").strip() and not page.input_value("#answer-B textarea")
    page.click("#method-B input")
    page.get_by_role("option", name="vcd").click()
    page.wait_for_selector("#B-vcd-alpha")
    assert ask(page) == "Done."


def sent(page: Any) -> Any:
    """Waits for the block within to have the server called."""
    return page.expect_request("**/queue/join*")


def test_a_file_given_while_another_is_handled_is_not_lost(
    visitor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_attn_demo.run import open_upload

    reached, go_on = threading.Event(), threading.Event()

    def held(path: str | Path) -> Any:
        reached.set()
        go_on.wait()
        return open_upload(path)

    monkeypatch.setattr("vlm_attn_demo.ui.open_upload", held)
    try:
        with sent(visitor):
            upload(visitor, make_upload(tmp_path, "good"))
        assert reached.wait(PATIENCE)
        with sent(visitor):
            upload(visitor, make_upload(tmp_path, "truncated"))
    finally:
        go_on.set()
    visitor.wait_for_selector("#status .error:has-text('truncated')")


def test_a_new_picture_ends_the_answer_about_the_old_one(
    visitor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_attn_demo.run import Runner

    reached, go_on = threading.Event(), threading.Event()
    answer = Runner.answer

    def held(*args: Any) -> Iterator[Any]:
        for reply in answer(*args):
            yield reply
            reached.set()
            go_on.wait()

    monkeypatch.setattr(Runner, "answer", held)
    try:
        with sent(visitor):
            visitor.click("#ask")
        assert reached.wait(PATIENCE)
        with sent(visitor):
            upload(visitor, make_upload(tmp_path, "good"))
    finally:
        go_on.set()
    visitor.wait_for_selector(TAKEN)
    assert ask(visitor) == "Done."
    assert size(visitor, "mask-A") == size(visitor, "heat") == [320, 480]
