"""How far a long command is, on standard error."""

import sys

from tqdm import tqdm


def progress_bar(
  total: int | None,
  unit: str,
  *,
  done: int = 0,
  text: str | None = None,
  shown: bool = True,
  scaled: bool = False,
) -> tqdm:
  """Returns a bar that `update(n)` moves; a context that closes itself.

  A terminal gets a smooth bar, a log file a line now and then.

  Args:
    total: how many units there are; None if that is not known.
    unit: the name of one.
    done: units that were there before.
    text: what stands before the bar.
    shown: False for a bar that prints nothing.
    scaled: whether numbers are shortened (1.2M).
  """
  return tqdm(
    total=total,
    initial=done,
    desc=text,
    unit=unit,
    unit_scale=scaled,
    disable=not shown,
    dynamic_ncols=True,
    file=sys.stderr,
    mininterval=0.1 if sys.stderr.isatty() else 15.0,
  )
