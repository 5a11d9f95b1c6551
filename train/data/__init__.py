"""Data for fine-tuning: tensorflow-datasets is the source, grain the loader.

    builders/    what data sets there are and how their files become records
    tokens       a split as tokens, made once and mapped
    encode       records to tokens
    batching     which examples go into which batch
    collate      the arrays of a batch
    loader       batches in order, resumable at any step

`load` is the way in.
"""

from train.data.builders.source import DataError
from train.data.load import load
from train.data.loader import Loader, TrainIterator

__all__ = ["DataError", "Loader", "TrainIterator", "load"]
