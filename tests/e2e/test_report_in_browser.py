"""The report in headless Chromium, as a person meets it: on a phone and on a desk, with and without JavaScript."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import needs_browser, open_browser
from finished import finished_run

from fedmetanas_core.output.report.files import write_report

pytestmark = needs_browser
PHONE, DESK = 390, 1280
# Texts of one drawing that cover each other, and texts that reach out of their drawing, in pixels of the screen.
FAULTS = """
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1
  && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const cover = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([said, box], i) => {
    if (!inside(box, frame)) found.push(`cut: ${said}`);
    texts.slice(i + 1).forEach(([other, its]) => { if (cover(box, its)) found.push(`${said} over ${other}`); });
  });
}
return found;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those of one run, of two, and of one of a method without cells."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("one", "other", "fixed")
    keys: tuple[dict[str, Any], ...] = ({"search_fraction": 0.8}, {"dir_alpha": 5.0}, {"method": "fedavg"})
    one, other, fixed = (finished_run(folder, name, **given) for name, given in zip(names, keys, strict=True))
    return {
        "run": write_report([one]),
        "runs": write_report([one, other], folder / "runs.html"),
        "fixed": write_report([fixed]),
    }


def look(browser: Any, page: Path, width: int, scheme: str = "light", scripts: bool = True) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["run", "runs", "fixed"])
def test_nothing_overlaps_is_cut_or_complains(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    look(browser, pages[name], width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(FAULTS) == []
    keys = "return [...document.querySelectorAll('.legend li')].map(key => key.getBoundingClientRect().height)"
    assert all(height < 40 for height in browser.execute_script(keys))
    # Every drawing says what it is, also to those who do not see it.
    titles = "return [...document.querySelectorAll('svg:not([aria-hidden])')].map(svg => svg.querySelector('title'))"
    assert all(browser.execute_script(titles))


def test_letters_stay_legible_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    look(browser, pages["run"], PHONE)
    heights = "return [...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    assert min(browser.execute_script(heights)) >= 8


def test_the_pointer_reads_a_curve(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    look(browser, pages["run"], DESK)
    reading = browser.find_element(By.CLASS_NAME, "reading")
    assert not reading.is_displayed()
    charts = browser.find_elements(By.CSS_SELECTOR, "svg[data-chart]")
    loss = next(chart for chart in charts if "loss" in chart.get_attribute("aria-label"))
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", loss)
    ActionChains(browser).move_to_element_with_offset(loss, loss.rect["width"] // 2 - 25, 0).perform()
    assert reading.is_displayed()
    assert "(round 6)" in reading.text
    assert reading.text.count("\n") == 1, "both losses"
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not reading.is_displayed()


def test_a_switch_shows_one_kind_of_cell(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.by import By

    look(browser, pages["run"], PHONE)
    parts = browser.find_elements(By.CSS_SELECTOR, "[data-part=alphas]")
    assert [part.is_displayed() for part in parts] == [True, True]
    for choice, shown in (("normal", [True, False]), ("reduce", [False, True]), ("all", [True, True])):
        browser.find_element(By.CSS_SELECTOR, f"[data-toggle=alphas] input[value={choice}]").click()
        assert [part.is_displayed() for part in parts] == shown


def test_without_scripts_everything_is_there_and_no_switch_that_does_nothing(
    browser: Any, pages: dict[str, Path]
) -> None:
    from selenium.webdriver.common.by import By

    look(browser, pages["run"], DESK, scripts=False)
    try:
        assert not browser.find_element(By.CSS_SELECTOR, "[data-toggle]").is_displayed()
        assert all(part.is_displayed() for part in browser.find_elements(By.CSS_SELECTOR, "[data-part=alphas]"))
        assert len(browser.find_elements(By.CSS_SELECTOR, "svg[data-chart] .line")) >= 5
        assert browser.find_element(By.CLASS_NAME, "genotype-drawing").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_it_follows_its_reader_into_the_dark(browser: Any, pages: dict[str, Path]) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    grounds = []
    for scheme in ("light", "dark"):
        look(browser, pages["run"], DESK, scheme)
        grounds.append(browser.execute_script(ground))
    assert grounds == ["rgb(255, 255, 255)", "rgb(21, 24, 29)"]
