"""Scores of predictions, on the host, in numpy."""

from __future__ import annotations

import re

import numpy as np


def confusion(guess: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Counts ``[label, guess]``, int64 ``[classes, classes]``.

    Raises:
      ValueError: a label that is no class.

    Example:
      >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
      [[1, 1], [0, 1]]
    """
    outside = (label < 0) | (label >= classes)
    if outside.any():
        raise ValueError(f"label {int(label[outside][0])} is out of range: expected 0 to {classes - 1}.")
    return np.bincount(label * classes + guess, minlength=classes**2).reshape(classes, classes)


def accuracy(counts: np.ndarray) -> float:
    """The share of right guesses.

    Example:
      >>> accuracy(np.array([[1, 1], [0, 2]]))
      0.75
    """
    return float(np.trace(counts) / counts.sum())


def macro_f1(counts: np.ndarray) -> float:
    """The mean over classes of F1; a class that neither occurs nor is guessed is left out.

    Example:
      >>> round(macro_f1(np.array([[1, 1], [0, 2]])), 4)
      0.7333
    """
    total = counts.sum(axis=0) + counts.sum(axis=1)
    return float(np.mean(2 * np.diag(counts)[total > 0] / total[total > 0]))


def matthews(counts: np.ndarray) -> float:
    """The correlation coefficient of Matthews for any number of classes (Gorodkin 2004); 0 where it is not defined.

    Example:
      >>> round(matthews(np.array([[1, 1], [0, 2]])), 4)
      0.5774
    """
    counts = counts.astype(np.float64)
    n, right = counts.sum(), np.trace(counts)
    guessed, true = counts.sum(axis=0), counts.sum(axis=1)
    below = (n**2 - guessed @ guessed) * (n**2 - true @ true)
    return float((right * n - guessed @ true) / np.sqrt(below)) if below > 0 else 0.0


def pearson(guess: np.ndarray, score: np.ndarray) -> float:
    """The linear correlation of two arrays; 0 where one of them is constant.

    Example:
      >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
      1.0
    """
    a, b = guess - guess.mean(), score - score.mean()
    below = np.sqrt((a @ a) * (b @ b))
    return round(float(a @ b / below), 12) if below > 0 else 0.0


def answer(text: str) -> str:
    """What an answer comes down to: the number behind the last '####' (GSM8K, arXiv 2110.14168), else the text without its margins.

    Example:
      >>> answer("3 + 4 = 7. #### 1,007.0"), answer("  Paris ")
      ('1007', 'Paris')
    """
    if "####" not in text:
        return " ".join(text.split())
    found = re.search(r"-?[\d,]*\.?\d+", text.rpartition("####")[2])
    if found is None:
        return ""
    number = found.group().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
