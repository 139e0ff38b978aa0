"""What the site has beside the pages of docs/: made from code, at every build.

- Pages of source code, for links to a line: `[code](../dllm_jax/FILE.py)`, whose
  text stands once in that file, leads to its line.
- The notebooks, the reference of each room's public names, the findings.
- MathJax, on pages with formulas, from the package that carries it.
"""

import importlib.metadata
import logging
import pathlib
import posixpath
import re

from mkdocs.structure.files import File
import notebook
import reference

ROOT = pathlib.Path(__file__).parents[2]
MATHJAX = "assets/mathjax.js"
WORKER = "assets/iframe-worker.js"  # by this name the theme takes it
LOG = logging.getLogger("mkdocs.plugins.dllm_jax")
LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(`{3,}).*?^\1", re.MULTILINE | re.DOTALL)


def on_config(config):
  """Adds what no file of docs/ names to the navigation."""
  named = set(_leaves(config.nav))
  docs = ROOT / "docs"
  pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*.md")}
  sections = {
    key: pages for entry in config.nav for key, pages in entry.items()
  }
  sections["Guides"] += sorted(pages - named)
  sections["Course"] += [_place(path) for path in notebook.NOTEBOOKS]
  sections["Reference"] += ["reference/README.md", *reference.pages()]
  return config


def on_files(files, config):
  """Adds the generated pages, and every file of the repository linked to."""
  add = lambda uri, text: files.append(
    File.generated(config, uri, content=text)
  )
  add("assets/site.css", (ROOT / "docs/site/site.css").read_text())
  add(WORKER, (ROOT / "docs/site/worker.js").read_text())
  add(MATHJAX, _mathjax().read_text(encoding="utf-8"))
  for uri, text in {**reference.written(), "findings.md": findings()}.items():
    add(uri, text)
  for path in notebook.NOTEBOOKS:
    for uri, content in notebook.written(path, _place(path)).items():
      add(uri, content)
  todo = [f.content_string for f in files.documentation_pages()]
  here = [f.src_uri for f in files.documentation_pages()]
  done = {f.src_uri for f in files}  # pictures and tables too
  while todo:
    text, page = todo.pop(), here.pop()
    for found in LINK.finditer(FENCE.sub("", text)):
      path = _target(page, found[2])
      if path is None or _place(path) in done or not path.is_file():
        continue
      done.add(_place(path))
      if path.suffix == ".md":
        todo.append(path.read_text(encoding="utf-8"))
        here.append(_place(path))
        add(_place(path), todo[-1])
      else:
        add(_place(path), _source(path))
  return files


def on_page_markdown(markdown, *, page, **_):
  """Turns links to files of the repository into links to their pages."""
  uri = page.file.src_uri

  def moved(found):
    text, target, anchor = found[1], found[2], found[3] or ""
    path = _target(uri, target)
    if path is None or not path.is_file():
      return found[0]
    if is_code(text, path):
      number = line(path, text.strip("`"))
      if number is None:
        LOG.warning("%s: %s does not stand once in %s", uri, text, path.name)
      anchor = f"#__codelineno-0-{number}"
    place = posixpath.relpath(_place(path), posixpath.dirname(uri) or ".")
    return f"[{text}]({place}{anchor})"

  parts, end = [], 0
  for fence in FENCE.finditer(markdown):
    parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
    end = fence.end()
  return "".join([*parts, LINK.sub(moved, markdown[end:])])


def on_post_page(output, *, page, **_):
  """Adds MathJax where there are formulas."""
  if 'class="arithmatex"' not in output:
    return output
  up = posixpath.relpath(MATHJAX, posixpath.dirname(page.file.dest_uri) or ".")
  scripts = (
    "<script>MathJax = {options: {enableMenu: false, processHtmlClass: "
    "'arithmatex', ignoreHtmlClass: '.*'}}</script>"
    f'<script defer src="{up}"></script>'
  )
  return output.replace("</head>", f"{scripts}</head>")


def is_code(text: str, path: pathlib.Path) -> bool:
  """Whether a link's text is a line of the file, and not its name."""
  named = path.as_posix().endswith(text.strip("`"))
  return path.suffix == ".py" and text.startswith("`") and not named


def line(path: pathlib.Path, code: str) -> int | None:
  """Returns the number of the line that holds some code, None if not one does.

  Spaces count nothing: a formula may lie over two lines.
  """
  squeeze = lambda text: re.sub(r"\s+", "", text)
  lines = path.read_text(encoding="utf-8").splitlines()
  whole = "".join(map(squeeze, lines))
  if whole.count(squeeze(code)) != 1:
    return None
  at, seen = whole.index(squeeze(code)), 0
  for number, text in enumerate(lines, start=1):
    seen += len(squeeze(text))
    if at < seen:
      return number
  return None


def findings() -> str:
  """Returns the page of findings: the head of each script."""
  parts = [
    "# Findings\n\nWhat other people's software did that we had not expected, on"
    " valid input, and what it means for you. Each is a script under `findings/`"
    " that installs the versions it names into a folder of its own, shows the"
    " behaviour, and fails once it has changed.\n"
  ]
  for path in sorted((ROOT / "findings").glob("*.sh")):
    title, body = head(path)
    link = f"[`bash findings/{path.name}`](../findings/{path.name})"
    parts.append(f"\n## {title}\n\n{body}\n\n{link}\n")
  return "".join(parts)


def head(path: pathlib.Path) -> tuple[str, str]:
  """Returns the first sentence of a script's head and the rest as paragraphs."""
  lines = []
  for text in path.read_text(encoding="utf-8").splitlines()[1:]:
    if not text.startswith("#"):
      break
    lines.append(text.removeprefix("#").strip())
  text = "\n".join(lines)
  title, _, body = text.partition("\n\n")
  title = " ".join(title.split())
  return title.rstrip("."), re.sub(r"(`[^`]*`)|([<>*_])", _literal, body)


def _literal(found: re.Match) -> str:
  """Returns code as it is, and a character without its meaning in Markdown."""
  return found[1] or f"\\{found[2]}"


def _leaves(nav) -> list[str]:
  """Returns the pages that a navigation names."""
  if isinstance(nav, str):
    return [nav]
  entries = nav.values() if isinstance(nav, dict) else nav
  return [leaf for entry in entries for leaf in _leaves(entry)]


def _target(uri: str, target: str) -> pathlib.Path | None:
  """Returns the repository's file that a page of the site links to."""
  if re.match(r"[a-z]+:", target):
    return None
  outside = uri.startswith("notebooks/") or (ROOT / uri).is_file()
  home = ROOT if outside else ROOT / "docs"
  path = (home / posixpath.dirname(uri) / target).resolve()
  return path if path.is_relative_to(ROOT) else None


def _place(path: pathlib.Path) -> str:
  """Returns where the site has a file of the repository."""
  own = path.relative_to(ROOT)
  if own.parts[0] == "docs":
    return own.relative_to("docs").as_posix()
  if own.suffix == ".ipynb":
    return own.with_suffix(".md").as_posix()
  if own.suffix == ".md":
    return own.as_posix()
  return f"code/{own.as_posix()}.md"


def _source(path: pathlib.Path) -> str:
  """Returns a page that shows a file with its lines numbered."""
  language = {".py": "python", ".sh": "bash", ".yaml": "yaml"}
  text = path.read_text(encoding="utf-8")
  name = path.relative_to(ROOT).as_posix()
  return (
    "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
    f"# {name}\n\n`````{language.get(path.suffix, 'text')} linenums=\"1\"\n"
    f"{text}\n`````\n"
  )


def _mathjax() -> pathlib.Path:
  """Returns MathJax in one file, with its output as SVG: no fonts to fetch."""
  files = importlib.metadata.files("django-static-mathjax")
  [found] = [f for f in files if f.match("es5/tex-svg.js")]
  return pathlib.Path(found.locate())
