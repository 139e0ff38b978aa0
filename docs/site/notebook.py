"""Notebooks as pages of the site: text, code, and the outputs that are stored."""

import base64
import json
import pathlib
import posixpath
import re

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb")
)


def written(path: pathlib.Path, uri: str) -> dict[str, str | bytes]:
  """Returns a notebook's page and its pictures, by where the site has them."""
  notebook = json.loads(path.read_text(encoding="utf-8"))
  parts, pictures = [], {}
  for number, cell in enumerate(notebook["cells"]):
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
      parts.append(text)
      continue
    parts.append(f"```python\n{text}\n```")
    for k, output in enumerate(cell["outputs"]):
      name = f"{path.stem}-{number}-{k}.png"
      shown, picture = _shown(output, name)
      parts += [f'<div class="notebook-output" markdown>\n\n{shown}\n\n</div>']
      if picture is not None:
        pictures[posixpath.join(posixpath.dirname(uri), name)] = picture
  note = f"*This page is the notebook `notebooks/{path.name}`, as it ran.*"
  parts.insert(1, note)
  return {uri: "\n\n".join(parts), **pictures}


def _shown(output: dict, name: str) -> tuple[str, bytes | None]:
  """Returns an output as markdown, and the picture that it shows."""
  if output["output_type"] == "stream":
    return _fence("".join(output["text"])), None
  data = {kind: "".join(text) for kind, text in output["data"].items()}
  if "image/png" in data:
    return f"![Output]({name})", base64.b64decode(data["image/png"])
  for kind in ("image/svg+xml", "text/html"):
    if kind in data:
      # Blank lines would end the block of HTML.
      return re.sub(r"\n\s*\n", "\n", data[kind]), None
  return _fence(data["text/plain"]), None


def _fence(text: str) -> str:
  return f"````text\n{text.rstrip()}\n````"
