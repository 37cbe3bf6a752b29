"""The site of the documentation: built without a warning, complete, and readable without a network."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsing import needs_browser, open_browser

from fedmetanas_core.commands.usage import COMMANDS, form
from fedmetanas_core.config import AUTO, Config, describe_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as docs/developing.md says, elsewhere."""
    target = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    # Material's notice of its own end (May 2027) is no warning about these pages.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (target.parent / "said").write_text(done.stderr)
    return target


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    said = (site.parent / "said").read_text()
    assert all(line.startswith("INFO") for line in said.splitlines()), said


class Sources(HTMLParser):
    """What a browser fetches by itself for a page, and where its links go."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.linked.append(values.get("href", ""))
        elif tag != "link" or values.get("rel") != "canonical":
            self.fetched += [values[name] for name in ("src", "href", "srcset", "data") if name in values]


def test_nothing_comes_from_elsewhere_and_every_link_leads_somewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        sources = Sources()
        sources.feed(page.read_text())
        assert [source for source in sources.fetched if "//" in source] == [], page
        for link in sources.linked:
            target = link.partition("#")[0].partition("?")[0]
            if "//" not in link and target and page.name != "404.html":
                assert (page.parent / target).exists(), f"{page}: {link}"
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"url\(\s*[\"']?(https?:)?//", styles)


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text())).replace("&amp;", "&").replace("&#39;", "'")


def test_the_reference_has_every_key_command_and_what_auto_becomes(site: Path) -> None:
    keys, commands = text_of(site / "reference" / "keys.html"), text_of(site / "reference" / "commands.html")
    for key, value, about in describe_keys():
        assert f"{key} {'(empty)' if value == '' else value} {about.replace('`', '')}" in keys, key
    for command, (_, what) in COMMANDS.items():
        assert re.sub(r"\s+", " ", form(command)) in commands, command
        assert what[1:].replace("`", "") in commands, command
    digits = Config().resolve(8, 8, 1437)
    assert Config().num_rounds == AUTO
    assert f"num_rounds {digits.num_rounds} 140 140 140 140" in keys


def test_the_pages_made_of_the_code_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = importlib.import_module("hooks").reference()
    assert len(pages) == 2
    for path, content in pages.items():
        assert (ROOT / "docs" / path).read_text() == content, f"{path} is not of this code: run python docs/hooks.py"


def test_the_home_page_is_the_readme_without_its_front_matter(site: Path) -> None:
    home = text_of(site / "index.html")
    assert "framework: [torch" not in home
    assert "100 virtual clients search on handwritten digits" in home
    assert (site / "pictures" / "genotype.svg").stat().st_size < 150_000
    assert (site / "pictures" / "curves.svg").stat().st_size < 150_000


@pytest.fixture
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@needs_browser
def test_the_search_works_in_a_folder_without_a_server(site: Path, browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((site / "index.html").as_uri())
    box = browser.find_element("css selector", "input[name=query]")
    browser.execute_script("arguments[0].focus()", box)
    box.send_keys("multiply-adds")
    found = WebDriverWait(browser, 20).until(
        lambda driver: driver.find_elements("css selector", ".md-search-result__item a")
    )
    assert found
    assert browser.get_log("browser") == []
