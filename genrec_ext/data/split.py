"""The leave-one-out split: last item to test, the one before to validation, the rest to training.

Touches arrays only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .interactions import DataError, Interactions


@dataclass(frozen=True, eq=False)
class Split:
    """A leave-one-out split, users in the order of the data.

    Args:
        train: one int64 array a user, all but the last two items.
        valid_targets: int64 `[num_users]`, each user's last item but one.
        test_targets: int64 `[num_users]`, each user's last item.
        num_items: size of the catalogue.
    """

    train: list[np.ndarray]
    valid_targets: np.ndarray
    test_targets: np.ndarray
    num_items: int

    def valid_histories(self) -> list[np.ndarray]:
        """What is known before the validation target: the training items."""
        return self.train

    def test_histories(self) -> list[np.ndarray]:
        """What is known before the test target: the training items, then the validation item."""
        return [
            np.append(history, target)
            for history, target in zip(self.train, self.valid_targets, strict=True)
        ]

    def train_counts(self) -> np.ndarray:
        """Occurrences of each item in training, int64 `[num_items]`; 0 marks a cold item."""
        return np.bincount(np.concatenate(self.train), minlength=self.num_items)


def leave_one_out(data: Interactions) -> Split:
    """Split every user's sequence into training items, validation target and test target.

    Raises:
        DataError: there is no user, or a user has fewer than three items.
    """
    if not data.sequences:
        raise DataError(f"{data.name}: no users; expected at least one")
    for user, sequence in zip(data.user_ids, data.sequences, strict=True):
        if len(sequence) < 3:
            raise DataError(
                f"{data.name}: user {user!r} has {len(sequence)} items; expected at least 3, "
                "one each to train, validate and test"
            )
    return Split(
        train=[sequence[:-2] for sequence in data.sequences],
        valid_targets=np.array([sequence[-2] for sequence in data.sequences], dtype=np.int64),
        test_targets=np.array([sequence[-1] for sequence in data.sequences], dtype=np.int64),
        num_items=data.num_items,
    )
