"""DiffusionGemma's loss against arrays of gemma's adapter's formulas.

The network is transformers', the losses are after google-deepmind/gemma's
`SFTDiffusion`, checked against it where the arrays were made.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Batch, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma, OneCanvas
from tests import golden_cases, quick
from tests.sampling import published

NAME = "diffusion_gemma_loss"


class Adapted(DiffusionGemma):
  """The objective on the adapter's rows, which are padded in their middle.

  The step from a padded prompt to its answer is left out there; here prompts are
  not padded, and the step is there.
  """

  def next_tokens(self, batch):
    begins = batch.loss_mask & ~jnp.pad(
      batch.loss_mask[:, :-1], ((0, 0), (1, 0))
    )
    padded = batch.cond[:, None] > 0
    return super().next_tokens(batch) & ~(begins & padded)


@functools.cache
def case():
  return golden_cases.load(NAME)


def rows():
  """Returns the batch and what is drawn of it, each prompt against its answer."""
  a, config = case().arrays, case().config
  prompt, x0, counts = a["prompt"], a["x0"], a["canvas_mask"]
  canvas, wide = config["hf_config"]["canvas_length"], prompt.shape[1]
  given = a["encoder_target_mask"]
  length = wide + x0.shape[1]
  fields = {
    name: np.zeros((len(x0), length), np.int32)
    for name in ("tokens", "answer", "used", "noise")
  }
  padded = np.zeros(len(x0), np.int32)
  share = np.zeros(len(x0), np.float32)
  for b in range(len(x0)):
    size = int((prompt[b] != 0).sum())
    padded[b] = size < wide
    end, answer = size + int(counts[b].sum()), int(counts[b].sum())
    fields["tokens"][b, :size] = prompt[b, :size]
    fields["tokens"][b, size:end] = x0[b, :answer]
    fields["answer"][b, size:end] = 1
    fields["used"][b, :end] = 1
    replaced = a["keep_uniform"][b] >= 1.0 - a["time"][b]
    noise = np.where(replaced, a["noise_ids"][b], -1)
    fields["noise"][b] = -1
    fields["noise"][b, size:end] = noise[:answer]
    if answer:
      share[b] = (a["selected_canvas"][b] + 0.5) * canvas / answer
  assert given.shape == fields["tokens"].shape
  slots = np.broadcast_to(np.arange(length, dtype=np.int32), given.shape)
  batch = Batch(
    tokens=fields["tokens"],
    loss_mask=fields["answer"] > 0,
    segment_ids=fields["used"],
    positions=slots,
    cond=padded,
  )
  drawn = OneCanvas(
    t=a["time"][:, None],
    z=np.where(fields["noise"] >= 0, fields["noise"], fields["tokens"]),
    noise=fields["noise"],
    canvas=share,
    conditioned=a["do_self_cond"],
  )
  return jax.tree.map(jnp.asarray, (batch, drawn))


@functools.cache
def computed(without, text_gradient):
  """Returns ((total, (loss, logits of the second pass)), gradient)."""
  model, config = published.model(NAME), case().config
  objective = Adapted(
    vocab_size=config["hf_config"]["text_config"]["vocab_size"],
    canvas=config["hf_config"]["canvas_length"],
    without=without,
    text_gradient=text_gradient,
    autoregressive_weight=config["encoder_loss_weight"],
  )
  batch, drawn = rows()

  @jax.jit
  def run(params):
    def value(params):
      said = []  # the causal pass, the canvas's first, its second

      def denoise(inputs):
        # Labels mark the padded prompts here; the network has none.
        inputs = inputs.replace(cond=None)
        out = model.denoiser.apply(params, inputs, None)[0]
        said.append(reduce(lambda logits: logits, out))
        return out

      loss = objective.loss(Process(), denoise, drawn, batch, step=jnp.int32(0))
      return loss.total / loss.weight, (loss, said[-1])

    return jax.value_and_grad(value, has_aux=True)(params)

  return run(model.params)


@pytest.mark.parametrize("without", [quick.long("zero"), quick.long("mean")])
def test_losses_and_logits_are_those_of_the_adapter(without):
  a = case().arrays
  (total, (loss, logits)), _ = computed(without, True)
  np.testing.assert_allclose(total, a[f"{without}_total_loss"], rtol=1e-5)
  diffusion = a[f"{without}_diffusion_loss"].mean()
  np.testing.assert_allclose(loss.metrics["canvas_nats"], diffusion, rtol=1e-5)
  np.testing.assert_allclose(
    loss.metrics["next_token_nats"], a["encoder_loss"].mean(), rtol=1e-5
  )
  some = a["canvas_mask"].any(axis=1)
  want = a[f"{without}_logits"][some]
  np.testing.assert_allclose(logits[some], want, atol=1e-4)


@pytest.mark.parametrize(
  ("without", "text_gradient"),
  [
    quick.long("zero", True),
    quick.long("zero", False),
    quick.long("mean", True),
    quick.long("mean", False),
  ],
)
def test_gradients_are_those_of_the_adapter(without, text_gradient):
  a, suffix = case().arrays, "" if text_gradient else "_stop"
  _, gradient = computed(without, text_gradient)
  found = named(gradient)
  for name, value in found.items():
    want = a[f"{without}_grad_{name}{suffix}"]
    value = np.asarray(value)[: len(want)]
    np.testing.assert_allclose(value, want, atol=1e-5, rtol=0, err_msg=name)


def named(gradient):
  """Returns the recorded parameters' gradients by their recorded names."""
  first = gradient["period"]["run0"]["layers"]
  return {
    "final_norm": gradient["final_norm"]["scale"],
    "pre_norm": gradient["self_conditioning"]["norm"]["scale"],
    "layer0_input_layernorm": first["attention_norm"]["scale"][0],
    "layer0_router_scale": first["routed"]["router"]["scale"][0],
    "layer1_k_norm": first["attention"]["k_norm"]["scale"][1],
    "embed_rows": gradient["embed"]["embedding"],
  }
