"""A real browser without a window: Debian's Chromium, driven through its WebDriver."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
SCREENSHOTS = "CKPTSTORE_SCREENSHOTS"
"""Names the folder that screenshots for the documents are written to."""


def _found(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def _driver() -> Iterator[Any]:
    browser, driver = _found(BROWSERS), _found(DRIVERS)
    if not (browser and driver):
        pytest.skip("there is no Chromium with its WebDriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # The sandbox needs rights that root in a container lacks; the pages are our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_script_timeout(30)
    yield found
    found.quit()


@pytest.fixture
def browser(_driver: Any) -> Any:
    """The browser, 1280 by 900 pixels, light, with nothing on its console."""
    look(_driver)
    _driver.get("about:blank")
    for kind in ("browser", "performance"):
        _driver.get_log(kind)
    return _driver


def look(browser: Any, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
    """Give the page a size, and what the user prefers."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def screenshot(browser: Any, name: str, tmp_path: Path) -> Path:
    """Write what is shown, for the documents if they are being made."""
    folder = Path(os.environ.get(SCREENSHOTS, tmp_path))
    browser.save_screenshot(str(folder / name))
    return folder / name
