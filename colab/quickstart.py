# ---
# jupyter:
#   accelerator: GPU
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Low-rank adaptation in JAX
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-jax/lowrank_jax/blob/main/colab/quickstart.ipynb)
#
# This notebook fine-tunes all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters, to tell the sentiment of tweets, with
# [LaMDA](https://arxiv.org/abs/2406.12832) on its linear layers. Then it merges the adapter, writes it in PEFT's file format, and
# runs several adapters in one batch. Weights and data come from the Python package index; no account is needed. It takes a few
# minutes on a CPU and less on a GPU or a TPU.
#
# ## Choosing a runtime
#
# *Runtime → Change runtime type → Hardware accelerator* offers a CPU, GPUs (such as the T4) and TPUs (such as the v5e-1). Nothing
# below changes with the choice: the install cell takes the JAX that fits, and the same code is compiled for whatever is there.
# Change the runtime before you run anything, because a new runtime starts empty. Three things are worth knowing on a TPU:
#
# - The first step of every shape is compiled, which takes longer than on a GPU; the batches below come in a few widths only, so
#   this happens a few times.
# - A TPU multiplies float32 matrices in bfloat16 passes by default. With `config.model.dtype = "bfloat16"` the activations are
#   bfloat16 too, and faster.
# - A runtime with several chips shards the base with `config.mesh.fsdp = jax.device_count()`; adapters, gradients and optimizer
#   state follow their weights.

# %% [markdown]
# ## Installing
#
# The shell looks for an NVIDIA driver, then for the device files of a TPU, and installs the matching JAX along with the library.

# %% language="bash"
# extra=
# if command -v nvidia-smi > /dev/null; then extra=cuda; elif ls /dev/accel* /dev/vfio/[0-9]* > /dev/null 2>&1; then extra=tpu; fi
# pip install -q "lowrank_jax[$extra] @ git+https://github.com/lowrank-jax/lowrank_jax"

# %% [markdown]
# `lowrank_jax` is the library: it works on any Linen or NNX model. `train` and `configs` are its training program and its
# experiments, which run from a command line as well as from here.

# %%
import json
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lowrank_jax as lr
import train.job
import train.loop
from configs import minilm_tweets_lamda
from lowrank_jax import peft
from lowrank_jax.checkpoint import load_adapter
from train.metrics_log import read

# %% [markdown]
# ## Devices
#
# JAX lists what it found. If you chose an accelerator and see only a CPU here, restart the session (*Runtime → Restart session*):
# JAX was imported before the install cell had finished.

# %%
for device in jax.devices():
    print(device.platform, device.device_kind)

# %% [markdown]
# ## A pretrained model and its plan
#
# An experiment is a configuration. This one says: MiniLM, 12,000 of the tweets, LaMDA of rank 32 on the six linear weights of each
# layer, the classifier trained in full, 300 steps. Any field can be changed. `LOWRANK_JAX_TINY` is for the test that runs this
# notebook with toy weights in place of the real ones.

# %%
config = minilm_tweets_lamda.get_config()
steps = 100  # of the small adapters further below
if os.environ.get("LOWRANK_JAX_TINY"):
    config.adapter.rank, config.data.eval_limit = 4, 200
    config.steps, config.eval_every, config.checkpoint_every, steps = 6, 3, 3, 3

# %% [markdown]
# Loading fetches the model (84 MB) and the tweets (2 MB), checks their hashes, and tokenizes the text. The result holds plain
# things that you can use without `train`: a Linen module, a dict of parameters, a tokenizer, and data loaders.

# %%
job = train.job.load(config)
model, params, tokenizer = job.model, job.params, job.tokenizer
print(
    f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, {job.train.num_examples:,} tweets, labels {job.train.label_names}"
)

# %% [markdown]
# The plan is the table of what is adapted, how, and what it costs. It came from two rules of the configuration, each a regular
# expression over the paths of the weights with a method. With a model of your own it is one call: `lr.plan(params,
# {r".*/(query|value)": lr.lamda(rank=32), "classifier": lr.full()})`.

# %%
print(job.plan)

# %% [markdown]
# ## Adapters are values
#
# `lr.init` makes the adapter: a pytree beside the parameters, which stay as they are. `lr.linen.apply` runs the model with it. A
# fresh adapter changes nothing, so both outputs are the same up to rounding.

# %%
texts = ["what a lovely morning", "my flight is cancelled again", "the meeting is at ten"]


def encode(texts):
    """Token ids and their mask, both [batch, width]."""
    ids = [encoded.ids for encoded in tokenizer.encode_batch(texts, max_length=config.data.max_length)]
    tokens = np.full((len(ids), max(map(len, ids))), tokenizer.pad_id, np.int32)
    mask = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in ids])
    tokens[mask] = np.concatenate(ids)
    return tokens, mask


tokens, mask = encode(texts)
adapters = lr.init(jax.random.key(0), params, job.plan)
plain = model.apply({"params": params}, tokens, attention_mask=mask)
fresh = lr.linen.apply(model, params, adapters, tokens, attention_mask=mask)
difference = float(jnp.abs(fresh - plain).max())
print(f"largest difference between the base and a fresh adapter: {difference:.1e}")
assert difference < 1e-2 * float(jnp.abs(plain).max())

# %% [markdown]
# ## Training
#
# The loop logs, evaluates, and saves checkpoints under `runs/`; interrupt this cell and run it again, and it goes on where it
# stopped. After three tenths of the steps LaMDA has frozen the larger of its two factors for good: the step is compiled again without
# its gradient, and one small matrix for each weight, and the classifier, are left to train.

# %%
result = train.loop.train(job)

# %% [markdown]
# Every number it logged is a line of `metrics.jsonl` (and in TensorBoard's format beside it). The dashed line is where the phase
# changes.

# %%
rows = read(result.workdir / "metrics.jsonl")
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
for panel, names in zip(panels, (("train/loss", "eval/loss"), ("eval/accuracy", "eval/macro_f1")), strict=True):
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), marker=".", label=name)
    for change in job.plan.phases(config.steps)[1:]:
        panel.axvline(change, color="grey", linestyle="--")
    panel.set_xlabel("step")
    panel.legend()
plt.show()

# %% [markdown]
# ## Merging
#
# The run saved its adapter, which is bound to the base it was trained on by a hash of its weights. Merging adds it into a copy of the
# parameters, which any Flax code then runs at the base's speed. The merged model answers like the adapted one.

# %%
trained = load_adapter(result.adapter, params, job.base)
merged = lr.merge(params, trained)
adapted = lr.linen.apply(model, params, trained, tokens, attention_mask=mask)
logits = model.apply({"params": merged}, tokens, attention_mask=mask)
print(f"largest difference between merged and adapted: {float(jnp.abs(logits - adapted).max()):.1e}")
for text, answer in zip(texts, logits.argmax(-1), strict=True):
    print(f"{text:32s} {job.train.label_names[int(answer)]}")

# %% [markdown]
# ## Export
#
# `peft.save` writes the adapter as an exact LoRA relative to the published weights, so that PEFT and every other reader of its
# format loads it; the classifier is stored whole. torch is not needed.

# %%
name = "sentence-transformers/all-MiniLM-L6-v2"
exported = peft.save(
    trained, "tweets-lamda", architecture=job.model_config, base_model_name_or_path=name, overwrite=True
)
for file in sorted(exported.iterdir()):
    print(f"{file.name:30s} {file.stat().st_size:10,} bytes")
settings = json.loads((exported / "adapter_config.json").read_text())
print({field: settings[field] for field in ("peft_type", "r", "lora_alpha", "modules_to_save")})

# %% [markdown]
# ## Many adapters in one batch
#
# One base can serve a different adapter to each row of a batch. To have something to tell apart, we train two small LoRAs on the
# merged model with a loop of our own: one on the labels as they are, one for a reader who takes everything the other way round,
# with negative and positive exchanged.
#
# This is the whole of a training loop with the library: `partition` gives the tree to differentiate, `join` puts it back together.

# %%
plan = lr.plan(
    merged, {r"encoder/.*/(query|value|output)": lr.lora(rank=4)}, sites=lr.linen.sites(model, merged, tokens)
)
optimizer = lr.optim.with_methods(optax.adamw(2e-3), plan, steps)


def fit(seed, relabel):
    """A LoRA of `plan` trained for `steps` steps on the labels relabel[label]."""
    adapter = lr.init(jax.random.key(seed), merged, plan)
    trainable, frozen = lr.partition(adapter)
    state = optimizer.init(trainable)

    def loss_of(trainable, batch):
        logits = lr.linen.apply(
            model, merged, lr.join(trainable, frozen), batch["tokens"], attention_mask=batch["mask"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, relabel[batch["label"]]).mean()

    @jax.jit
    def update(trainable, state, batch):
        loss, gradient = jax.value_and_grad(loss_of)(trainable, batch)
        change, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, change), state, loss

    for _, batch in zip(range(steps), job.train.iterator(), strict=False):
        trainable, state, loss = update(trainable, state, {name: batch[name] for name in ("tokens", "mask", "label")})
    print(f"seed {seed}: last loss {float(loss):.3f}")
    return lr.join(trainable, frozen)


usual = fit(1, jnp.array([0, 1, 2]))
contrary = fit(2, jnp.array([2, 1, 0]))

# %% [markdown]
# `lr.stack` puts them into one tree, and `rows` says which adapter each row of the batch gets; -1 asks for the base. Here every
# text appears three times, for the base and for both adapters, in a single call of the model.

# %%
both = lr.stack([usual, contrary])
tokens, mask = encode([text for text in texts for _ in range(3)])
rows = jnp.array([-1, 0, 1] * len(texts))
logits = lr.linen.apply(model, merged, both, tokens, attention_mask=mask, rows=rows)
answers = [job.train.label_names[int(answer)] for answer in logits.argmax(-1)]
print(f"{'':32s} {'base':10s} {'usual':10s} {'contrary':10s}")
for n, text in enumerate(texts):
    print(f"{text:32s} " + " ".join(f"{answer:10s}" for answer in answers[3 * n : 3 * n + 3]))

# %% [markdown]
# A row gets what it would get alone: the rows of the second adapter agree with the model that runs that adapter for everybody.

# %%
alone = lr.linen.apply(model, merged, contrary, tokens, attention_mask=mask)
difference = float(jnp.abs(logits - alone)[rows == 1].max())
print(f"largest difference: {difference:.1e}")
assert difference < 1e-2 * float(jnp.abs(alone).max())

# %% [markdown]
# ## Where to go from here
#
# - Other methods: replace `lr.lamda` by `lr.lora`, `lr.pissa`, `lr.lora_xs` or `lr.lamda_pp`; `configs/` has each of them on these
#   tweets.
# - Language models: `configs/smollm2_gsm8k_lamda.py` trains SmolLM2-135M on GSM8K from the same loop.
# - Your own model: `lr.linen.sites(model, params, *args)` finds what can be adapted in any Linen model, `lr.nnx.sites(model)` in
#   any NNX model.
