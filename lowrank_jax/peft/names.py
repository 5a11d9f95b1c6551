"""Which module of the Hugging Face model each of our weights is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lowrank_jax.models import hf_map
from lowrank_jax.models.bert_config import BertConfig
from lowrank_jax.models.llama_config import LlamaConfig
from lowrank_jax.models.trees import Config
from lowrank_jax.peft.units import Parameter, Unit, depth, units
from lowrank_jax.sites import Site

Name = str | Parameter
NameMap = Mapping[str, Name | Sequence[Name]] | Callable[[str, int | None], Name | None]
"""``{path: module name}``, or one name for each element of a stacked weight; the path is the weight's or its module's. Or a function
``(path of the weight, element of its stack or None) -> module name or None``. Elements of several batch axes count row by row.
A `Parameter` in a name's place stands for several elements, the experts of a layer."""


@dataclass(frozen=True)
class Names:
    """Module names of a model.

    Attributes:
      of: ``site -> units``, one for each element of its stack, one if it is no stack, none if the other model lacks it.
      alias: brings a name in a file to a common spelling, in which names are compared.
      parts: ``{module: its parameters, 'weight' or 'bias'}`` of every module, or None where only the adapted ones are known.
      stacks: paths of stacked matrices, which cannot be recognised from the parameters alone.
      tied: paths of embeddings that are also the output head.
      task_type: what PEFT calls the model's task; ``head``: the module that PEFT expects in the file for that task, or None.
    """

    of: Callable[[Site], tuple[Unit, ...]]
    alias: Callable[[str], str] = str
    parts: Mapping[str, frozenset[str]] | None = None
    stacks: tuple[str, ...] = ()
    tied: frozenset[str] = field(default_factory=frozenset)
    task_type: str | None = None
    head: str | None = None

    @property
    def modules(self) -> frozenset[str] | None:
        """Every module of the model, containers included; None where unknown."""
        if self.parts is None:
            return None
        split = [name.split(".") for name in self.parts]
        return frozenset(".".join(words[:n]) for words in split for n in range(1, len(words) + 1))


def resolve(architecture: Config | None, name_map: NameMap | None) -> Names:
    """Names from whichever of the two arguments is given.

    Raises:
      TypeError: both or neither, or an architecture that is no configuration of a reference model.
    """
    if (architecture is None) == (name_map is None):
        raise TypeError(
            "Pass either architecture= (the configuration of a reference model, such as models.load(...).config) or name_map= "
            "({path of a weight: module name in the Hugging Face model})."
        )
    if name_map is not None:
        return Names(_custom(name_map))
    if not isinstance(architecture, BertConfig | LlamaConfig):
        raise TypeError(
            f"architecture: expected a BertConfig or LlamaConfig, such as models.load(...).config, got {type(architecture).__name__}. "
            "For another model pass name_map=."
        )
    return _reference(architecture)


def part_of(site: Site) -> str:
    """The name of the tensor in its torch module: ``weight`` (kernels, tables, scales) or ``bias``."""
    return "bias" if site.path.rpartition("/")[2] == "bias" else "weight"


def _custom(name_map: NameMap) -> Callable[[Site], tuple[Unit, ...]]:
    def of(site: Site) -> tuple[Unit, ...]:
        n = depth(site)
        found: Name | Sequence[Name | None] | None
        if not isinstance(name_map, Mapping):
            found = name_map(site.path, None) if n is None else [name_map(site.path, i) for i in range(n)]
        else:
            found = name_map.get(site.path, name_map.get(site.module))
        names = (found,) if isinstance(found, Name) or found is None else tuple(found)
        if all(name is None for name in names):
            return ()
        parameters = isinstance(names[0], Parameter)
        good = all(isinstance(name, Parameter) if parameters else isinstance(name, str) and name for name in names)
        # The bias of a stacked module goes by the module's names, which say nothing about its own axes.
        if not good or (not parameters and len(names) != (n or 1) and site.kind != "param"):
            raise ValueError(
                f"name_map gives {found!r} for {site.path}; expected {n or 1} module name(s), such as 'encoder.layer.0.query'."
            )
        return units(site, names)  # type: ignore[arg-type]

    return of


def _reference(config: Config) -> Names:
    table = hf_map.entries(config)
    modules: dict[str, tuple[str, ...]] = {}
    parts: dict[str, set[str]] = {}
    for entry in table:
        split = [hf_map.hf_name(config, name).rpartition(".") for name in entry.names]
        modules[entry.path] = tuple(module for module, _, _ in split)
        for module, _, part in split:
            parts.setdefault(module, set()).add(part)
    llama = isinstance(config, LlamaConfig)
    classifier = isinstance(config, BertConfig) and config.task == "classify" and config.classifier_pooling != "mean"
    table_path = "embed_tokens/embedding" if llama else "embeddings/word_embeddings/embedding"
    is_tied = config.tie_word_embeddings if isinstance(config, LlamaConfig) else config.task == "mlm"
    return Names(
        lambda site: units(site, modules.get(site.path, ())),
        hf_map.canonical,
        {module: frozenset(found) for module, found in parts.items()},
        tuple(entry.path for entry in table if entry.stacked and entry.transpose),
        frozenset({table_path}) if is_tied else frozenset(),
        "CAUSAL_LM" if llama else "SEQ_CLS" if classifier else None,
        "classifier" if classifier else None,
    )
