"""The HTML page that plays a trace; `@DATA@` stands for its JSON.

One file without any request to a network: style and script are inline. The data
are `title`, `text` (token id to string) and `samples`, each with its `initial`
tokens (null is a mask), `fixed` flags and `steps`: lists of
`[slot, token, confidence]`.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Unmasking</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --ink: #1c1b19; --soft: #67645d; --line: #dcd8ce;
  --hidden: #e4e0d6; --panel: #ffffff; --light: .87; --accent: #2b5c8a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161618; --ink: #eeece6; --soft: #a19d94; --line: #38373a;
    --hidden: #37363b; --panel: #1f1f22; --light: .42; --accent: #8fbbe6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 8.5rem; max-width: 60rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
header { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem;
  align-items: baseline; margin-bottom: 1rem; }
h1 { font-size: 1.25rem; margin: 0; flex: 1 1 auto; overflow-wrap: anywhere; }
select, button { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .6rem; }
button { min-width: 2.75rem; min-height: 2.5rem; cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#canvas {
  font: .95rem/1.75 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); border: 1px solid var(--line);
  border-radius: .6rem; padding: 1rem; min-height: 8rem;
}
#canvas span { border-radius: .15rem; padding: .1em 0; }
#canvas i { font-style: normal; opacity: .35; }
.given { font-weight: 700; }
.hidden { color: transparent; background: var(--hidden);
  box-shadow: inset 0 0 0 1px var(--panel); user-select: none; }
.hidden i { visibility: hidden; }
.shown { background: oklch(var(--light) .1 calc(45 + 195 * var(--c))); }
.fresh { box-shadow: 0 0 0 2px var(--ink); position: relative; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: .8rem;
  font-size: .85rem; color: var(--soft); align-items: center; }
.legend b { display: inline-block; width: 1.1em; height: 1.1em; color: var(--ink);
  border-radius: .15rem; vertical-align: -.2em; margin-right: .35em; }
.legend .fresh { width: .9em; height: .9em; margin: 0 .55em 0 .15em;
  vertical-align: -.1em; }
.legend .ramp { width: 6.5em; margin: 0 .35em; background: linear-gradient(90deg,
  oklch(var(--light) .1 45), oklch(var(--light) .1 94), oklch(var(--light) .1 142),
  oklch(var(--light) .1 191), oklch(var(--light) .1 240)); }
#bar { position: fixed; inset: auto 0 0 0; background: var(--panel);
  border-top: 1px solid var(--line); padding: .6rem 1rem; }
#bar > div { max-width: 58rem; margin: 0 auto; display: flex; flex-wrap: wrap;
  gap: .5rem .6rem; align-items: center; }
#slider { flex: 1 1 14rem; min-width: 0; accent-color: var(--accent);
  height: 2rem; }
#count { font-variant-numeric: tabular-nums; font-size: .9rem;
  flex: 0 0 auto; min-width: 14rem; }
#tip { position: fixed; z-index: 2; max-width: min(20rem, 92vw); display: none;
  background: var(--ink); color: var(--paper); border-radius: .4rem;
  padding: .4rem .65rem; font-size: .85rem; pointer-events: none;
  white-space: pre-line; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  body { padding-top: 1rem; padding-left: .6rem; padding-right: .6rem; }
  #canvas { font-size: .85rem; padding: .7rem; }
  #slider { flex-basis: 100%; order: -1; }
  #count { min-width: 0; flex: 1 1 auto; text-align: right; }
}
</style>
</head>
<body>
<header>
  <h1 id="title"></h1>
  <label id="which">Sample <select id="sample"></select></label>
</header>
<main>
  <div id="canvas" aria-label="the text so far"></div>
  <div class="legend">
    <span>confidence: low<b class="ramp"></b>high</span>
    <span><b class="hidden"></b>not yet revealed</span>
    <span><b class="fresh"></b>revealed at this step</span>
    <span><strong>bold</strong>: given</span>
  </div>
</main>
<div id="bar"><div>
  <button id="back" aria-label="one step back" title="one step back (left)"
    >&#x2039;</button>
  <button id="play" title="play or pause (space)">Play</button>
  <button id="next" aria-label="one step on" title="one step on (right)"
    >&#x203a;</button>
  <input id="slider" type="range" min="0" value="0" aria-label="step">
  <span id="count" role="status"></span>
</div></div>
<div id="tip" role="tooltip"></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const link = new URLSearchParams(location.hash.slice(1));
let film, spans, slots, step = 0, timer = null;

const textOf = (token) => {
  const text = data.text[token];
  return text === "" ? "\\u27e8" + token + "\\u27e9" : text;
};

function stateAt(n) {
  const state = film.initial.map((token) => ({token, c: 1, step: 0}));
  film.steps.slice(0, n).forEach((events, i) => {
    for (const [slot, token, c] of events) state[slot] = {token, c, step: i + 1};
  });
  return state;
}

function fill(span, text) {
  span.textContent = "";
  text.split("\\n").forEach((line, i) => {
    if (i) {
      const mark = document.createElement("i");
      mark.textContent = "\\u21b5";
      span.append(mark, "\\n");
    }
    span.append(line);
  });
}

function load(index) {
  film = data.samples[index];
  step = 0;
  at("slider").max = film.steps.length;
  const last = stateAt(film.steps.length);
  at("canvas").textContent = "";
  // A hidden slot takes the room of its last token, so that the text stands still.
  spans = last.map(({token}, slot) => {
    const span = document.createElement("span");
    span.dataset.slot = slot;
    span.room = token === null ? "\\u00b7" : textOf(token);
    at("canvas").append(span);
    return span;
  });
}

function show(n) {
  step = Math.max(0, Math.min(n, film.steps.length));
  slots = stateAt(step);
  let open = 0;
  slots.forEach(({token, c, step: since}, i) => {
    const span = spans[i], hidden = token === null;
    open += hidden;
    const text = hidden ? span.room : textOf(token);
    if (span.text !== text) { fill(span, text); span.text = text; }
    const kind = film.fixed[i] ? "given" : hidden ? "hidden" : "shown";
    span.className = kind + (!hidden && since && since === step ? " fresh" : "");
    span.style.setProperty("--c", c);
  });
  at("slider").value = step;
  at("count").textContent = "step " + step + " of " + film.steps.length +
    " \\u00b7 " + (slots.length - open) + " of " + slots.length + " tokens";
  at("tip").style.display = "none";
}

function stop() {
  clearInterval(timer);
  timer = null;
  at("play").textContent = "Play";
}

function play() {
  if (step >= film.steps.length) show(0);
  const pause = Math.max(40, Math.min(600, 9000 / film.steps.length));
  timer = setInterval(() => {
    show(step + 1);
    if (step >= film.steps.length) stop();
  }, pause);
  at("play").textContent = "Pause";
}

const toggle = () => (timer === null ? play() : stop());
const seek = (n) => { stop(); show(n); };

function describe(event) {
  const span = event.target.closest("#canvas span");
  const tip = at("tip");
  if (!span) { tip.style.display = "none"; return; }
  const {token, c, step: since} = slots[span.dataset.slot];
  const name = token === null ? "not yet revealed"
    : JSON.stringify(textOf(token)) + " (token " + token + ")";
  const how = film.fixed[span.dataset.slot] ? "given"
    : token === null || !since ? "slot " + span.dataset.slot
    : "confidence " + (100 * c).toFixed(1) + " %\\nrevealed at step " + since;
  tip.textContent = name + "\\n" + how;
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 12, innerWidth - box.width - 8);
  const above = event.clientY - box.height - 12;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above > 4 ? above : event.clientY + 18) + "px";
}

document.title = at("title").textContent = data.title;
data.samples.forEach((_, i) => at("sample").add(new Option(i + 1, i)));
at("which").hidden = data.samples.length < 2;
at("sample").onchange = (e) => { stop(); load(+e.target.value); show(0); play(); };
at("play").onclick = toggle;
at("back").onclick = () => seek(step - 1);
at("next").onclick = () => seek(step + 1);
at("slider").oninput = (e) => seek(+e.target.value);
at("canvas").onpointermove = at("canvas").onpointerdown = describe;
at("canvas").onpointerleave = () => { at("tip").style.display = "none"; };
document.onkeydown = (e) => {
  if (e.target.tagName === "SELECT" || e.ctrlKey || e.metaKey || e.altKey) return;
  const moves = {ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0,
    End: film.steps.length};
  if (e.key in moves) { seek(moves[e.key]); e.preventDefault(); }
  else if (e.key === " " && e.target.tagName !== "BUTTON") {
    toggle();
    e.preventDefault();
  }
};

const chosen = Math.min(+(link.get("sample") || 1), data.samples.length) - 1;
at("sample").value = chosen;
load(chosen);
show(+(link.get("step") || 0));
if (!link.has("step") &&
    !matchMedia("(prefers-reduced-motion: reduce)").matches) play();
</script>
</body>
</html>
"""
