"""Statistics: what they are by numpy, the same through scans, remats, both bridges and meshes, streamed and resumable."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_models import build
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lr
from lowrank_jax.sites import flatten, with_leaves
from lowrank_jax.stats import statistics
from lowrank_jax.stats.attribution import attribute
from lowrank_jax.stats.statistics import fingerprint

BATCHES = [jax.random.randint(jax.random.key(n), (4, 5), 0, 12) for n in range(3)]


def loss_of(model):
    def loss(params, adapters, ids):
        return jnp.mean(model.apply(params, adapters, ids) ** 2)

    return loss


def dense_sites(model):
    return {path: site for path, site in model.sites.items() if site.kind == "dense"}


def collect(model, batches=BATCHES, what=("gradient", "covariance"), **options):
    return lr.collect(loss_of(model), model.params, dense_sites(model), batches, what=what, progress=False, **options)


@functools.cache
def reference():
    return collect(build("linen", "mixed", "plain"))


def laid(model, kind):
    """The reference by the paths of another model."""
    return model.lay({path: np.asarray(x) for path, x in reference().values[kind].items()})


def test_a_gradient_is_the_mean_over_batches():
    model = build("linen", "mixed", "plain")
    none = lr.Adapters({}, {}, lr.Plan(()))
    each = [flatten(jax.grad(loss_of(model))(model.params, none, ids)) for ids in BATCHES]
    for path, site in dense_sites(model).items():
        expected = site.canonical(sum(g[path] for g in each) / len(each))
        np.testing.assert_allclose(reference().values["gradient"][path], expected, atol=1e-6)


def test_a_covariance_is_that_of_the_inputs():
    model, seen = build("linen", "mixed", "plain"), {}

    def spy(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.DenseGeneral) and context.method_name == "__call__":
            seen.setdefault("/".join((*context.module.path, "kernel")), []).append(np.asarray(args[0], np.float64))
        return next_fun(*args, **kwargs)

    none = lr.Adapters({}, {}, lr.Plan(()))
    for ids in BATCHES:
        with nn.intercept_methods(spy):
            model.apply(model.params, none, ids)
    assert set(seen) == set(dense_sites(model))
    for path, site in dense_sites(model).items():
        flat = [x.reshape(-1, site.n_in) for x in seen[path]]
        expected = sum(x.T @ x / len(x) for x in flat) / len(flat)
        np.testing.assert_allclose(reference().values["covariance"][path], expected, atol=1e-5)


@pytest.mark.parametrize("bridge", ["linen", "nnx"])
@pytest.mark.parametrize("layout", ["scanned", "remat", "mesh"])
def test_layouts_and_bridges_do_not_matter(bridge, layout):
    model = build(bridge, "mixed", layout)
    found = collect(model)
    for kind in ("gradient", "covariance"):
        expected = laid(model, kind)
        assert set(expected) == set(found.values[kind])
        for path, value in found.values[kind].items():
            np.testing.assert_allclose(value, expected[path], atol=1e-5)
            if layout == "mesh":
                assert not value.sharding.is_fully_replicated, (kind, path)


def test_on_a_mesh_sums_lie_like_their_weights():
    model = build("linen", "mixed", "mesh")
    found = collect(model)
    for path, site in dense_sites(model).items():
        mesh, weight = (
            model.params["layers"]["split"]["kernel"].sharding.mesh,
            flatten(model.params)[path].sharding.spec,
        )
        gradient, covariance = (found.values[kind][path] for kind in ("gradient", "covariance"))
        assert gradient.sharding == NamedSharding(
            mesh, P(None, weight[1], weight[2] if len(site.outputs) > 1 else weight[3])
        )
        assert covariance.sharding == NamedSharding(mesh, P(None, weight[1], None))


def test_on_a_mesh_of_data_alone_covariances_are_divided_all_the_same():
    model, mesh = nn.Dense(3), jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, x = NamedSharding(mesh, P()), jax.random.normal(jax.random.key(0), (32, 16))
    params = jax.device_put(model.init(jax.random.key(1), x)["params"], everywhere)
    loss = lambda params, adapters, x: jnp.sum(lr.linen.apply(model, params, adapters, x) ** 2)  # noqa: E731
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    sites = {"kernel": lr.sites(params)["kernel"]}
    found = lr.collect(loss, params, sites, [batch], what=["gradient", "covariance"], progress=False).values
    assert found["gradient"]["kernel"].sharding.is_equivalent_to(everywhere, 2)
    assert found["covariance"]["kernel"].sharding == NamedSharding(mesh, P("data", None))
    np.testing.assert_allclose(found["covariance"]["kernel"], x.T @ x / 32, atol=1e-5)


def test_every_input_counts_the_same_whatever_its_batch():
    model, x = nn.Dense(3), jax.random.normal(jax.random.key(0), (10, 4))
    params = model.init(jax.random.key(1), x)["params"]
    loss = lambda params, adapters, x: jnp.sum(lr.linen.apply(model, params, adapters, x) ** 2)  # noqa: E731
    sites = {"kernel": lr.sites(params)["kernel"]}
    found = lr.collect(loss, params, sites, [x[:7], x[7:]], what=["covariance"], progress=False)
    np.testing.assert_allclose(found.values["covariance"]["kernel"], x.T @ x / 10, atol=1e-6)


class Recorded(list):
    """A sequence that remembers what was read of it, and is cut off at one place."""

    def __init__(self, batches, cut=None):
        super().__init__(batches)
        self.read, self.cut = [], cut

    def __getitem__(self, n):
        if n == self.cut:
            raise KeyboardInterrupt
        self.read.append(n)
        return super().__getitem__(n)


def generated(batches):
    yield from batches


@pytest.mark.parametrize("sequence", [True, False])
def test_stopped_and_started_again_it_goes_on(tmp_path, sequence):
    model, runs = build("linen", "mixed", "plain"), []

    def loss(params, adapters, ids):
        jax.debug.callback(lambda: runs.append(1))
        return loss_of(model)(params, adapters, ids)

    def go(batches):
        sites, what = dense_sites(model), ["gradient", "covariance"]
        try:
            return lr.collect(loss, model.params, sites, batches, what=what, directory=tmp_path, progress=True)
        finally:
            jax.effects_barrier()

    with pytest.raises(KeyboardInterrupt):
        go(Recorded(BATCHES, cut=2))
    assert len(runs) == 2
    rest = Recorded(BATCHES)
    found = go(rest if sequence else generated(rest))
    assert len(runs) == 3 and found.batches == 3
    assert not sequence or rest.read == [2]
    for kind, of in found.values.items():
        assert all((value == reference().values[kind][path]).all() for path, value in of.items()), (
            "other bits than in one go"
        )
    again = go(BATCHES)
    assert len(runs) == 3 and again.batches == 3
    with pytest.raises(ValueError, match="holds the sums of 3 batches, more than the 2 passed"):
        go(BATCHES[:2] if sequence else generated(BATCHES[:2]))


def test_writing_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    written, clock = [], [0.0]

    def write(sums, batches, flat, file):
        written.append(batches)
        clock[0] += 2

    def batches():
        for ids in BATCHES * 4:
            yield ids
            clock[0] += 7

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("lowrank_jax.stats.sums.save", write)
    collect(build("linen", "mixed", "plain"), batches(), directory=tmp_path)
    assert written == [1, 4, 7, 10, 12]


def test_a_directory_of_something_else_is_refused(tmp_path):
    model = build("linen", "mixed", "plain")
    collect(model, directory=tmp_path)
    with pytest.raises(ValueError, match="holds the sums of another plan or of other statistics"):
        collect(model, what=["gradient"], directory=tmp_path)
    other = model._replace(params=jax.tree.map(lambda x: x + 1, model.params))
    with pytest.raises(ValueError, match="was collected on another weight than this model's"):
        collect(other, directory=tmp_path)


def test_what_is_not_finite_is_refused_and_not_kept(tmp_path):
    model = build("linen", "mixed", "plain")
    broken = lambda params, adapters, ids: loss_of(model)(params, adapters, ids) * jnp.nan  # noqa: E731
    with pytest.raises(ValueError, match="The gradient of layers_0/join/kernel is not finite"):
        lr.collect(
            broken, model.params, dense_sites(model), BATCHES, what=["gradient"], directory=tmp_path, progress=False
        )
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_it_needs():
    model = build("linen", "mixed", "scanned")
    plan = lr.plan(model.params, {"layers/split": lr.lora_ga(rank=2), "layers/join": lr.corda(rank=2), "conv": lr.lora(2)},
                   sites=model.sites)  # fmt: skip
    found = lr.collect(loss_of(model), model.params, plan, BATCHES[:1], progress=False)
    assert {kind: set(of) for kind, of in found.values.items()} == {
        "gradient": {"layers/split/kernel"}, "covariance": {"layers/join/kernel"}
    }  # fmt: skip
    adapters = lr.init(jax.random.key(0), model.params, plan, statistics=found)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), adapters))


def test_save_and_load_keep_everything(tmp_path):
    loaded = statistics.load(reference().save(tmp_path / "s.safetensors"))
    assert loaded.batches == 3
    for kind, of in reference().values.items():
        assert all((loaded.values[kind][path] == value).all() for path, value in of.items())
    both = lr.Statistics({"contribution": {"x": jnp.ones(1)}}, {}, 1) | loaded
    assert set(both.values) == {"contribution", "gradient", "covariance"}


def test_what_cannot_be_collected_is_refused_by_name():
    model = build("linen", "mixed", "plain")
    with pytest.raises(ValueError, match="there are no batches"):
        collect(model, [])
    with pytest.raises(ValueError, match="nothing to collect; no method of the plan needs statistics"):
        lr.collect(
            loss_of(model), model.params, lr.plan(model.params, {".*split": lr.lora(2)}, sites=model.sites), BATCHES
        )
    with pytest.raises(ValueError, match="'contribution' is not collected here; use lowrank_jax.contributions"):
        collect(model, what=["contribution"])
    with pytest.raises(ValueError, match="'hessian' is not collected here; expected gradient or covariance"):
        collect(model, what=["hessian"])
    table = {"embed/embedding": model.sites["embed/embedding"]}
    with pytest.raises(ValueError, match="embed/embedding: the input covariance exists for dense weights only"):
        lr.collect(loss_of(model), model.params, table, BATCHES, what=["covariance"])
    with pytest.raises(
        ValueError, match="conv/bias: the gradient exists for weights that act on inputs only, this is a param weight"
    ):
        lr.collect(loss_of(model), model.params, {"conv/bias": model.sites["conv/bias"]}, BATCHES, what=["gradient"])
    unseen = {"layers_0/join/kernel": replace(model.sites["layers_0/join/kernel"], factored=False)}
    with pytest.raises(
        ValueError, match="layers_0/join/kernel: the inputs of a weight that no registered module holds cannot be seen"
    ):
        lr.collect(loss_of(model), model.params, unseen, BATCHES, what=["covariance"])
    blind = lambda params, adapters, ids: jnp.float32(0)  # noqa: E731
    with pytest.raises(ValueError, match="layers_0/join/kernel: no batch reached it"):
        lr.collect(blind, model.params, dense_sites(model), BATCHES, what=["covariance"], progress=False)


def test_missing_statistics_are_refused_before_anything_is_computed(monkeypatch):
    model = build("linen", "mixed", "plain")
    plan = lr.plan(model.params, {".*split": lr.lora_ga(rank=2)}, sites=model.sites)
    kept, lost = plan.entries[0].site.path, plan.entries[-1].site.path
    found = lr.collect(loss_of(model), model.params, plan, BATCHES[:1], progress=False)
    some = lr.Statistics({"gradient": {kept: found.values["gradient"][kept]}}, found.fingerprints, 1)
    monkeypatch.setattr("lowrank_jax.initialisation._maker", None)  # computing anything would raise a TypeError
    with pytest.raises(
        ValueError, match=f"{lost}: its gradient was not collected .the nearest is {kept}.*lowrank_jax.collect"
    ):
        lr.init(jax.random.key(0), model.params, plan, statistics=some)
    with pytest.raises(ValueError, match=f"lora_ga at {kept} needs the gradient.*lowrank_jax.collect"):
        lr.init(jax.random.key(0), model.params, plan)
    moved = with_leaves(model.params, {lost: flatten(model.params)[lost][::-1]})
    with pytest.raises(ValueError, match=f"{lost}: its gradient was collected on another weight"):
        lr.init(jax.random.key(0), moved, plan, statistics=found)
    with pytest.raises(
        ValueError, match="needs the contribution of the weight: gather it with lowrank_jax.contributions"
    ):
        lr.plan(model.params, {".*split": lr.colora(rank=2)}, sites=model.sites)


def test_rounded_weights_are_the_same_weights():
    model = build("linen", "mixed", "plain")
    for path, weight in flatten(model.params).items():
        if path in reference().fingerprints:
            reference().of("gradient", path, weight.astype(jnp.bfloat16))


def test_statistics_of_different_weights_are_not_joined():
    ones, twos = (lr.Statistics({}, {"x": fingerprint(s * jnp.ones((3, 2)))}, 1) for s in (1, 2))
    with pytest.raises(ValueError, match="x: the two statistics were collected on different weights"):
        _ = ones | twos
    assert (ones | ones).batches == 1


def complete(model, steps):
    """The summed attributions of all weights and the change of the loss."""
    tuned = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), model.params)
    none, loss, ids = lr.Adapters({}, {}, lr.Plan(())), loss_of(model), BATCHES[0]
    found = attribute(loss, model.params, tuned, ids, tuple(flatten(model.params)), steps)
    change = loss(tuned, none, ids) - loss(model.params, none, ids)
    return sum(float(x.sum()) for x in found.values()), float(change)


def test_attributions_sum_to_the_change_of_the_loss():
    model = build("linen", "mixed", "plain")
    errors = [abs(total / change - 1) for total, change in (complete(model, steps) for steps in (4, 8, 16))]
    # The midpoint rule: a quarter of the error for twice the points.
    assert errors[2] < 1e-3 and 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5


PARAMS = {"a": {"kernel": jnp.diag(jnp.array([1.0, 2.0]))}, "b": {"kernel": jnp.eye(2)}}
TUNED = {"a": {"kernel": jnp.diag(jnp.array([3.0, 1.0]))}, "b": {"kernel": 4 * jnp.eye(2)}}


def squares(params, adapters, scale):
    return scale * sum(jnp.sum(w**2) for w in flatten(params).values())


def test_one_midpoint_is_exact_on_a_quadratic_loss():
    found = lr.contributions(squares, PARAMS, TUNED, lr.sites(PARAMS), [1.0, 3.0], steps=1, progress=False)
    # |9 - 1| + |1 - 4| and 2 (16 - 1), twice for the mean of the batches: entries that work against each other do not cancel, and
    # the gradient at an end would be off by a factor of two.
    got = {path: float(value) for path, value in found.values["contribution"].items()}
    assert got == pytest.approx({"a/kernel": 22, "b/kernel": 60}) and found.batches == 2


def test_contributions_of_a_stack_are_of_its_layers():
    params, tuned = ({"a": {"kernel": s * jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}} for s in (1, 2))
    loss = lambda params, adapters, batch: (jnp.arange(3)[:, None, None] * params["a"]["kernel"] ** 2).sum()  # noqa: E731
    found = lr.contributions(loss, params, tuned, {"a/kernel": lr.sites(params)["a/kernel"]}, [0], progress=False)
    np.testing.assert_allclose(found.values["contribution"]["a/kernel"], [0, 12, 24], rtol=1e-5)


def test_contributions_that_cannot_be_had_are_refused():
    def of(tuned=TUNED, batches=(1.0,), **options):
        return lr.contributions(squares, PARAMS, tuned, lr.sites(PARAMS), batches, progress=False, **options)

    with pytest.raises(ValueError, match="there are no batches"):
        of(batches=[])
    with pytest.raises(ValueError, match=r"contributions\(steps=0\): expected at least 1"):
        of(steps=0)
    with pytest.raises(ValueError, match="b/kernel is missing in the tuned model"):
        of({"a": TUNED["a"]})
    with pytest.raises(ValueError, match="the tuned model equals the base"):
        of(PARAMS)
    with pytest.raises(ValueError, match="The contribution of a/kernel is not finite"):
        of(batches=[jnp.nan])
