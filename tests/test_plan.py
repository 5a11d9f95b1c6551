"""Plans: which rule wins, what is refused before anything is computed, layers, counts, the table, the configuration."""

import json

import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.plan import from_config


def dense(*shape):
    return {
        "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
        "bias": jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), jnp.float32),
    }


PARAMS = {
    **{
        f"layers_{n}": {"attention": {"query": dense(8, 8), "value": dense(8, 8)}, "mlp": dense(8, 16)}
        for n in range(3)
    },
    "stack": {"up": dense(3, 8, 16)},
    "head": dense(8, 2),
}


def chosen(rules, **more):
    return {e.site.path: (e.method, e.layers) for e in lr.plan(PARAMS, rules, **more).entries}


def test_the_most_specific_rule_wins_and_of_equals_the_later():
    rules = {".*/query": lr.lora(2), ".*": lr.lora(1), "layers_1/.*/query": lr.lora(3)}
    rules |= {"head/kernel": lr.lora(2), "head/(kernel)": lr.full()}
    got = chosen(rules, exclude=[".*/bias", "stack/.*"])
    assert got["layers_0/attention/query/kernel"][0] == lr.lora(2)
    assert got["layers_1/attention/query/kernel"][0] == lr.lora(3)
    assert got["layers_0/mlp/kernel"][0] == lr.lora(1)
    assert got["head/kernel"][0] == lr.full()
    assert len(got) == 10 and not any(p.startswith("stack") or p.endswith("bias") for p in got)


@pytest.mark.parametrize(
    ("rules", "more", "error", "message"),
    [
        (
            {".*/querry": lr.lora(2)},
            {},
            ValueError,
            r"Pattern '.\*/querry' matches no weight. Nearest paths: layers_\d/attention/query",
        ),
        (
            {".*/mlp": lr.lora(2)},
            {"exclude": ["heads"]},
            ValueError,
            "exclude='heads' matches no weight. Nearest paths: head",
        ),
        ({"head": lr.lora(2)}, {"exclude": ["head"]}, ValueError, "The plan is empty"),
        ({".*/mlp": lr.lora(9)}, {}, ValueError, r"lora at layers_0/mlp/kernel: rank 9 is not between 1 and 8"),
        ({"head": "lora"}, {}, TypeError, "Rule for 'head': expected a method such as"),
        ({"head/bias": lr.lora(1)}, {}, ValueError, r"head/bias \(param, shape \(2,\)\), but lora applies to"),
        ({"(": lr.lora(1)}, {}, ValueError, "not a regular expression"),
        (
            {"stack/up": lr.on_layers(lr.lora(1), [3])},
            {},
            ValueError,
            r"stack/up/kernel is a stack of 3 layers; layers=\[3\] asks for 3",
        ),
        ({".*/mlp": lr.on_layers(lr.lora(1), [7])}, {}, ValueError, r"nothing in the layers \[7\]"),
    ],
)
def test_bad_plans_name_the_place_and_the_remedy(rules, more, error, message):
    with pytest.raises(error, match=message):
        lr.plan(PARAMS, rules, **more)


def test_going_dense_is_refused_unless_allowed():
    params = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    sites = lr.sites(params, declare={"w": "io"})
    with pytest.raises(ValueError, match=r"w is not a weight of a module that can be intercepted.*allow_dense=True"):
        lr.plan(params, {"w": lr.lora(2)}, sites=sites)
    plan = lr.plan(params, {"w": lr.lora(2)}, sites=sites, allow_dense=True)
    assert plan.entries[0].route == "dense" and "dense" in str(plan)


def test_layers_of_paths_and_of_stacks():
    got = chosen({".*/mlp": lr.on_layers(lr.lora(2), [0, 2]), "stack/up": lr.on_layers(lr.lora(2), [1])})
    assert {p: layers for p, (_, layers) in got.items()} == {
        "layers_0/mlp/kernel": None,
        "layers_2/mlp/kernel": None,
        "stack/up/kernel": (1,),
    }
    assert chosen({"stack/up": lr.on_layers(lr.lora(2), range(3))})["stack/up/kernel"][1] is None
    one, every = (lr.plan(PARAMS, {"stack/up": r}).trainable for r in (lr.on_layers(lr.lora(2), [1]), lr.lora(2)))
    assert (one, every) == (2 * 24, 3 * 2 * 24)


def test_counts_over_a_run():
    plan = lr.plan(
        PARAMS, {".*/query": lr.lamda(2, freeze=0.5), ".*/value": lr.lamda(2, freeze=0.25), "head": lr.lora(2)}
    )
    assert plan.phases(100) == (0, 25, 50)
    assert [plan.count(s, 100) for s in (0, 25, 50)] == [6 * 4 + 6 * 16 + 20, 6 * 4 + 3 * 16 + 20, 6 * 4 + 20]
    assert plan.trainable == plan.count(0, 100)
    assert plan.base_count == sum(x.size for x in jax.tree.leaves(PARAMS)) and plan.base_bytes == 4 * plan.base_count


def test_the_table_says_what_and_how_much():
    text = str(
        lr.plan(PARAMS, {".*/query": lr.lamda(2), "head": lr.full(), "stack/up": lr.on_layers(lr.lora(2), [0, 2])})
    )
    row = next(line for line in text.splitlines() if "layers_{0-2}/attention/query/kernel" in line)
    for word in ("x3", "dense", "8x8", "lamda r=2", "LowRank", "factored", "60"):
        assert word in row
    assert "stack/up/kernel layers 0,2" in text and "full" in text
    assert "at the end" in text


def test_equal_plans_are_equal_and_hash_alike():
    one, two = (lr.plan(PARAMS, {".*/query": lr.lamda(2)}) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one != lr.plan(PARAMS, {".*/query": lr.lamda(3)})


def test_configuration_there_and_back():
    plan = lr.plan(
        PARAMS, {".*/query": lr.lamda(2), "stack/up": lr.on_layers(lr.lamda((1, 2)), [0, 2]), "head.*": lr.full()}
    )
    again = from_config(PARAMS, json.loads(json.dumps(plan.to_config())))
    assert again == plan and again.trainable == plan.trainable and again.base_count == plan.base_count


def test_configuration_of_another_model_is_refused():
    config = lr.plan(PARAMS, {"head": lr.lora(2)}).to_config()
    with pytest.raises(
        ValueError, match=r"head/kernel: the adapter was made for a weight of shape \(8, 2\), this model's has \(8, 3\)"
    ):
        from_config({"head": dense(8, 3)}, config)
    with pytest.raises(
        ValueError, match="The saved adapter's site 'head/kernel' matches no weight. Nearest paths: heads"
    ):
        from_config({"heads": dense(8, 2)}, config)
    with pytest.raises(ValueError, match="Unknown method 'lorra'; did you mean 'lora'"):
        from_config(PARAMS, [{**config[0], "method": "lorra"}])
    with pytest.raises(TypeError, match="lora has no field 'rnk'; did you mean 'rank'"):
        from_config(PARAMS, [{**config[0], "config": {"rnk": 2}}])


def test_a_number_in_a_module_of_a_stack_is_no_layer():
    params = {"layers": {"mlp_1": {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((3, 5))}}}
    plan = lr.plan(params, {".*/mlp_1/kernel": lr.on_layers(lr.lora(2), [0, 2])})
    assert plan.entries[0].layers == (0, 2)
