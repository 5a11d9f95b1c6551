"""What a run needs a device, and the search for a mesh and a remat policy that fit, on virtual CPU devices."""

from __future__ import annotations

import types

import pytest
import tiny

from lowrank_jax import chips
from lowrank_jax.memory import DoesNotFitError
from train import fit, preview
from train.config import ConfigError

LENGTH, TOTAL = 16, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tiny.config(tmp_path_factory.mktemp("fit"))
    out.batch_size, out.accumulate = 8, 1
    return out


def _needs(config, **mesh):
    config = fit._with(config, dict.fromkeys(config.mesh, 1) | mesh, config.model.remat)
    devices = preview.mesh(config, "cpu")
    model = preview.abstract_model(config, 3, devices)
    return preview.needs(config, model, preview.make_plan(config, model), devices, TOTAL, 0, LENGTH)


def test_the_parts_are_the_whole_and_a_mesh_divides_them(config):
    one, four = _needs(config), _needs(config, fsdp=4)
    for found in (one, four):
        parts = (found.base, found.adapters, found.optimizer, found.activations)
        assert min(parts) > 0 and sum(parts) == found.report.peak
        assert found.useful <= found.report.flops
    assert four.base < one.base and four.report.flops == one.report.flops / 4
    assert one.report.sent == 0 < four.report.sent


def test_recomputation_is_no_use(config):
    policies = [fit._with(config, config.mesh.to_dict(), remat) for remat in ("none", "full")]
    plain, full = map(_needs, policies)
    assert full.useful == plain.useful == plain.report.flops < full.report.flops


def test_every_mesh_gets_the_first_policy_that_fits(config, monkeypatch):
    measured = preview.needs

    def needs(tried, model, plan, mesh, *rest):
        if tried.model.remat == "none" or mesh.shape["tensor"] == 2:
            raise DoesNotFitError("needs 17 of 16 GiB")
        return measured(tried, model, plan, mesh, *rest)

    monkeypatch.setattr(preview, "needs", needs)
    monkeypatch.setattr(fit, "topology_devices", lambda topology: range(4))
    tried = []
    found = fit.search(config, "cpu", LENGTH, TOTAL, 3, ("none", "full"), tried.append)
    assert [(choice.sizes["tensor"], choice.remat, choice.needs is None) for choice in found[-1:]] == [
        (2, "full", True)
    ]
    assert all(choice.remat == "full" and choice.needs for choice in found[:-1]) and len(found) > 2
    assert len(tried) == 2 * len(found)
    text = fit.report(found, "a title", 8 * LENGTH)
    assert "not even full" in text and "fsdp 4" in text and "data 4" in text


def test_what_cannot_be_is_said_before_anything_is_compiled(config, monkeypatch):
    monkeypatch.setattr(chips, "CHIPS", {"cpu": chips.Chip(1e12, 1e9, 1e9, 1000)})
    with pytest.raises(DoesNotFitError, match=r"Base, adapters and optimizer alone take .* which has 1000 B"):
        _needs(config)
    monkeypatch.setattr(fit, "topology_devices", lambda topology: range(7))
    with pytest.raises(ConfigError, match=r"batch_size=8: expected a multiple .* 7 chips"):
        fit.search(config, "cpu", LENGTH, TOTAL, 3)


def test_times_come_from_the_table_of_chips(config):
    report = types.SimpleNamespace(seconds=2.0, flops=8e9, sent=0, peak=1)
    cells = preview.cells(preview.Needs(0, 0, 0, 1, report, 4e9), chips.Chip(10e9, 1e9, 1e9, 1), tokens=100)
    assert cells[-3:] == ("2 s", "50", "20%")
    assert preview.cells(preview.Needs(0, 0, 0, 1, report, 4e9), None, 100)[-3:] == ("-", "-", "-")
