"""The report in a real browser, headless Chromium: it opens without errors or requests, the slider moves what it says,
it fits a phone, and it follows the dark mode."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

from moe_ext import skip_thresholds
from moe_ext.report.page import write_page
from tests.support.report_input import demo_report

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


def choose(browser: webdriver.Chrome, name: str, at: int) -> None:
    """Sets the meaning of the slider, and its place by its keys."""
    browser.find_element("id", f"same-{name}").click()
    slider = browser.find_element("id", "slider")
    slider.send_keys(Keys.HOME)
    for _ in range(at):
        slider.send_keys(Keys.ARROW_RIGHT)


def line(browser: webdriver.Chrome, name: str) -> list[float]:
    element: Any = browser.find_element("id", name)
    return [float(element.get_attribute(end)) for end in ("x1", "x2")]


def rates(browser: webdriver.Chrome) -> list[float]:
    return [float(text(browser, f"rate-{layer}").removesuffix(" %")) for layer in range(4)]


def test_the_slider_opens_at_the_medians(browser: webdriver.Chrome) -> None:
    medians = skip_thresholds(demo_report().stats)[:, 0].tolist()
    assert text(browser, "slider-value") == "0.50"
    assert text(browser, "skip-rate") == "25.0 %"
    assert [text(browser, f"threshold-{layer}") for layer in range(4)] == [f"{median:.2f}" for median in medians]
    assert line(browser, "high-1") == pytest.approx([100 * medians[1]] * 2, abs=5e-3)


def test_moving_the_slider_sets_a_quantile_in_every_layer(browser: webdriver.Chrome) -> None:
    choose(browser, "quantile", 20)
    thresholds = skip_thresholds(demo_report().stats, 0.2)[:, 0].tolist()
    assert text(browser, "slider-value") == "0.20"
    assert text(browser, "skip-rate") == "10.0 %"
    assert rates(browser) == [10.0] * 4
    assert [text(browser, f"threshold-{layer}") for layer in range(4)] == [f"{each:.2f}" for each in thresholds]
    assert line(browser, "low-3") == line(browser, "high-3") == pytest.approx([100 * thresholds[3]] * 2, abs=5e-3)
    assert "--quantile 0.20" in text(browser, "command")


def test_the_slider_can_set_one_threshold_instead(browser: webdriver.Chrome) -> None:
    choose(browser, "threshold", 40)
    stats = demo_report().stats
    assert text(browser, "slider-value") == "0.40"
    assert {text(browser, f"threshold-{layer}") for layer in range(4)} == {"0.40"}
    assert line(browser, "high-0") == [40, 40]
    below = stats.ratio_histogram[:, 0].double()
    upto = below[:, :409].sum(1) + 0.6 * below[:, 409]  # 0.4 of 1024 bins is 409.6
    assert rates(browser) == pytest.approx((50 * upto / stats.tokens).tolist(), abs=0.06)  # one decimal
    assert "torch.full((4, 1), 0.40)" in text(browser, "command")
    browser.find_element("id", "same-quantile").click()
    assert text(browser, "slider-name") == "quantile"
    assert len(set(rates(browser))) == 1


@pytest.mark.parametrize("name", ["quantile", "threshold"])
def test_the_ends_of_the_slider_are_none_and_every_second_expert(browser: webdriver.Chrome, name: str) -> None:
    choose(browser, name, 0)
    assert (text(browser, "slider-value"), text(browser, "skip-rate")) == ("0.00", "0.0 %")
    browser.find_element("id", "slider").send_keys(Keys.END)
    assert (text(browser, "slider-value"), text(browser, "skip-rate")) == ("1.00", "50.0 %")


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
