"""What the README shows in Python runs as it stands there."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import lowrank_jax as lr
from lowrank_jax import models

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def block(beginning):
    (found,) = [code for code in BLOCKS if code.startswith(beginning)]
    return found


@pytest.fixture(scope="module")
def bert():
    config = models.BertConfig.tiny(
        hidden_size=128, intermediate_size=256, task="classify", num_labels=3, scan_layers=True
    )
    model = models.build(config)
    tokens = jax.random.randint(jax.random.key(0), (3, 7), 1, 97)
    params = model.init(jax.random.key(1), tokens)["params"]
    return {"model": model, "params": params, "tokens": tokens, "label": jnp.arange(3)}


def run(beginning, **names):
    """The names after a block has run with these and the README's usual imports."""
    space = {"jax": jax, "jnp": jnp, "optax": optax, "lr": lr, "nn": nn, "dataclasses": dataclasses, **names}
    exec(compile(block(beginning), beginning, "exec"), space)
    return space


def trained(bert, method, seed):
    """Adapters away from their start."""
    adapters = lr.init(jax.random.key(seed), bert["params"], lr.plan(bert["params"], {".*/(query|value)": method}))
    return jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else x, adapters)


def test_every_block_is_python():
    assert len(BLOCKS) >= 7
    for code in BLOCKS:
        compile(code, "README.md", "exec")


def test_the_library_in_ten_lines(bert, capsys):
    space = run("import jax, optax", model=bert["model"], params=bert["params"])
    assert "lamda r=32" in capsys.readouterr().out
    batch, train, tx = {"tokens": bert["tokens"], "label": bert["label"]}, space["train"], space["tx"]
    state, first = tx.init(train), space["loss"](train, batch)
    for _ in range(3):
        updates, state = tx.update(jax.grad(space["loss"])(train, batch), state, train)
        train = optax.apply_updates(train, updates)
    assert space["loss"](train, batch) < first
    plain = bert["model"].apply({"params": lr.merge(space["base"], lr.join(train, space["frozen"]))}, bert["tokens"])
    adapted = lr.linen.apply(bert["model"], space["base"], lr.join(train, space["frozen"]), bert["tokens"])
    assert jnp.allclose(plain, adapted, atol=1e-4)


def test_a_matmul_of_ones_own(bert):
    class MyEinsum(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("...d,dnh->...nh", x, self.param("w", nn.initializers.normal(), (8, 2, 4)))

    run("lr.linen.register", MyEinsum=MyEinsum)
    x = jnp.ones((2, 8))
    params = MyEinsum().init(jax.random.key(0), x)["params"]
    assert lr.linen.sites(MyEinsum(), params, x)["w"].kind == "dense"


def test_methods_that_ask_for_a_line_more(bert, capsys):
    def loss(params, adapters, batch):
        logits = lr.linen.apply(bert["model"], params, adapters, batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    plan = lr.plan(bert["params"], {".*/(query|value)": lr.lora_ga(rank=2)})
    batches = [{"tokens": bert["tokens"], "label": bert["label"]}]
    space = run(
        "stats = lr.collect", loss=loss, params=bert["params"], plan=plan, batches=batches, key=jax.random.key(0),
        task_loss=jnp.float32(1), adapters=None,
    )  # fmt: skip
    assert space["loss"] == 1 and "query" in capsys.readouterr().out


def test_many_adapters_on_one_base(bert):
    legal, medical = trained(bert, lr.lora(rank=4), 0), trained(bert, lr.lora(rank=2), 1)
    space = run("bank = lr.Bank", legal=legal, medical=medical, **bert)
    alone = lr.linen.apply(bert["model"], bert["params"], medical, bert["tokens"])
    assert jnp.allclose(space["logits"][2], alone[2], atol=1e-4)
    assert space["error"] is not None and space["lora"].plan.entries and space["both"].plan.entries


def test_training_all_weights_with_a_small_state(bert):
    tx = run("adam = lr.optim.galore")["tx"]
    updates, _ = tx.update(bert["params"], tx.init(bert["params"]), bert["params"])
    assert jax.tree.structure(updates) == jax.tree.structure(bert["params"])
