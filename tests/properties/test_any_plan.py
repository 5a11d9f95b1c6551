"""What holds of every plan: it survives being written down, counts its leaves, and its patterns mean what is documented."""

from __future__ import annotations

import json
import math
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import params, plans

import lowrank_jax as lr
from lowrank_jax.plan import from_config


@given(plans())
def test_a_plan_survives_json(case):
    tree, plan = case
    again = from_config(tree, json.loads(json.dumps(plan.to_config())))
    assert again == plan and hash(again) == hash(plan) and str(again) == str(plan)
    assert again.to_config() == plan.to_config()
    assert (again.base_count, again.base_bytes) == (plan.base_count, plan.base_bytes)


def _trained(name: str, rank: int, n_in: int, n_out: int) -> tuple[int, int]:
    """Numbers trained in one matrix, by the papers: at the start and at the end of a run."""
    return {
        "lora": (rank * (n_in + n_out),) * 2, "pissa": (rank * (n_in + n_out),) * 2, "dora": (rank * (n_in + n_out) + n_out,) * 2,
        "lamda": (rank * (rank + n_out), rank * rank), "lora_xs": (rank * rank,) * 2, "svfit": (rank,) * 2,
        "ia3": (n_out,) * 2, "full": (n_in * n_out,) * 2,
    }[name]  # fmt: skip


@given(plans(), st.integers(1, 1000))
def test_counts_are_the_papers_summed_over_the_weights(case, total):
    tree, plan = case
    start = end = 0
    for entry in plan.entries:
        stack, n_in, n_out = math.prod(entry.site.batch_shape), entry.site.n_in, entry.site.n_out
        layers = stack if entry.layers is None else len(entry.layers)
        first, last = _trained(entry.method.name, dict(entry.method.config).get("rank", 0), n_in, n_out)
        start, end = start + layers * first, end + layers * last
    assert plan.trainable == plan.count(0, 1) == start
    assert plan.count(total - 1, total) == (end if total > 1 else start)
    phases = plan.phases(total)
    assert phases[0] == 0 and list(phases) == sorted(set(phases)) and phases[-1] < total
    counts = [plan.count(step, total) for step in phases]
    assert counts == sorted(counts, reverse=True)  # these methods freeze, and thaw nothing
    assert plan.base_count == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@st.composite
def _patterns(draw):
    """A tree, patterns of rules and of what to exclude: most match some kernel, many the same ones, now and then one none."""
    tree = draw(params())
    modules = [path.rpartition("/")[0] for path, site in lr.sites(tree).items() if site.kind == "dense"]
    fitting = [".*", ".*/kernel", "(.*/)?(query|value|mlp)", r"layers_\d+.*", "(?!layers).*"]
    for module in modules:
        whole, last = re.escape(module), re.escape(module.rpartition("/")[2])
        fitting += [whole, f"{whole}/kernel", f".*/{last}", f"(.*/)?{last}/kernel"]
    pattern = st.integers(0, 15).flatmap(
        lambda n: st.sampled_from(fitting if n else ("uery", "layers", "q.b", "nowhere/.*"))
    )
    return tree, draw(st.lists(pattern, min_size=1, max_size=4, unique=True)), draw(st.lists(pattern, max_size=1))


@given(_patterns())
def test_the_pattern_of_the_fewest_weights_wins_and_one_without_a_match_is_refused_by_name(case):
    tree, patterns, exclude = case
    kernels = [path for path, site in lr.sites(tree).items() if site.kind == "dense"]
    biases = [path for path in lr.sites(tree) if path not in kernels]

    def matched(pattern, paths):
        """Whole paths of weights or modules; '.*/x' also finds an x at the top."""
        texts = {p: (p, p.rpartition("/")[0]) for p in paths}
        return [
            p
            for p, both in texts.items()
            if any(re.fullmatch(pattern, t) or re.fullmatch(pattern, f"/{t}") for t in both)
        ]

    rules = {pattern: lr.lora(rank=1, alpha=float(n + 1)) for n, pattern in enumerate(patterns)}
    for field, unused in [("Pattern ", patterns), ("exclude=", exclude)]:
        for pattern in unused:
            if not matched(pattern, kernels + biases):
                with pytest.raises(ValueError, match=re.escape(f"{field}{pattern!r} matches no weight")):
                    lr.plan(tree, rules, exclude=exclude)
                return

    expected = {}
    for path in kernels:
        claims = [(len(matched(p, kernels)), -n, p) for n, p in enumerate(patterns) if path in matched(p, kernels)]
        if claims and not any(path in matched(p, kernels) for p in exclude):
            expected[path] = rules[min(claims)[2]]
    if not expected:
        with pytest.raises(ValueError, match="The plan is empty"):
            lr.plan(tree, rules, exclude=exclude)
        return
    assert {e.site.path: e.method for e in lr.plan(tree, rules, exclude=exclude).entries} == expected
