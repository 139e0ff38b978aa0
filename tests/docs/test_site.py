"""The site in a browser: light, dark, narrow; no other host; its search."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest

from tests.docs import blocks

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FORMS = {
  "light": {
    "color_scheme": "light",
    "viewport": {"width": 1280, "height": 900},
  },
  "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
  "narrow": {
    "color_scheme": "light",
    "viewport": {"width": 390, "height": 844},
  },
}

pytestmark = [
  pytest.mark.all,
  pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    """Says nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """Returns the folder of the site, built strictly."""
  folder = tmp_path_factory.mktemp("site")
  paths = [str(blocks.ROOT), str(blocks.ROOT / "docs" / "site")]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
  subprocess.run(
    [
      *(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"),
      f"--config-file={blocks.ROOT / 'docs' / 'site' / 'mkdocs.yml'}",
      f"--site-dir={folder}",
    ],
    env=env,
    check=True,
  )
  return folder


@pytest.fixture(scope="module")
def address(site):
  """Returns where the site is served."""
  handler = functools.partial(_Quiet, directory=str(site))
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f"http://127.0.0.1:{server.server_port}/"
  server.shutdown()


@pytest.fixture(scope="module")
def browser():
  """Returns a browser."""
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    found = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox"]
    )
    yield found
    found.close()


def opened(browser, form, address):
  """Returns a page and the list of what is wrong with it, filled as it is used."""
  page, wrong = browser.new_context(**FORMS[form]).new_page(), []
  own = (address, "data:", "blob:", "about:")
  page.on(
    "request",
    lambda r: None if r.url.startswith(own) else wrong.append(f"asks {r.url}"),
  )
  page.on(
    "console",
    lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None,
  )
  page.on("pageerror", lambda error: wrong.append(str(error)))
  return page, wrong


WRONG = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const wrong = {
    'is too wide': document.documentElement.scrollWidth > innerWidth + 1,
    'has wrong formulas': all('[data-mjx-error]').length,
    'has flat formulas': all('mjx-container > svg')
      .filter(e => e.getBoundingClientRect().width < 3).length,
    'has formulas that are not set': all('.arithmatex')
      .filter(e => !e.querySelector('mjx-container')).length,
    'has pictures that are missing': all('img')
      .filter(e => e.complete && !e.naturalWidth).length,
  };
  return Object.keys(wrong).filter(kind => wrong[kind]);
}"""


def test_every_page_in_every_form(browser, site, address):
  page, wrong = opened(browser, "light", address)
  paths = sorted(path.relative_to(site) for path in site.rglob("*.html"))
  formulas = 0
  for path in paths:
    page.goto(f"{address}{path.as_posix()}")
    page.evaluate("window.MathJax ? MathJax.startup.promise : 0")
    formulas += page.locator("mjx-container").count()
    for form, looks in FORMS.items():
      page.set_viewport_size(looks["viewport"])
      page.emulate_media(color_scheme=looks["color_scheme"])
      wrong += [f"{path}, {form}, {kind}" for kind in page.evaluate(WRONG)]
  assert formulas > 100 and len(paths) > 60
  assert not wrong


def test_search_finds_what_is_there(browser, address):
  page, wrong = opened(browser, "light", address)
  page.goto(f"{address}index.html")
  page.click("label.md-search__icon, .md-search__input")
  page.fill(".md-search__input", "remasking")
  page.wait_for_selector(".md-search-result__link", timeout=20_000)
  found = page.locator(".md-search-result__link").all_inner_texts()
  assert any("remasking" in text.lower() for text in found)
  assert not wrong


def test_a_line_of_code_is_shown(browser, address):
  page, wrong = opened(browser, "light", address)
  page.goto(f"{address}systems/mdlm.html")
  page.click("text=return -self.dalpha(t) / self.masked(t)")
  page.wait_for_url("**/core/schedule.py.html#*")
  number = page.url.rpartition("-")[2]
  line = page.locator(f"#__span-0-{number}").inner_text()
  assert line.strip() == "return -self.dalpha(t) / self.masked(t)"
  assert not wrong
