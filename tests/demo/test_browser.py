"""The report in a real browser: it fits narrow and wide windows, logs no errors and asks for nothing but itself."""

import json
import os
import shutil

import pytest

from undersong.demo.report import render

from .result import RESULT

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report to look at: the one in $UNDERSONG_DEMO_REPORT (a real run's), else the fixture's."""
    given = os.environ.get("UNDERSONG_DEMO_REPORT")
    if given:
        return os.path.abspath(given)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(RESULT), encoding="utf-8")
    return str(path)


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        message = "chromium and chromedriver are missing; apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield chrome


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_report_fits_is_quiet_and_asks_for_nothing(browser, report, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    browser.get_log("performance")  # what start-up asked for is not the report's doing
    browser.get(f"file://{report}")

    inner, scroll = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    too_wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + ': ' + e.textContent.slice(0, 40))"
    )
    assert scroll <= inner, too_wide
    assert too_wide == []
    assert browser.get_log("browser") == []
    assert requests(browser) == [f"file://{report}"]
    if folder := os.environ.get("UNDERSONG_SCREENSHOTS"):
        full_page_screenshot(browser, os.path.join(folder, f"report-{width}-{scheme}.png"))


def requests(browser):
    """URLs the page asked for, the report first; data: URLs are inside the page."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def full_page_screenshot(browser, path):
    import base64

    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    with open(path, "wb") as file:
        file.write(base64.b64decode(shot["data"]))
