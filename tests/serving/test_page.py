"""The page in a real browser, before a real server of a tiny network.

Wants a Chromium (`apt-get install chromium`); Playwright brings none.
"""

import contextlib
import re
import shutil
import time

import pytest

from dllm_jax.serving.requests import Draft
from tests import runs
from tests.serving import servers

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason="no browser: apt-get install chromium"
)
MARKUP = "<img src=x onerror='document.title=1'><b>bold</b>"
_DONE = ".turn:last-child .canvas[aria-busy=false]"
# What a canvas looks like at each change: slots that are masked, and all.
_WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const canvas = document.querySelector(".turn:last-child .canvas");
    if (canvas) seen.push([canvas.querySelectorAll(".masked").length,
      canvas.children.length]);
  }).observe(document.getElementById("talk"), {subtree: true, childList: true,
    attributes: true});
}"""
# Contrast of ink on each shade of confidence, of WCAG 2.2, as it is painted.
_CONTRAST = """() => {
  const talk = document.getElementById("talk");
  talk.innerHTML = '<div class="canvas"><span class="shown">a</span></div>';
  const span = talk.querySelector("span");
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((x) =>
      x / 255 <= .04045 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [];
  for (let p = 0; p <= 1; p += .02) {
    span.style.setProperty("--p", p);
    const style = getComputedStyle(span);
    const [low, high] = [style.color, style.backgroundColor].map(luminance)
      .sort((a, b) => a - b);
    found.push((high + .05) / (low + .05));
  }
  return Math.min(...found);
}"""


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as driver:
    made = driver.chromium.launch(executable_path=CHROMIUM)
    yield made
    made.close()


@pytest.fixture
def visit(browser):
  """Opens the page of a server; at the end nothing has gone wrong in it."""
  with contextlib.ExitStack() as stack:

    def opened(url, **options):
      context = stack.enter_context(browser.new_context(**options))
      page = context.new_page()
      page.set_default_timeout(10_000)
      page.asked, page.wrong = [], []
      page.on("request", lambda request: page.asked.append(request.url))
      page.on("pageerror", lambda error: page.wrong.append(str(error)))
      page.on("console", lambda said: _hear(page, said))
      stack.callback(lambda: _check(page, url))
      page.goto(f"{url}/")
      return page

    yield opened


def _hear(page, said):
  """Keeps what is wrong; that a server refuses, or is away, is not."""
  if said.type == "error" and "Failed to load resource" not in said.text:
    page.wrong.append(said.text)


def _check(page, url):
  assert not page.wrong
  assert all(asked.startswith((url, "data:")) for asked in page.asked)


@pytest.fixture(scope="module")
def roomy(tiny_run):
  """A server with room for a conversation."""
  running = servers.Running(tiny_run, length=128).start()
  yield running
  running.stop()


@pytest.fixture
def slowed(monkeypatch):
  """Lets each network call of a server's drafts take a while."""

  def slower(running):
    submit = running.engine.submit

    def slowly(request, listener):
      def hear(event):
        time.sleep(0.04 * isinstance(event, Draft))
        listener(event)

      return submit(request, hear)

    monkeypatch.setattr(running.engine, "submit", slowly)
    return running

  return slower


def set_up(page, **settings):
  page.wait_for_selector("#send:enabled")
  for name, value in settings.items():
    field = page.locator(f"[name={name}]")
    field.evaluate("(field, value) => { field.value = value; }", str(value))


def say(page, text, **settings):
  """Sends a text with settings."""
  set_up(page, **settings)
  page.fill("#prompt", text)
  page.press("#prompt", "Enter")


def canvas(page):
  return page.locator(".turn:last-child .canvas")


@pytest.mark.all
def test_an_answer_unmasks_and_is_the_servers(server, slowed, visit):
  page = visit(slowed(server).url)
  page.evaluate(_WATCH)
  say(page, MARKUP[:5], max_tokens=16, seed=3)
  page.wait_for_selector(_DONE)
  # What was said is text, and what is answered is what the server answers.
  assert page.locator(".said").text_content() == MARKUP[:5]
  body = {"model": servers.NAME, "max_tokens": 16, "seed": 3}
  body["messages"] = [{"role": "user", "content": MARKUP[:5]}]
  answer = servers.send(f"{server.url}/v1/chat/completions", body)[2]
  wanted = answer["choices"][0]["message"]["content"]
  assert canvas(page).text_content() == wanted
  assert page.locator("#status").text_content() == f"Answer: {wanted}"
  masked = [count for count, all_ in page.evaluate("seen") if all_ == 16]
  assert masked == sorted(masked, reverse=True) and len(set(masked)) > 4
  facts = page.locator(".facts").text_content()
  assert re.match(r"\d+ calls · \d+ tokens? · [\d.]+ tokens/s · ", facts), facts
  assert "tokens a call" in facts and "seed 3" in facts
  # The last draft but one, by the slider.
  slider = page.get_by_label("Network call")
  slider.fill("0")
  assert page.locator(".masked").count() > 8


@pytest.mark.all
def test_gaps_are_filled_and_markup_is_text(server, visit):
  page = visit(server.url)
  say(page, f"{MARKUP[:9]}[___*3]{MARKUP[9:13]}[___]", gap=2, seed=5)
  page.wait_for_selector(_DONE)
  template = f"{MARKUP[:9]}[MASK*3]{MARKUP[9:13]}[MASK*2]"
  body = {"model": servers.NAME, "infill": template, "seed": 5}
  answer = servers.send(f"{server.url}/v1/completions", body)[2]
  assert canvas(page).text_content() == answer["choices"][0]["text"]
  assert page.locator(".canvas .given").first.text_content() == MARKUP[:9]
  assert not page.locator(".said, .masked, img").count()


def test_the_page_allows_its_own_script_alone(server):
  _, headers, text = servers.send(server.url)
  policy = headers["content-security-policy"]
  assert "unsafe" not in policy and "default-src 'none'" in policy
  assert text.count("<script>") == text.count("<style>") == 1
  assert not re.search(r"""https?:(?!//www\.w3\.org)|src=|\bon\w+=["']""", text)
  assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text)


@pytest.mark.all
def test_the_browser_runs_no_other_script(server, visit):
  page = visit(server.url)
  page.evaluate(
    """() => {
    const script = document.createElement("script");
    script.textContent = "document.title = 'run'";
    document.body.append(script);
  }"""
  )
  assert page.title() != "run"
  assert len(page.wrong) == 1 and "Content Security Policy" in page.wrong.pop()


@pytest.mark.all
def test_markup_of_a_template_is_text(server, visit):
  page = visit(server.url)
  say(page, MARKUP[:21] + "[___*2]" + MARKUP[21:40])
  page.wait_for_selector(_DONE)
  text = canvas(page).text_content()
  assert text.startswith(MARKUP[:21]) and text.endswith(MARKUP[21:40])
  assert not page.locator("#talk img, #talk b").count()


@pytest.mark.all
@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stopping_frees_the_slot(server, slowed, visit, way):
  page = visit(slowed(server).url)
  before = server.engine.stats.finished.get("cancelled", 0)
  set_up(page, max_tokens=24, seed=1)
  page.fill("#prompt", "Go")
  page.dblclick("#send")  # the second of two taps is no wish to stop
  page.wait_for_timeout(450)
  assert page.locator(_DONE).count() == 0
  if way == "Escape":
    page.keyboard.press("Escape")
  else:
    page.get_by_role("button", name="Stop").click()
  page.wait_for_selector(_DONE)
  assert not page.locator(".error").count()
  assert page.locator(".masked").count() > 0
  assert page.locator("#status").text_content() == "Stopped."
  until(lambda: server.engine.stats.running == 0)
  assert server.engine.stats.finished["cancelled"] == before + 1
  page.get_by_role("button", name="New").click()
  say(page, "On", max_tokens=4)
  page.wait_for_selector(_DONE)
  assert page.locator(".turn").count() == 1


def until(holds, seconds: float = 10.0):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.all
def test_a_conversation_is_sent_whole(roomy, visit):
  page = visit(roomy.url)
  say(page, "A", max_tokens=4, seed=2)
  page.wait_for_selector(_DONE)
  first = canvas(page).text_content()
  with page.expect_request("**/v1/chat/completions") as asked:
    say(page, "B")
  said = [m["content"] for m in asked.value.post_data_json["messages"]]
  assert said == (["A", first, "B"] if first else ["B"])
  page.wait_for_selector(".turn:nth-child(2) .canvas[aria-busy=false]")
  page.get_by_role("button", name="New").click()
  with page.expect_request("**/v1/chat/completions") as asked:
    say(page, "C")
  assert len(asked.value.post_data_json["messages"]) == 1
  page.wait_for_selector(_DONE)


@pytest.mark.all
def test_errors_are_sentences_and_the_text_is_not_lost(server, visit):
  page = visit(server.url)
  say(page, "A text", max_tokens=400)
  told = page.get_by_role("alert")
  told.wait_for()
  assert re.match(r"[A-Z].*400.*\.$", told.text_content())
  assert page.input_value("#prompt") == "A text"
  assert page.get_attribute("[name=max_tokens]", "aria-invalid") == "true"
  # What is no number never leaves the page.
  with page.expect_request("**/v1/**") as asked:
    say(page, "A text", temperature=-1, max_tokens=4)
    say(page, "A text", temperature=0.5)
  assert asked.value.post_data_json["temperature"] == 0.5
  page.wait_for_selector(_DONE)
  page.context.set_offline(True)
  say(page, "A text")
  page.get_by_text("The server cannot be reached").wait_for()


@pytest.mark.all
def test_a_server_that_starts_and_wants_a_key(tiny_run, visit):
  running = servers.Running(tiny_run, key=servers.KEY)
  try:
    page = visit(running.url)
    page.get_by_text("being made ready").wait_for()
    assert page.is_disabled("#send")
    running.start()
    page.get_by_text("wants an API key").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.fill("#key", servers.KEY)
    page.keyboard.press("Enter")
    say(page, "Hm", max_tokens=2)
    page.wait_for_selector(_DONE)
  finally:
    running.stop()


@pytest.mark.all
def test_without_a_chat_template_texts_are_continued(tmp_path, visit):
  run = runs.run(tmp_path / "run")
  run.start()
  running = servers.Running(run).start()
  try:
    page = visit(running.url)
    say(page, "ROMEO:", max_tokens=8, seed=1)
    page.wait_for_selector(_DONE)
    body = {
      "model": servers.NAME,
      "prompt": "ROMEO:",
      "max_tokens": 8,
      "seed": 1,
    }
    answer = servers.send(f"{running.url}/v1/completions", body)[2]
    text = "ROMEO:" + answer["choices"][0]["text"]
    assert canvas(page).text_content() == text
    assert page.locator(".given").text_content() == "ROMEO:"
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#prompt") == text
  finally:
    running.stop()


@pytest.mark.all
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(roomy, slowed, visit, scheme):
  size = {"width": 320, "height": 568}
  page = visit(
    slowed(roomy).url, viewport=size, color_scheme=scheme, has_touch=True
  )
  width = lambda: page.evaluate("document.documentElement.scrollWidth")
  say(page, "W" * 36, max_tokens=8)
  page.wait_for_selector(".shown")
  assert width() == 320
  page.wait_for_selector(_DONE)
  page.get_by_role("button", name="Settings").click()
  assert width() == 320
  for button in page.locator("button:visible").all():
    assert button.bounding_box()["height"] >= 44
  paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
  dark = int(re.search(r"\d+", paper)[0]) < 128
  assert dark == (scheme == "dark")
  assert page.evaluate(_CONTRAST) >= 4.5


@pytest.mark.all
def test_without_motion_text_grows_from_the_left(server, slowed, visit):
  page = visit(slowed(server).url, reduced_motion="reduce")
  page.evaluate(
    """() => {
    window.holes = 0;
    new MutationObserver(() => {
      const canvas = document.querySelector(".canvas[aria-busy=true]");
      holes += Boolean(canvas?.querySelector(".masked ~ .shown"));
      holes += Boolean(canvas?.querySelector(".fresh"));
    }).observe(document.getElementById("talk"), {subtree: true, childList: true,
      attributes: true});
  }"""
  )
  say(page, "Go", max_tokens=24)
  page.wait_for_selector(_DONE)
  assert page.evaluate("holes") == 0


@pytest.mark.all
def test_the_keyboard_is_enough(server, visit):
  page = visit(server.url)
  page.wait_for_selector("#send:enabled")
  page.keyboard.type("A")
  page.keyboard.press("Shift+Enter")
  page.keyboard.type("B")
  page.keyboard.press("Enter")
  page.wait_for_selector(_DONE)
  assert page.locator(".said").text_content() == "A\nB"
  canvas(page).focus()
  page.keyboard.press("ArrowRight")
  page.keyboard.press("ArrowRight")
  assert re.search(
    r"confidence \d+.* %, by call \d+", page.locator("#status").text_content()
  )
  assert page.locator("#tip").is_visible()
  page.keyboard.press("Escape")
  assert page.locator("#tip").is_hidden()
