"""Files of each peft_type that the test lays out by hand, in PEFT's convention, against its formula in numpy; and back. Needs no torch."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hand_written import (
    ADALORA,
    CONV,
    DOWN,
    IA3,
    LORA,
    NAMES,
    PARAMS,
    PREFIX,
    RANDLORA,
    SITES,
    STACK,
    STACKED,
    TABLE,
    TOKENS,
    UP,
    VERA,
    assert_written_back,
    changes,
    config_of,
    ia3_tensors,
    load,
    normal,
    randlora_tensors,
    tensors_of,
    vera_tensors,
    write,
)

import lowrank_jax as lr
from lowrank_jax import peft


def test_dora(tmp_path: pathlib.Path) -> None:
    a, b, m = normal(2, 6), normal(8, 2), np.abs(normal(8))
    tensors = {UP + "lora_A.weight": a, UP + "lora_B.weight": b, UP + "lora_magnitude_vector": m}
    adapters = load(write(tmp_path, LORA | {"use_dora": True, "target_modules": ["up"]}, tensors))
    assert adapters.plan.entries[0].method == lr.dora(rank=2, alpha=6)
    weight = np.asarray(PARAMS["up"]["kernel"]).T + 3 * b @ a  # torch's [out, in]
    expected = weight * (m / np.linalg.norm(weight, axis=1))[:, None]
    np.testing.assert_allclose(changes(adapters)["up/kernel"], expected.T - PARAMS["up"]["kernel"], atol=1e-5)
    assert assert_written_back(adapters, tmp_path)["use_dora"] is True


def test_dora_of_convolutions_and_embeddings(tmp_path: pathlib.Path) -> None:
    a, b, m = normal(2, 4, 3, 2), normal(5, 2, 1, 1), np.abs(normal(1, 5, 1, 1))
    ea, eb, em = normal(2, 9), normal(6, 2), np.abs(normal(6))
    tensors = {CONV + "lora_A.weight": a, CONV + "lora_B.weight": b, CONV + "lora_magnitude_vector": m,
               TABLE + "lora_embedding_A": ea, TABLE + "lora_embedding_B": eb, TABLE + "lora_magnitude_vector": em}  # fmt: skip
    adapters = load(write(tmp_path, LORA | {"use_dora": True, "target_modules": ["conv", "embed_tokens"]}, tensors))
    weight = np.moveaxis(np.asarray(PARAMS["conv"]["kernel"]), (-1, -2), (0, 1))
    weight = weight + 3 * np.einsum("or,rikl->oikl", b[..., 0, 0], a)
    expected = weight * (m.reshape(-1) / np.sqrt((weight**2).sum((1, 2, 3))))[:, None, None, None]
    got = PARAMS["conv"]["kernel"] + changes(adapters)["conv/kernel"]
    np.testing.assert_allclose(got, np.moveaxis(expected, (0, 1), (-1, -2)), atol=1e-5)
    table = np.asarray(PARAMS["table"]["embedding"]) + 3 * (eb @ ea).T
    got = PARAMS["table"]["embedding"] + changes(adapters)["table/embedding"]
    np.testing.assert_allclose(got, table * em / np.linalg.norm(table, axis=0), atol=1e-5)
    assert_written_back(adapters, tmp_path)


def test_dora_beside_lora_is_refused(tmp_path: pathlib.Path) -> None:
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {"up": lr.dora(2), "down": lr.lora(2)}))
    with pytest.raises(lr.forms.UnsupportedError, match="up/kernel is a dora and down/kernel a lora"):
        peft.save(adapters, tmp_path / "out", name_map=NAMES)


def test_adalora(tmp_path: pathlib.Path) -> None:
    a, b, e = normal(2, 6), normal(8, 2), normal(2, 1)
    ca, cb, ce = normal(3, 24), normal(5, 3), normal(3, 1)
    masks = {"layers.0.up.lora_E": [True, False, True]}
    tensors = {
        UP + "lora_A": a,
        UP + "lora_B": b,
        UP + "lora_E": e,
        CONV + "lora_A": ca,
        CONV + "lora_B": cb,
        CONV + "lora_E": ce,
    }
    adapters = load(write(tmp_path, ADALORA | {"rank_pattern": masks}, tensors))
    assert {entry.method for entry in adapters.plan.entries} == {lr.adalora(rank=3, target=2, alpha=6)}
    np.testing.assert_array_equal(np.asarray(adapters.sites["up/kernel"]["e"]) != 0, masks["layers.0.up.lora_E"])
    # Divided by the first rank, whatever is left of it.
    np.testing.assert_allclose(changes(adapters)["up/kernel"], (6 / 3 * b @ (a * e)).T, atol=1e-5)
    kernel = (6 / 3 * cb @ (ca * ce)).reshape(5, 4, 3, 2)
    np.testing.assert_allclose(changes(adapters)["conv/kernel"], np.moveaxis(kernel, (0, 1), (-1, -2)), atol=2e-5)
    config = assert_written_back(adapters, tmp_path, "ADALORA")
    assert config["rank_pattern"] == masks and (config["init_r"], config["lora_alpha"]) == (3, 6)
    lora = load(peft.save(adapters, tmp_path / "lora", name_map=NAMES))
    np.testing.assert_allclose(changes(lora)["up/kernel"], changes(adapters)["up/kernel"], atol=1e-5)


def test_adalora_of_other_ranks_and_scales_share_one_configuration(tmp_path: pathlib.Path) -> None:
    rules = {"up": lr.adalora(3, 2, alpha=6), "down": lr.adalora(4, 4, alpha=2)}
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, rules))
    adapters = jax.tree.map(lambda x: x + 1, adapters)
    out = peft.save(adapters, tmp_path / "out", name_map=NAMES, peft_type="ADALORA")
    assert config_of(out)["rank_pattern"] == {"layers.0.up.lora_E": [True] * 3 + [False]}
    for path, change in changes(load(out)).items():
        np.testing.assert_allclose(change, changes(adapters)[path], atol=1e-5)


def test_vera(tmp_path: pathlib.Path) -> None:
    t = vera_tensors()
    adapters = load(write(tmp_path, VERA, t))
    for path, module, n_in, n_out in (("up/kernel", UP, 6, 8), ("down/kernel", DOWN, 8, 5)):
        b, d = t[module + "vera_lambda_b"], t[module + "vera_lambda_d"]
        update = b[:, None] * (t["base_model.vera_B"][:n_out] @ (d[:, None] * t["base_model.vera_A"][:, :n_in]))
        np.testing.assert_allclose(changes(adapters)[path], update.T, atol=1e-5)
    assert_written_back(adapters, tmp_path, "VERA")
    lora = load(peft.save(adapters, tmp_path / "lora", name_map=NAMES))
    np.testing.assert_allclose(changes(lora)["up/kernel"], changes(adapters)["up/kernel"], atol=1e-5)


def test_vera_of_a_seed_is_written_with_its_matrices(tmp_path: pathlib.Path) -> None:
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {"up": lr.vera(rank=4), "down": lr.vera(rank=4)}))
    adapters = adapters.replace(sites=jax.tree.map(lambda x: x + 1, adapters.sites))
    out = peft.save(adapters, tmp_path / "out", name_map=NAMES, peft_type="VERA")
    assert tensors_of(out)["base_model.vera_A"].shape == (4, 8)
    for path, change in changes(load(out)).items():
        np.testing.assert_allclose(change, changes(adapters)[path], atol=1e-5)


def test_randlora(tmp_path: pathlib.Path) -> None:
    t = randlora_tensors()
    adapters = load(write(tmp_path, RANDLORA, t))
    for path, module, m, d in (("up/kernel", UP, 6, 8), ("down/kernel", DOWN, 5, 8)):
        lam, gam = t[module + "randlora_lambda"], t[module + "randlora_gamma"]
        narrow = lam[:, :, None] * t["base_model.randlora_A"][:, :3, :m] * gam[None]
        wide = t["base_model.randlora_B"][:d, :3].reshape(
            d, -1
        )  # PEFT flattens bases and ranks in another order than above
        update = 3 * wide @ narrow.reshape(-1, m)  # [the larger, the smaller dimension]
        np.testing.assert_allclose(changes(adapters)[path], update.T if path == "up/kernel" else update, atol=1e-5)
    out = peft.save(adapters, tmp_path / "again", name_map=NAMES, peft_type="RANDLORA")
    now = tensors_of(out)
    assert {name: x.shape for name, x in now.items()} == {name: x.shape for name, x in t.items()}
    for path, change in changes(load(out)).items():
        np.testing.assert_array_equal(change, changes(adapters)[path])


@pytest.mark.parametrize(
    ("rules", "peft_type", "words"),
    [
        ({"up": lr.randlora(2)}, "RANDLORA", "store=True"),
        ({"up": lr.vera(4), "down": lr.vera(3)}, "VERA", "methods of their own"),
        ({"table": lr.vera(4)}, "VERA", "table/embedding is not a matrix"),
        (
            {"table": lr.adalora(2, 2)},
            "ADALORA",
            "table/embedding: PEFT.s AdaLoRA has matrices and convolutions over 2",
        ),
        ({"rows": lr.ia3()}, None, "rows/kernel: PEFT's IA3 has matrices and convolutions over 2"),
        ({"rows": lr.adalora(2, 2)}, "ADALORA", "rows/kernel: PEFT's AdaLoRA has matrices and convolutions over 2"),
        ({"up": lr.lora(2)}, "IA3", "up/kernel: lora cannot be written as IA3.*to_lora"),
        ({"up": lr.ia3()}, "LORA", "up/kernel: ia3 cannot be written as LORA"),
        ({"up": lr.ia3(), "down": lr.lora(2)}, None, "cannot be written as"),
        ({"table": lr.trainable_tokens((1,)), "up": lr.full()}, None, "layers.*[Mm]erge"),
    ],
)
def test_what_a_type_cannot_hold(rules, peft_type: str | None, words: str, tmp_path: pathlib.Path) -> None:
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, rules, sites=SITES))
    with pytest.raises(lr.forms.UnsupportedError, match=words):
        peft.save(adapters, tmp_path / "out", name_map=NAMES, peft_type=peft_type)
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_lists_the_known(tmp_path: pathlib.Path) -> None:
    adapters = lr.init(jax.random.key(0), PARAMS, lr.plan(PARAMS, {"up": lr.lora(2)}))
    with pytest.raises(ValueError, match="peft_type='LOHA': expected one of ADALORA, IA3, LORA"):
        peft.save(adapters, tmp_path / "out", name_map=NAMES, peft_type="LOHA")


def test_ia3(tmp_path: pathlib.Path) -> None:
    t = ia3_tensors()
    adapters = load(write(tmp_path, IA3, t))
    sides = {entry.site.path: dict(entry.method.config)["side"] for entry in adapters.plan.entries}
    assert sides == {"up/kernel": "output", "down/kernel": "input", "conv/kernel": "input"}
    merged = lr.merge(PARAMS, adapters)
    l = t[UP + "ia3_l"].reshape(-1)
    np.testing.assert_allclose(merged["up"]["kernel"], PARAMS["up"]["kernel"] * l, atol=1e-6)
    np.testing.assert_allclose(merged["up"]["bias"], PARAMS["up"]["bias"] * l, atol=1e-6)
    np.testing.assert_allclose(merged["down"]["kernel"], PARAMS["down"]["kernel"] * t[DOWN + "ia3_l"].T, atol=1e-6)
    np.testing.assert_array_equal(merged["down"]["bias"], PARAMS["down"]["bias"])
    channels = t[CONV + "ia3_l"].reshape(1, 1, 4, 1)
    np.testing.assert_allclose(merged["conv"]["kernel"], PARAMS["conv"]["kernel"] * channels, atol=1e-6)
    assert assert_written_back(adapters, tmp_path)["feedforward_modules"] == ["conv", "layers.0.down"]
    ends = load(write(tmp_path, IA3 | {"feedforward_modules": ["own", "conv"]}, t))  # so PEFT compares names
    assert ends.plan == adapters.plan


def test_ia3_names_no_side_by_the_end_of_another_name(tmp_path: pathlib.Path) -> None:
    """PEFT takes any name that ends so for feedforward, not only whole words."""
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, {"a": lr.ia3(side="input"), "b": lr.ia3()}))
    out = peft.save(adapters, tmp_path / "out", name_map={"a": "in", "b": "main"})
    assert config_of(out)["feedforward_modules"] == "in" and config_of(out)["target_modules"] == "in|main"
    loaded = peft.load(out, params, name_map={"a": "in", "b": "main"})
    assert loaded.plan == adapters.plan


@pytest.mark.parametrize("rows", [[4, 1], {"embed_tokens": [4, 1]}], ids=["list", "dict"])
def test_trained_rows_beside_a_lora(rows, tmp_path: pathlib.Path) -> None:
    a, b, new = normal(2, 6), normal(8, 2), normal(2, 6)
    tensors = {UP + "lora_A.weight": a, UP + "lora_B.weight": b, TABLE + "token_adapter.trainable_tokens_delta": new}
    directory = write(tmp_path, LORA | {"target_modules": ["up"], "trainable_token_indices": rows}, tensors)
    adapters = load(directory)
    assert adapters.plan.by_path["table/embedding"].method == lr.trainable_tokens((4, 1))
    table = lr.merge(PARAMS, adapters)["table"]["embedding"]
    np.testing.assert_allclose(table, PARAMS["table"]["embedding"].at[jnp.array([4, 1])].set(new), atol=1e-6)
    config = assert_written_back(adapters, tmp_path)
    assert config["trainable_token_indices"] == {"embed_tokens": [4, 1]} and config["target_modules"] == ["layers.0.up"]


def test_trained_rows_alone(tmp_path: pathlib.Path) -> None:
    new = normal(2, 6)
    adapters = load(write(tmp_path, TOKENS, {TABLE + "trainable_tokens_delta": new}))
    np.testing.assert_array_equal(adapters.sites["table/embedding"]["rows"], new)
    config = assert_written_back(adapters, tmp_path)
    assert config["token_indices"] == [4, 1] and "modules_to_save" not in config


def test_trained_rows_of_a_head_of_its_own(tmp_path: pathlib.Path) -> None:
    params = {"head": {"kernel": jnp.asarray(normal(6, 9))}}
    new = normal(2, 6)
    write(tmp_path, TOKENS | {"target_modules": ["lm_head"]}, {PREFIX + "lm_head.trainable_tokens_delta": new})
    adapters = peft.load(tmp_path, params, name_map={"head": "lm_head"})
    merged = lr.merge(params, adapters)["head"]["kernel"]
    np.testing.assert_allclose(merged[:, jnp.array([4, 1])], new.T, atol=1e-6)


def test_one_list_of_rows_for_all_or_a_lora_beside_them(tmp_path: pathlib.Path) -> None:
    params = {name: {"embedding": jnp.ones((5, 2))} for name in ("one", "two")}
    rules = {"one": lr.trainable_tokens((1,)), "two": lr.trainable_tokens((2,))}
    adapters = lr.init(jax.random.key(0), params, lr.plan(params, rules))
    with pytest.raises(lr.forms.UnsupportedError, match="one/embedding and two/embedding train different rows"):
        peft.save(adapters, tmp_path / "out", name_map=lambda path, layer: path.split("/")[0])


@pytest.mark.parametrize(
    ("method", "peft_type"),
    [
        (lr.dora(rank=2, alpha=3), None),
        (lr.adalora(3, 2, alpha=5), "ADALORA"),
        (lr.vera(rank=5, store=True), "VERA"),
        (lr.randlora(rank=2, store=True), "RANDLORA"),
        (lr.ia3(), None),
        (lr.ia3(side="input"), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_stack_is_split_and_stacked_again(method, peft_type, layers, tmp_path: pathlib.Path) -> None:
    rule = method if layers is None else lr.on_layers(method, layers)
    adapters = lr.init(jax.random.key(0), STACKED, lr.plan(STACKED, {"heads/kernel": rule}))
    adapters = adapters.replace(sites=jax.tree.map(lambda x: x + 1, adapters.sites))
    out = peft.save(adapters, tmp_path / "out", name_map=STACK, peft_type=peft_type)
    assert len({name.split(".")[3] for name in tensors_of(out) if ".layers." in name}) == len(layers or range(3))
    loaded = peft.load(out, STACKED, name_map=STACK)
    for one, two in zip(loaded.plan.entries, adapters.plan.entries, strict=True):
        assert (one.site, one.layers, one.method.name) == (two.site, two.layers, two.method.name)
    jax.tree.map(np.testing.assert_array_equal, loaded.sites, adapters.sites)
    again = peft.save(loaded, tmp_path / "again", name_map=STACK, peft_type=peft_type)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / file).read_bytes() == (again / file).read_bytes()


def test_copies_of_the_projections_in_every_layer_are_taken_for_one(tmp_path: pathlib.Path) -> None:
    """So PEFT wrote RandLoRA before its files were made smaller."""
    t = randlora_tensors()
    expected = load(write(tmp_path / "one", RANDLORA, t))
    copies = {UP + name: t["base_model." + name] for name in ("randlora_A", "randlora_B")}
    got = load(write(tmp_path / "two", RANDLORA, t | copies))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
