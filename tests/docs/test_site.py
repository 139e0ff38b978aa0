"""The site in a browser: light, dark, narrow; no other host; its search.

From a server and from a disk: `make docs` leaves a folder that is opened as it is.
"""

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

# A page of each kind.
KINDS = (
  "architecture.html",
  "code/dllm_jax/objectives/mdlm.py.html",
  "findings.html",
  "finetuning.html",
  "glossary.html",
  "index.html",
  "notebooks/quickstart.html",
  "reference/dllm_jax.objectives.html",
  "systems/index.html",
  "systems/mdlm.html",
)

pytestmark = [
  pytest.mark.all,
  pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    """Says nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """Returns the folder of the site: $SITE, or else built strictly for these tests."""
  if "SITE" in os.environ:
    return (blocks.ROOT / os.environ["SITE"]).resolve(strict=True)
  folder = tmp_path_factory.mktemp("site")
  paths = [str(blocks.ROOT), str(blocks.ROOT / "docs" / "site")]
  env = os.environ | {
    "PYTHONPATH": os.pathsep.join(paths),
    "NO_MKDOCS_2_WARNING": "1",
  }
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
  page.emulate_media(reduced_motion="reduce")
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


WRONG = """async () => {
  // What is still moving to its place in a window of another size.
  const frame = () => new Promise(requestAnimationFrame);
  await frame();
  await frame();
  const moving = document.getAnimations()
    .filter(a => a instanceof CSSTransition);
  await Promise.allSettled(moving.map(a => a.finished));
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


def looked_at(browser, address, paths):
  """Returns what is wrong with pages in each form, and how many formulas they have."""
  page, wrong = opened(browser, "light", address)
  formulas = 0
  for path in paths:
    page.goto(f"{address}{path}")
    page.evaluate("window.MathJax ? MathJax.startup.promise : 0")
    formulas += page.locator("mjx-container").count()
    for form, looks in FORMS.items():
      page.set_viewport_size(looks["viewport"])
      page.emulate_media(color_scheme=looks["color_scheme"])
      wrong += [f"{path}, {form}, {kind}" for kind in page.evaluate(WRONG)]
  return wrong, formulas


def test_pages_of_each_kind_in_every_form(browser, address):
  wrong, formulas = looked_at(browser, address, KINDS)
  assert formulas > 10
  assert not wrong


def test_every_page_in_every_form(browser, site, address):
  paths = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
  wrong, formulas = looked_at(browser, address, sorted(set(paths) - set(KINDS)))
  assert formulas > 100 and len(paths) > 60
  assert not wrong


def test_what_is_wrong_is_found(browser, address):
  page, wrong = opened(browser, "narrow", address)
  page.goto(f"{address}index.html")
  assert page.evaluate(WRONG) == []
  page.evaluate("""() => document.querySelector('article').insertAdjacentHTML(
    'beforeend', '<div style="width: 500px">-</div><img src="gone.png">')""")
  page.wait_for_function("[...document.images].every(i => i.complete)")
  assert page.evaluate(WRONG) == [
    "is too wide",
    "has pictures that are missing",
  ]
  assert any("404" in text for text in wrong)


@pytest.mark.parametrize("place", ["server", "disk"])
def test_search_finds_what_is_there(browser, site, address, place):
  address = address if place == "server" else f"{site.as_uri()}/"
  page, wrong = opened(browser, "light", address)
  page.goto(f"{address}index.html")
  field = page.locator(".md-search__input")
  field.focus()
  ready = page.locator(".md-search-result__meta", has_text="Type to start")
  ready.wait_for(state="attached", timeout=120_000)  # its worker's first word
  field.press_sequentially("remasking")
  found = page.locator(".md-search-result__link")
  found.first.wait_for(timeout=120_000)
  assert any("remasking" in text.lower() for text in found.all_inner_texts())
  found.first.click()
  page.wait_for_url(lambda url: "index.html" not in url)
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
