"""What a method asks of training is there: statistics, a penalty, a key of each step, growth; and any recipe is one word away."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

import lowrank_jax as lr
from configs import minilm_tweets
from lowrank_jax.checkpoint import load_adapter
from train import config as configs
from train import job, loop, saved


@pytest.mark.parametrize("method", ["lora_ga", "corda", "adalora", "dylora"])
def test_a_run_gives_a_method_what_it_needs(root, tmp_path, method):
    config = tiny.config(root, method)
    config.workdir, config.steps, config.eval_every = str(tmp_path / "run"), 6, 0
    if method == "adalora":
        config.adapter.target = 2
    result = loop.run(config)
    kept = load_adapter(result.adapter, job.load(config, training=False).params)
    if method == "adalora":
        left = sum(int((np.asarray(leaves["e"]) != 0).sum()) for leaves in kept.sites.values() if "e" in leaves)
        assert left == 2 * 4 * 2  # two directions at each of four stacked sites of two layers
    again = saved.load(str(result.adapter), saved.config(str(result.adapter)))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, kept))


def test_ranks_by_contribution_need_a_tuned_model(root, tmp_path):
    config = tiny.config(root, "colora")
    config.workdir, config.steps, config.eval_every = str(tmp_path / "run"), 4, 0
    with pytest.raises(
        configs.ConfigError, match=r"config.statistics.tuned='': colora compares the base with a fully fine-tuned"
    ):
        job.load(config)
    full = tiny.config(root, "full")
    full.workdir, full.steps, full.eval_every = str(tmp_path / "full"), 4, 0
    config.statistics.tuned = str(loop.run(full).adapter)
    ranks = [dict(e.method.config)["rank"] for e in job.load(config).plan.entries if e.method.name == "lora"]
    assert sum(sum(r) for r in ranks) <= 4 * 8 and len({r for of in ranks for r in of}) > 1


def test_every_recipe_makes_an_experiment():
    for name in minilm_tweets.RECIPES:
        config = minilm_tweets.get_config(name)
        configs.check(config)
        assert config.name == f"minilm_tweets_{name}"
    used = {recipe.method or name for name, recipe in minilm_tweets.RECIPES.items()}
    without = {"chain", "one_bit_packed", "sparse_update"}  # made by other calls
    assert set(lr.methods.names()) - used - without <= {"toy_vector"}
    with pytest.raises(configs.ConfigError, match="has no recipe 'lamba'; did you mean 'lamda'"):
        minilm_tweets.get_config("lamba")
