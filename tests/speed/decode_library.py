"""The library's sampler, engine and server; parameters and prompts of the other program.

python tests/speed/decode_library.py EXCHANGE.npz ROWS whole|tiny float32|bfloat16
"""

from concurrent import futures
import dataclasses
import functools
import http.client
import json
import pathlib
import queue
import sys
import tempfile
import threading

from decode_worker import serve
import jax
import numpy as np

from dllm_jax import serving
from dllm_jax.config import config as configs
from dllm_jax.run.run import Run
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.http import Server
from dllm_jax.serving.requests import Committed, Finished, Request

CONFIG = pathlib.Path(__file__).parents[2] / "configs/benchmark_sampler.py"
TINY = {
  "data": {"tokenizer": "numbers:64", "length": 96},
  "model": {"width": 32, "layers": 2, "heads": 2, "mlp_dim": 64, "unroll": 2},
}


def streamed(address, template) -> list[int]:
  """Returns the ids of an answer that is read as a stream of text."""
  given = template.index(None)
  body = {
    "model": "benchmark",
    "prompt": template[:given],
    "max_tokens": len(template) - given,
    "stream": True,
  }
  connection, text = http.client.HTTPConnection(*address), ""
  headers = {"Content-Type": "application/json"}
  connection.request("POST", "/v1/completions", json.dumps(body), headers)
  for line in connection.getresponse():
    if line.startswith(b"data: {"):
      text += json.loads(line[6:])["choices"][0]["text"]
  connection.close()
  return [int(word) for word in text.split()]


def main(path: str, rows: int, size: str, dtype: str) -> None:
  """Writes the network and prompts to the file, then serves."""
  with tempfile.TemporaryDirectory() as directory:
    resolved = configs.load(str(CONFIG))
    for section, fields in TINY.items() if size == "tiny" else ():
      resolved[section].update(fields)
    resolved.model.update(dtype=dtype, param_dtype=dtype)
    run = Run.create(resolved, pathlib.Path(directory) / "run")
    run.start()
  length, sampler = run.config.data.length, run.config.sampler
  mask_id = run.objective.mask_id
  prompts = np.random.default_rng(0).integers(0, mask_id, (rows, length // 3))
  params = run.state.params["model"]
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  np.savez(
    path,
    prompts=prompts,
    mask_id=mask_id,
    length=length,
    block_length=sampler.block_length,
    steps=sampler.steps,
    eps=run.network.norm_eps,
    theta=run.network.rope_theta,
    dtype=dtype,
    **{
      jax.tree_util.keystr(k, simple=True, separator="/"): v.astype("float32")
      for k, v in flat
    },
  )
  templates = [
    [*prompt.tolist(), *[None] * (length - len(prompt))] for prompt in prompts
  ]

  @functools.cache
  def engine():
    dual = dataclasses.replace(sampler, cache="dual")
    made = Engine.of(run, sampler=dual, slots=rows, queue=rows, length=length)
    made.start()
    return made

  @functools.cache
  def address():
    limits = serving.Limits()
    model = serving.Model.of(
      run, engine(), name="benchmark", sampler=sampler, limits=limits
    )
    app = serving.application(model)
    server = Server(app, host="127.0.0.1", port=0, limits=limits)
    threading.Thread(target=server.run, daemon=True).start()
    server.listening.wait()
    return server.address

  def over_http(count):
    where, some = address(), templates[:count]
    with futures.ThreadPoolExecutor(count) as clients:
      found = clients.map(functools.partial(streamed, where), some)
      new = np.asarray(list(found), np.int32)
    return np.concatenate([prompts[:count], new], axis=1)

  def served(count):
    canvases, over = np.zeros((count, length), np.int32), queue.Queue()

    def listener(row):
      canvases[row, : prompts.shape[1]] = prompts[row]

      def hear(event):
        if isinstance(event, Committed):
          canvases[row, list(event.slots)] = event.tokens
        elif isinstance(event, Finished):
          over.put(event)

      return hear

    for row in range(count):
      request = Request(template=tuple(templates[row]), number=row)
      engine().submit(request, listener(row))
    for _ in range(count):
      over.get()
    return canvases

  def generate(kind, rows):
    if kind == "engine":
      return served(rows)
    if kind == "served":
      return over_http(rows)
    sampled = run.sample_rows(
      templates[:rows],
      length=length,
      sampler=dataclasses.replace(sampler, cache=kind),
      seed=0,
    )
    return np.asarray(sampled.generation.tokens)

  serve(generate)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
