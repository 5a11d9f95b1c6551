"""Evaluates a run's adapter, or its base: python -m train.evaluate --adapter=runs/minilm_tweets_lamda/adapter [--split=test]"""

from __future__ import annotations

import json

from absl import flags

from train import cli

_ADAPTER = flags.DEFINE_string("adapter", None, "The directory of an adapter that train.finetune wrote.")
_SPLIT = flags.DEFINE_string("split", None, "The split to evaluate on; by default the run's evaluation split.")
_LIMIT = flags.DEFINE_integer("limit", None, "Use the first so many examples; 0: all; by default as in the run.")
_BASE = flags.DEFINE_bool("base", False, "Evaluate the base without the adapter, for comparison.")
_GENERATE = flags.DEFINE_integer("generate", 0, "Answer so many examples by generation (exact match).")


def main() -> None:
    """Prints the scores as one line of JSON."""
    from lowrank_jax.hosts import leads
    from train import base, evaluation, saved, sharding

    config = saved.config(_ADAPTER.value)
    if _SPLIT.value is not None:
        config.data.eval_split = _SPLIT.value
    if _LIMIT.value is not None:
        config.data.eval_limit = _LIMIT.value
    job, adapters = saved.load(_ADAPTER.value, config)
    adapters = sharding.spread(adapters, job.mesh)
    if _BASE.value:
        params, folded = base.alone(config, job.params), None
    else:
        params, folded = base.under(config, job.params, adapters)
    result = evaluation.evaluate(job, evaluation.forward(job), params, folded, job.evaluation)
    if _GENERATE.value:
        result["exact_match"] = evaluation.exact_match(job, params, folded, job.evaluation, _GENERATE.value)
    if leads():
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main, several=True)
