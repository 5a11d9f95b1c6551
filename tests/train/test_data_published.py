"""The published files, where they are at hand: every row is read and nothing is read twice."""

import pathlib

import pytest

from train.data.builders.prepare import SOURCES

DATA = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"

COUNTS = {
    "glue/cola": ("glue/CoLA", {"train": 8_551, "validation": 1_043}),
    "glue/mrpc": ("glue/MRPC", {"train": 3_667, "validation": 408}),
    "glue/rte": ("glue/RTE", {"train": 2_490, "validation": 277}),
    "glue/sst2": ("glue/SST-2", {"train": 67_349, "validation": 872}),
    "glue/stsb": ("glue/STS-B", {"train": 5_749, "validation": 1_500}),
    "glue/wnli": ("glue/WNLI", {"train": 635, "validation": 71}),
    "gsm8k": ("gsm8k", {"train": 7_473, "test": 1_319}),
    "e2e": ("e2e_nlg", {"validation": 4_672, "test": 4_693}),
    "banking77": ("banking77", {"train": 10_003, "test": 3_080}),
    "instructions": ("commonsense/boolq", {"train": 9_427, "test": 3_270}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_row_counts(name):
    folder, expected = COUNTS[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"{folder} is not beside the repository")
    source = SOURCES[name]
    readers = source.read(source.files(DATA / folder))
    assert {split: sum(1 for _ in read()) for split, read in readers.items()} == expected


@pytest.mark.slow
def test_sizes_of_the_tweets_and_articles():
    from lowrank_jax import assets

    sizes = {}
    for name in ("tweets", "bbc"):
        source = SOURCES[name]
        readers = source.read(source.files(assets.fetch(name)))
        sizes[name] = {split: len(list(read())) for split, read in readers.items()}
    assert sizes == {
        "tweets": {"validation": 2_000, "test": 4_000, "train": 31_203},
        "bbc": {"validation": 200, "test": 400, "train": 1_524},
    }
