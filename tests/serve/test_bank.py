"""Banks: named adapters as a value; rows and swaps without compiling again; one directory for all of them."""

import functools
import json
import shutil

import conformance_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.checkpoint import CheckpointError, base_reference, load_adapter
from lowrank_jax.forms import UnsupportedError

MODEL = models.build("linen", "mixed")
SITES = {path: site for path, site in MODEL.sites.items() if site.kind != "param"}
RUN = jax.jit(MODEL.apply)


def make(method, pattern=".*", seed=0, model=MODEL, sites=None):
    """A trained adapter: far from its start."""
    sites = {p: s for p, s in model.sites.items() if s.kind != "param"} if sites is None else sites
    adapters = lr.init(jax.random.key(seed), model.params, lr.plan(model.params, {pattern: method}, sites=sites))
    random = np.random.default_rng(seed)
    noise = lambda x: 0.3 * jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: x + noise(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, adapters)


def own_jit():
    """A program of its own: jax.jit shares what it compiled between equal functions."""
    return jax.jit(lambda params, adapters, *args, rows=None: MODEL.apply(params, adapters, *args, rows=rows))


def difference(one, two):
    one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
    return np.abs(one - two).max() / np.abs(two).max()


def same_bits(one, two):
    return one.plan == two.plan and jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), one, two))


@pytest.fixture(scope="module")
def bank():
    """Different methods, ranks and sites."""
    return lr.Bank(MODEL.params, {
        "lora": make(lr.lora(2, 5), r".*(split|embed)", seed=1),
        "pissa": make(lr.pissa(3), r".*(join|conv)", seed=2),
        "core": make(lr.lora_xs(3), r".*split", seed=3),
        "whole": make(lr.full(), "layers_0/split/kernel", seed=4),
    })  # fmt: skip


def contents(bank):
    return {name: (id(one), jax.tree.map(id, one)) for name, one in bank.items()}


def test_adding_removing_and_renaming_leave_the_bank_as_it_was(bank):
    """C4, C46: a bank is a value; a refused change has changed nothing."""
    before, extra = contents(bank), make(lr.lora(1))
    larger = bank.add("extra", extra)
    assert list(larger) == [*bank, "extra"] and larger["extra"] is extra
    assert list(larger.remove("lora", "extra")) == ["pissa", "core", "whole"]
    assert list(bank.rename("pissa", "new")) == ["lora", "new", "core", "whole"]
    assert bank.rename("pissa", "new")["new"] is bank["pissa"]
    assert list(bank.select(["core", "lora"])) == ["core", "lora"]
    with pytest.raises(ValueError, match="has an adapter 'lora' already"):
        bank.add("lora", extra)
    with pytest.raises(ValueError, match="has an adapter 'lora' already"):
        bank.rename("core", "lora")
    for change in (bank.remove, bank.select, lambda name: bank.rename(name, "x"), lambda name: bank.swap(name, extra),
                   lambda name: bank[name], bank.sum, bank.rows):  # fmt: skip
        with pytest.raises(KeyError, match="No adapter 'pisa' in the bank; did you mean 'pissa'"):
            change("pisa" if change not in (bank.select, bank.sum, bank.rows) else ["pisa"])
    assert len(bank.remove(*bank)) == len(bank.remove(*bank).uniform()) == 0
    assert contents(bank) == before
    with pytest.raises(TypeError):
        bank.adapters["lora"] = extra


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "__base__", ".hidden", "a b", "x" * 101, "a\n", 3, None]
)
def test_bad_names_are_refused(bank, name):
    with pytest.raises(ValueError, match="is no name for an adapter"):
        bank.add(name, make(lr.lora(1)))


def test_names_may_contain_one_another():
    """C62, C55."""
    one, two = make(lr.lora(1), seed=1), make(lr.lora(1), seed=2)
    bank = lr.Bank(MODEL.params, {"a": one, "ab": two, "b.a": one})
    assert list(bank.remove("a")) == ["ab", "b.a"] and bank["ab"] is two


def test_what_does_not_belong_to_the_base_is_refused(bank):
    adapters = make(lr.pissa(2))
    with pytest.raises(ValueError, match="Bank: 'x': the adapter is folded into another base"):
        bank.add("x", lr.fold(MODEL.params, adapters)[1])
    with pytest.raises(ValueError, match="Bank: 'x': the adapter is a stack"):
        bank.add("x", lr.stack([adapters]))
    other = models.build("linen", "dense")
    with pytest.raises(ValueError, match="site/kernel is missing in these parameters"):
        bank.add("x", make(lr.lora(1), model=other))


def test_switching_is_exact_and_the_base_is_the_base(bank):
    """C44, C46, C47: in any order, and back again; nothing is left behind in the model or its parameters."""
    before = jax.tree.map(np.array, MODEL.params)
    base = MODEL.run(MODEL.params, *MODEL.args)
    names = ["lora", "pissa", "core"]
    first = {name: RUN(bank.params, bank[name], *MODEL.args) for name in names}
    for name in reversed(names):
        again = RUN(bank.params, bank[name], *MODEL.args)
        assert (again == first[name]).all() and difference(again, base) > 1e-2
    assert difference(first["lora"], first["pissa"]) > 1e-2
    assert (MODEL.run(bank.params, *MODEL.args) == base).all()
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), before, bank.params))


def test_several_at_once_are_the_sum_of_their_updates(bank):
    """C45: on the same weights and on different ones."""
    merged = {name: lr.merge(MODEL.params, bank[name]) for name in bank}
    both = lr.merge(MODEL.params, bank.sum(["lora", "core", "whole"], [1.0, -0.5, 1.0]))
    expected = jax.tree.map(
        lambda w, a, b, c: w + (a - w) - 0.5 * (b - w) + (c - w),
        MODEL.params, *(merged[name] for name in ("lora", "core", "whole")),
    )  # fmt: skip
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), both, expected)
    assert same_bits(bank.sum(["pissa"]), bank["pissa"])
    pair = RUN(bank.params, bank.sum(["lora", "pissa"]), *MODEL.args)
    assert difference(pair, RUN(bank.params, lr.add(bank["lora"], bank["pissa"]), *MODEL.args)) < 1e-5


@pytest.mark.parametrize("bridge, layout", [("linen", "plain"), ("nnx", "scanned"), ("linen", "mesh")])
def test_rows_of_different_methods_ranks_and_sites(bridge, layout):
    """C48: each row equals its adapter run alone, a base row the base to the bit."""
    model = models.build(bridge, "mixed", layout)
    layers = "layers.*/split/kernel" if layout == "plain" else "layers/split/kernel"
    rule = lr.lora_xs(3) if layout == "plain" else lr.on_layers(lr.lora_xs(3), [1])
    bank = lr.Bank(model.params, {
        "lora": make(lr.lora(2, 5), r".*(split|embed)", 1, model),
        "pissa": make(lr.pissa(3), r".*(join|conv|embed)", 2, model),
        "some": make(rule, layers, 3, model),
        "whole": make(lr.full(), layers, 4, model),
    })  # fmt: skip
    names = ["pissa", "__base__", "whole", "some"]
    stacked, rows = bank.rows(names)
    assert rows.tolist() == [1, -1, 3, 2] and stacked.stacked == 4
    got = jax.jit(model.apply)(model.params, stacked, *model.args, rows=rows)
    base = model.run(model.params, *model.args)
    for n, name in enumerate(names):
        alone = base if name == "__base__" else jax.jit(model.apply)(model.params, bank[name], *model.args)
        assert difference(got[n], alone[n]) < 1e-5, name
    assert difference(got[0], base[0]) > 1e-2


def test_adapters_of_one_plan_are_stacked_as_they_are():
    """No conversion: a nonlinear form could not be converted at all."""
    method = lr.bottleneck(width=2, activation="gelu")
    dense = {p: s for p, s in SITES.items() if s.kind == "dense"}
    one, two = (make(method, seed=seed, sites=dense) for seed in (1, 2))
    bank = lr.Bank(MODEL.params, {"one": one, "two": two})
    stacked, rows = bank.rows(["two", "one", "__base__", "two"])
    assert stacked.plan == one.plan and rows.tolist() == [1, 0, -1, 1]
    assert same_bits(lr.take(stacked, 0), one) and same_bits(lr.take(stacked, 1), two)
    with pytest.raises(UnsupportedError, match="'lora': .*|'one': .*'gelu' is not a linear update"):
        bank.add("lora", make(lr.lora(1))).rows(["one"])
    with pytest.raises(ValueError, match="The bank is empty"):
        bank.select([]).rows(["__base__"])


def test_mixing_rows_anew_compiles_nothing(bank):
    """C52: the rows are an argument, and the stack of a bank is one value."""
    run = own_jit()
    for names in (["lora", "core", "__base__", "whole"], ["__base__"] * 4, ["pissa", "pissa", "lora", "lora"]):
        stacked, rows = bank.rows(names)
        run(MODEL.params, stacked, *MODEL.args, rows=rows)
    assert run._cache_size() == 1
    assert bank.rows(["lora"])[0] is bank.rows(["core"])[0]


def test_a_swap_compiles_nothing_and_acts_like_the_new_adapter(bank):
    """C52: other methods, ranks, scales and sites; what the new one lacks is zero; what the bank has no room for is refused."""
    uniform = bank.uniform(rank=6)
    assert len({one.plan for one in uniform.values()}) == 1
    ranks = {e.site.path: dict(e.method.config)["rank"] for e in uniform["lora"].plan.entries}
    assert set(ranks.values()) == {6} and set(ranks) == {p for one in bank.values() for p in one.sites}
    alone, mixed = own_jit(), own_jit()
    names = ["lora", "pissa", "__base__", "core"]
    alone(MODEL.params, uniform["pissa"], *MODEL.args)
    mixed(MODEL.params, uniform.rows(names)[0], *MODEL.args, rows=uniform.rows(names)[1])
    for new in (make(lr.lora(4, 9), r".*split", 5), make(lr.pissa(3), r".*join", 6), make(lr.lora_xs(2), r".*", 7)):
        swapped = uniform.swap("pissa", new)
        expected = RUN(MODEL.params, new, *MODEL.args)
        assert difference(alone(MODEL.params, swapped["pissa"], *MODEL.args), expected) < 1e-5
        stacked, rows = swapped.rows(names)
        got = mixed(MODEL.params, stacked, *MODEL.args, rows=rows)
        assert difference(got[1], expected[1]) < 1e-5
        assert all(same_bits(swapped[name], uniform[name]) for name in ("lora", "core", "whole"))
    assert alone._cache_size() == 1 and mixed._cache_size() == 1
    with pytest.raises(ValueError, match="embed/embedding has rank 7, the plan has room for 6"):
        uniform.swap("pissa", make(lr.lora(7), "embed", 8))
    with pytest.raises(ValueError, match="conv/kernel has no place in the plan"):
        bank.select(["lora"]).uniform(4).swap("lora", make(lr.lora(1), "conv", 9))
    with pytest.raises(ValueError, match="has the method pissa; convert it"):
        bank.swap("pissa", make(lr.lora(1), "conv", 9))


def test_a_swap_keeps_dtype_and_place(bank):
    """A compiled program depends on both."""
    device = jax.devices()[1]
    half = jax.tree.map(lambda x: jax.device_put(x.astype(jnp.bfloat16), device), bank["lora"])
    swapped = lr.Bank(MODEL.params, {"lora": half}).swap("lora", make(lr.lora(2, 5), r".*(split|embed)", 11))
    for new, old in zip(jax.tree.leaves(swapped["lora"]), jax.tree.leaves(half), strict=True):
        assert new.dtype == jnp.bfloat16 and new.sharding == old.sharding and new.committed


def test_uniform_banks_act_as_before_or_as_near_as_asked(bank):
    exact = bank.uniform()
    for name in bank:
        changes = [lr.merge(MODEL.params, x[name]) for x in (exact, bank)]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *changes)
    assert {dict(e.method.config)["rank"] for e in bank.uniform(1)["whole"].plan.entries} == {1}
    with pytest.raises(ValueError, match="the LoRA of rank 1 at layers_0/split/kernel is .* more than tolerance"):
        bank.select(["whole"]).uniform(1, tolerance=1e-3)
    head = make(lr.full(), "layers_0/split", sites=dict(MODEL.sites))
    with pytest.raises(UnsupportedError, match="'head': layers_0/split/bias: full of a bias or norm is no LoRA"):
        lr.Bank(MODEL.params, {"head": head}).uniform()


def files_of(directory):
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_a_bank_comes_back_bit_by_bit(bank, tmp_path):
    """C55, C56: each adapter in its own directory, whatever the order; the same bytes twice; no base weights."""
    base = base_reference("mixed", MODEL.params)
    where = lr.save_bank(tmp_path / "bank", bank, base)
    loaded = lr.load_bank(where, MODEL.params, base)
    assert list(loaded) == list(bank) and all(same_bits(loaded[name], bank[name]) for name in bank)
    assert sorted(f.name for f in (where / "adapters").iterdir()) == sorted(bank)
    assert same_bits(load_adapter(where / "adapters" / "core", MODEL.params, base), bank["core"])
    turned = lr.save_bank(tmp_path / "turned", bank.select(list(bank)[::-1]), base)
    again = lr.load_bank(turned, MODEL.params)
    assert list(again) == list(bank)[::-1] and all(same_bits(again[name], bank[name]) for name in bank)
    first, second = files_of(where), files_of(turned)
    assert {f: x for f, x in first.items() if f != "bank.json"} == {f: x for f, x in second.items() if f != "bank.json"}
    assert set(json.loads(first["bank.json"])["base"]) == {"name", "hash"}
    some = lr.load_bank(where, MODEL.params, names=["core", "lora"])
    assert list(some) == ["core", "lora"] and same_bits(some["core"], bank["core"])
    with pytest.raises(KeyError, match="no adapter 'cure'; it has lora"):
        lr.load_bank(where, MODEL.params, names=["cure"])


def test_only_a_bank_is_replaced_and_only_when_complete(bank, tmp_path, monkeypatch):
    base = base_reference("mixed", MODEL.params)
    where = lr.save_bank(tmp_path / "bank", bank, base)
    before = files_of(tmp_path)
    lr.save_bank(where, bank, base)
    assert files_of(tmp_path) == before
    monkeypatch.setattr("lowrank_jax.serve.bank_files.save_adapter", functools.partial(_fail_at, "core"))
    with pytest.raises(OSError, match="disk full"):
        lr.save_bank(where, bank.remove("lora"), base)
    assert files_of(tmp_path) == before
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="other is there and no bank"):
        lr.save_bank(other, bank, base)
    assert (other / "thesis.tex").read_text() == "mine"
    smaller = lr.save_bank(where, bank.select(["core"]), base)
    assert sorted(f.name for f in (smaller / "adapters").iterdir()) == ["core"]
    with pytest.raises(ValueError, match="differ in case only.*core, Core"):
        lr.save_bank(tmp_path / "case", bank.add("Core", bank["core"]), base)


def _fail_at(name, directory, *args):
    if directory.name == name:
        raise OSError("disk full")
    directory.mkdir(parents=True)


def test_banks_of_other_models_and_damaged_ones_are_refused(bank, tmp_path):
    base = base_reference("mixed", MODEL.params)
    where = lr.save_bank(tmp_path / "bank", bank.select(["lora", "core"]), base)
    other = jax.tree.map(lambda x: x + 1, MODEL.params)
    with pytest.raises(CheckpointError, match="made on mixed .*loaded here is moved"):
        lr.load_bank(where, MODEL.params, base_reference("moved", other))
    with pytest.raises(FileNotFoundError, match="bank.json: no such file"):
        lr.load_bank(tmp_path, MODEL.params)
    about = json.loads((where / "bank.json").read_text())
    for change, error in (
        ({"adapters": ["../../lora"]}, "'../../lora' is no name for an adapter"),
        ({"format": 99}, "format 99; this version reads 1"),
        ({"adapters": 7}, "not readable"),
    ):
        (where / "bank.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(CheckpointError, match=error):
            lr.load_bank(where, MODEL.params)
    (where / "bank.json").write_text(json.dumps(about))
    foreign = lr.save_bank(tmp_path / "foreign", lr.Bank(other, bank.select(["core"])), base_reference("moved", other))
    shutil.rmtree(where / "adapters" / "core")
    with pytest.raises(FileNotFoundError, match="adapters/core"):
        lr.load_bank(where, MODEL.params)
    shutil.copytree(foreign / "adapters" / "core", where / "adapters" / "core")
    with pytest.raises(CheckpointError, match="core: this belongs to another model"):
        lr.load_bank(where, MODEL.params)
