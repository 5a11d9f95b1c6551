"""How the model computes (loss in chunks, attention, remat) is a run's to say."""

import pytest
import tiny

from train import config as configs
from train import job, preview


def causal(root, **model):
    config = configs.base()
    config.task, config.steps = "causal_lm", 1
    config.model.source = str(root if (root / "config.json").exists() else tiny.llama(root))
    config.model.update(model)
    config.adapter = configs.rule("lamda", ".*/q_proj", rank=2)
    return config


def test_the_fields_reach_the_loaded_and_the_planned_model(tmp_path):
    config = causal(tmp_path, attention="splash", loss_chunk=8, remat="adapter_offload")
    configs.check(config)
    for model in (job.load_model(config), preview.abstract_model(config, 0)):
        found = model.module.config
        assert found == model.config
        assert (found.attention_implementation, found.loss_chunk, found.remat) == ("splash", 8, "adapter_offload")


def test_a_chunk_is_a_shards(tmp_path):
    config = causal(tmp_path, loss_chunk=8)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 3, 4
    assert configs.model_fields(config) == {"attention_implementation": None, "loss_chunk": 48}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "flash"}, "model.attention"),
        ({"loss_chunk": -1}, "model.loss_chunk"),
        ({"attention": "splash", "mesh": 2}, "one device"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path, changes, words):
    config = causal(tmp_path)
    config.mesh.data = changes.pop("mesh", 1)
    config.model.update(changes)
    with pytest.raises(configs.ConfigError, match=words):
        configs.check(config)
