"""The report as a person meets it, in a real browser: it opens, sorts, follows saves, and names cannot act."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import ckptstore
from ckptstore import report, retention
from ckptstore.cli import main
from ckptstore.objects.open import open_objects
from ckptstore.report.serving import LiveReport
from tests.browser.conftest import look, screenshot

HOSTILE = (
    "</td></script><script>window.owned=1</script><img src=x onerror=window.owned=2>"
    "\u202e\x1b\u2028\"'`${window.owned=3}"
)
RULES = retention.rules(keep_last=3, keep_every=None, keep_within=None, keep_best="loss", keep_tags=None)


@pytest.fixture
def store(tmp_path: Path) -> ckptstore.Store:
    """Three runs, of which one was tuned from another with most of it frozen."""
    store = ckptstore.Store(tmp_path / "ckpts")
    torch.manual_seed(0)
    embedding = torch.randn(2000, 64)
    for name in ("lstm-base", "lstm-wide", "tuned-legal"):
        linear, moment = torch.randn(500, 64), torch.zeros(500, 64)
        embedding = embedding if name == "tuned-legal" else torch.randn(2000, 64)
        for step in range(0, 1000, 100):
            if step and name != "tuned-legal":
                embedding = embedding + 0.01 * math.exp(-step / 300) * torch.randn(2000, 64)
            linear, moment = linear + 0.02 * math.exp(-step / 300) * torch.randn(500, 64), moment + step
            state = {
                "model": {"embedding": embedding, "linear": linear},
                "optimizer": {"exp_avg": moment},
                "step": step,
            }
            metrics = {"loss": 5 * math.exp(-step / 700), "accuracy": 1 - math.exp(-step / 400)}
            store.run(name).save(state, step=step, metrics=metrics)
    store.run("lstm-base").tag(300, "release")
    return store


def opened(browser: Any, file: Path, place: str = "") -> None:
    """Open a report, and wait until the charts in view are drawn."""
    browser.get(f"{file.as_uri()}{place}")
    drawn(browser)


def drawn(browser: Any) -> None:
    visible = "section:not([hidden]) [data-chart]"
    first = f"return [...document.querySelectorAll('{visible}')].slice(0, 1).every((box) => box.dataset.drawn)"
    WebDriverWait(browser, 30).until(lambda page: page.execute_script(first))


def wait_for_chart(browser: Any, box: Any) -> None:
    WebDriverWait(browser, 30).until(lambda page: box.get_attribute("data-drawn"))


def written(store: ckptstore.Store, file: Path, *options: str) -> Path:
    assert main(["report", store.url, "-o", str(file), *options]) == 0
    return file


def pictured(store: ckptstore.Store, file: Path) -> Path:
    """A report that is to be seen in the documents: of a store in a bucket, and not in a test's folder."""
    facts = report.make(open_objects(store.url), None, RULES, "--keep-last 3 --keep-best loss", drift=True)
    facts.url = "s3://team/ckpts"
    file.write_text(report.render(facts, whole=True), encoding="utf-8")
    return file


def console(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_it_opens_without_a_word_on_the_console_and_without_a_request(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    file = written(store, tmp_path / "report.html", "--drift")
    opened(browser, file)
    for run in (1, 2, 3):
        opened(browser, file, f"#run-{run}")
        for box in browser.find_elements(By.CSS_SELECTOR, f"#run-{run} [data-chart]"):
            browser.execute_script("arguments[0].scrollIntoView()", box)
            wait_for_chart(browser, box)
            assert box.find_elements(By.CSS_SELECTOR, "svg path, svg rect")
    assert console(browser) == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"}
    assert {url.partition("#")[0] for url in urls if not url.startswith("data:")} == {file.as_uri()}


def test_tables_sort_by_numbers_and_back(browser: Any, store: ckptstore.Store, tmp_path: Path) -> None:
    opened(browser, written(store, tmp_path / "report.html"), "#run-1")
    button = browser.find_element(By.CSS_SELECTOR, "#run-1 th button")

    def steps() -> list[str]:
        return [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#run-1 tbody td:first-child")]

    assert steps() == [str(step) for step in range(0, 1000, 100)]
    browser.execute_script("arguments[0].click()", button)
    browser.execute_script("arguments[0].click()", button)
    assert steps() == [str(step) for step in range(900, -1, -100)]
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"


def test_a_run_is_chosen_by_its_name_and_its_address_can_be_shared(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    file = written(store, tmp_path / "report.html")
    opened(browser, file)
    browser.find_element(By.LINK_TEXT, "lstm-wide").click()
    assert browser.current_url.endswith("#run-2")
    assert [each.text for each in browser.find_elements(By.TAG_NAME, "h2") if each.is_displayed()] == ["lstm-wide"]
    opened(browser, file, "#run-3")
    assert [each.text for each in browser.find_elements(By.TAG_NAME, "h2") if each.is_displayed()] == ["tuned-legal"]


def test_the_plan_of_a_prune_stands_beside_each_checkpoint(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    opened(browser, written(store, tmp_path / "report.html", "--keep-last", "2"), "#run-1")
    plans = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#run-1 tbody td:last-child")]
    assert plans[3] == "keeps it: tag release"
    assert plans[-1] == "keeps it: newest, last 2"
    assert plans[0] == "deletes it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_as_light_or_dark_as_the_user_prefers_and_can_be_turned(
    browser: Any, store: ckptstore.Store, tmp_path: Path, scheme: str
) -> None:
    look(browser, scheme=scheme)
    opened(browser, pictured(store, tmp_path / "report.html"), "#run-1")

    def paper() -> Any:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = paper()
    assert before == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    screenshot(browser, f"report-run-{scheme}.png", tmp_path)
    browser.find_element(By.ID, "theme").click()
    assert paper() != before
    browser.execute_script("localStorage.clear()")


def test_on_a_phone_only_tables_and_charts_are_wider_than_the_screen(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    look(browser, 390, 844)
    opened(browser, pictured(store, tmp_path / "report.html"))
    screenshot(browser, "report-phone.png", tmp_path)
    for place in ("#store", "#run-1"):
        opened(browser, tmp_path / "report.html", place)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_the_whole_store_is_seen_first(browser: Any, store: ckptstore.Store, tmp_path: Path) -> None:
    opened(browser, pictured(store, tmp_path / "report.html"))
    screenshot(browser, "report-store.png", tmp_path)
    text = browser.find_element(By.TAG_NAME, "main").text
    for word in ("lstm-base", "tuned-legal", "30", "Stored bytes of each run"):
        assert word in text


def test_names_from_a_store_do_nothing_but_show(browser: Any, tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path / "evil")
    for step in (1, 2, 3):
        state = {HOSTILE: torch.full((100,), float(step)), "text": HOSTILE}
        metrics = {HOSTILE: step / 2, f"text {HOSTILE}": HOSTILE, "__proto__": 1.0, "a.b[0]['c']": 2.0}
        store.run("run").save(state, step=step, metrics=metrics, metadata={HOSTILE: HOSTILE})
    file = written(store, tmp_path / "report.html", "--drift")
    for place in ("#store", "#run-1"):
        opened(browser, file, place)
        for box in browser.find_elements(By.CSS_SELECTOR, "section:not([hidden]) [data-chart]"):
            browser.execute_script("arguments[0].scrollIntoView()", box)
            wait_for_chart(browser, box)
    assert browser.execute_script("return window.owned") is None
    assert browser.execute_script("return document.querySelectorAll('main img').length") == 0
    assert console(browser) == []
    text = browser.find_element(By.ID, "run-1").text
    assert "<script>window.owned=1</script>" in text
    assert "\\u202e\\x1b\\u2028" in text
    assert not set(file.read_text(encoding="utf-8")) & {"\u202e", "\x1b", "\u2028"} & set(text)


def test_names_that_every_object_of_javascript_has_are_drawn_as_others(browser: Any, tmp_path: Path) -> None:
    store = ckptstore.Store(tmp_path / "ckpts")
    names = ("constructor", "__proto__", "hasOwnProperty")
    for name in names:
        for step in (1, 2, 3):
            store.run(name).save({each: [step] for each in names}, step=step, metrics=dict.fromkeys(names, 1.0 * step))
    file = written(store, tmp_path / "report.html")
    for place in ("#store", "#run-1", "#run-2"):
        opened(browser, file, place)
        for box in browser.find_elements(By.CSS_SELECTOR, "section:not([hidden]) [data-chart]"):
            browser.execute_script("arguments[0].scrollIntoView()", box)
            wait_for_chart(browser, box)
    assert console(browser) == []


def test_a_script_that_got_in_would_not_run(browser: Any, store: ckptstore.Store, tmp_path: Path) -> None:
    file = written(store, tmp_path / "report.html")
    spoilt = file.read_text(encoding="utf-8").replace("<main>", "<main><script>window.owned=1</script>", 1)
    file.write_text(spoilt, encoding="utf-8")
    opened(browser, file)
    assert browser.execute_script("return window.owned") is None
    assert any("Content Security Policy" in message for message in console(browser))


@pytest.fixture
def live(store: ckptstore.Store) -> Iterator[LiveReport]:
    objects = open_objects(store.url)

    def page(state: str) -> str:
        return report.render(report.make(objects, None, RULES, "--keep-last 3"), whole=True, live=state)

    served = LiveReport(objects, page)
    thread = threading.Thread(target=served.run)
    thread.start()
    yield served
    served.stop()
    thread.join()
    served.close()


def test_the_live_page_follows_what_is_saved(browser: Any, store: ckptstore.Store, live: LiveReport) -> None:
    browser.get(live.url)
    drawn(browser)
    assert "new-run" not in browser.find_element(By.TAG_NAME, "nav").text
    store.run("new-run").save({"w": torch.ones(10)}, step=1)
    WebDriverWait(browser, 30, ignored_exceptions=[Exception]).until(
        lambda page: "new-run" in page.find_element(By.TAG_NAME, "nav").text
    )
    drawn(browser)
    assert console(browser) == []


def test_what_is_printed_is_the_section_that_is_shown_with_all_its_charts(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    opened(browser, written(store, tmp_path / "report.html"), "#run-1")
    boxes = browser.find_elements(By.CSS_SELECTOR, "#run-1 [data-chart]")
    assert len(boxes) == 4
    for box in boxes:  # without scrolling to them
        wait_for_chart(browser, box)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert all(box.is_displayed() for box in boxes)
        assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
        assert not browser.find_element(By.ID, "run-2").is_displayed()
        assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_charts_that_were_drawn_before_the_theme_was_turned_have_its_colours_and_their_width(
    browser: Any, store: ckptstore.Store, tmp_path: Path
) -> None:
    opened(browser, written(store, tmp_path / "report.html"))
    browser.find_element(By.LINK_TEXT, "lstm-wide").click()
    drawn(browser)
    browser.find_element(By.ID, "theme").click()
    browser.find_element(By.LINK_TEXT, "The store").click()
    ink = browser.execute_script("return getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    labels = "return document.querySelector('#store [data-chart] svg text').getAttribute('fill')"
    WebDriverWait(browser, 30).until(lambda page: page.execute_script(labels) == ink)
    assert browser.find_element(By.CSS_SELECTOR, "#store [data-chart] svg").size["width"] > 800
    browser.execute_script("localStorage.clear()")
