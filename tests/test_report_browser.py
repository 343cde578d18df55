"""The report in a real browser, headless Chromium: it opens without errors or requests, the slider moves what it says,
it fits a phone, and it follows the dark mode."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from moe_ext.report import write_page
from tests.report_input import demo_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium (Debian: apt install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Chromium with the page open."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(demo_report(), path)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get(path.as_uri())
    yield driver
    driver.quit()


def text(browser: webdriver.Chrome, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", name))


def screen(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def test_the_page_opens_without_an_error_and_without_a_request(browser: webdriver.Chrome) -> None:
    assert browser.title == "mixtral: experts"
    assert browser.get_log("browser") == []
    requests = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"] and '"http' in entry["message"].split('"url":')[1][:8]
    ]
    assert requests == []


def test_moving_the_slider_changes_threshold_rates_and_lines(browser: webdriver.Chrome) -> None:
    slider = browser.find_element("id", "threshold")
    before = {name: text(browser, name) for name in ("threshold-value", "skip-rate", "rate-0", "rate-3")}
    start = int(slider.get_attribute("value") or "")
    for _ in range(10):
        slider.send_keys(Keys.ARROW_RIGHT)
    after = {name: text(browser, name) for name in before}
    assert before["threshold-value"] == f"{start / 100:.2f}"
    assert after["threshold-value"] == f"{(start + 10) / 100:.2f}"
    for name in ("skip-rate", "rate-0", "rate-3"):
        assert float(after[name].removesuffix(" %")) > float(before[name].removesuffix(" %"))
    line: Any = browser.find_element("id", "line-0")
    assert [float(line.get_attribute(end)) for end in ("x1", "x2")] == [start + 10] * 2


def test_the_ends_of_the_slider_are_none_and_every_second_expert(browser: webdriver.Chrome) -> None:
    slider = browser.find_element("id", "threshold")
    slider.send_keys(Keys.HOME)
    assert (text(browser, "threshold-value"), text(browser, "skip-rate")) == ("0.00", "0.0 %")
    slider.send_keys(Keys.END)
    assert (text(browser, "threshold-value"), text(browser, "skip-rate")) == ("1.00", "50.0 %")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_as_wide_as_the_screen(browser: webdriver.Chrome, width: int) -> None:
    screen(browser, width, "light")
    assert browser.execute_script("const page = document.documentElement; return page.scrollWidth <= page.clientWidth")
    drawings = "return [...document.querySelectorAll('.drawing')].filter(d => d.scrollWidth > d.clientWidth + 1).length"
    assert browser.execute_script(drawings) == 0  # nothing of a small model scrolls sideways either


def test_the_smallest_letters_of_a_figure_can_be_read_on_a_phone(browser: webdriver.Chrome) -> None:
    screen(browser, 390, "light")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.drawing text')].map(t => "
        "parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
    )
    assert heights
    assert min(heights) > 6  # CSS pixels; the numbers in the cells of the agreement are the smallest


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark_mode(browser: webdriver.Chrome, scheme: str) -> None:
    screen(browser, 1280, scheme)

    def luminance(selector: str, style: str) -> float:
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        channels = [int(part) / 255 for part in browser.execute_script(script, selector, style)[4:-1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    card = luminance("figure", "backgroundColor")
    assert (card < 0.2) == (scheme == "dark")
    for selector, style in (("figcaption", "color"), ("summary", "color"), ("#load text", "fill"), ("h2", "color")):
        one, other = sorted([luminance(selector, style), card])
        assert (other + 0.05) / (one + 0.05) >= 4.5, selector  # WCAG AA
