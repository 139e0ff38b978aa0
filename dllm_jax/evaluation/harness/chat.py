"""Contexts of the harness that are conversations, by the run's own template."""

from typing import Any

from dllm_jax.evaluation.likelihood import contexts
from dllm_jax.run.run import Run


class Chats:
  """What a model class of the harness has for `--apply_chat_template`."""

  _run: Run
  _template: dict[str, Any]
  """What the template is told."""
  _rendered: bool
  """Whether contexts have come from a template."""

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Returns the chat template of the run's tokenizer, for the record.

    Args:
      chat_template: a name chooses among several (`--apply_chat_template`).

    Raises:
      ValueError: there is none of that name.
    """
    templates = getattr(self._run.tokenizer, "chat_templates", {})
    if isinstance(chat_template, str) and len(templates) > 1:
      self._template["template"] = chat_template
    name = self._template.get("template", "default")
    if templates and name not in templates:
      raise ValueError(
        f"there is no chat template {name!r}; legal: {', '.join(templates)}"
      )
    return templates.get(name, "")

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """Returns a conversation as text; from now on all contexts are of this kind.

    Without an answer to come (`gen_prefix`) the last message is the answer's
    beginning: its turn is left open.

    Raises:
      ValueError: the tokenizer has no chat template, or it refuses the messages.
    """
    tokenizer = self._run.tokenizer
    if not self.chat_template():
      raise ValueError(
        "the tokenizer of this run has no chat template: leave out "
        "--apply_chat_template"
      )
    self._rendered = True
    return contexts.rendered(
      tokenizer, chat_history, add_generation_prompt, **self._template
    )
