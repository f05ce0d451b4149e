"""The built-in task: scikit-learn's digits, split once and for all."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from adq.quant.batches import Batches
from adq.search.task import load_task


def whole(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(batches)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_the_splits_share_out_all_digits_between_them() -> None:
    task = load_task("digits")
    train = task.train.dataset[:]  # type: ignore[attr-defined]  (its loader drops the last images)
    everything = [train, whole(task.validation), whole(task.test)]
    assert [len(y) for _, y in everything] == [897, 450, 450]
    images = torch.cat([x for x, _ in everything]).numpy()
    labels = torch.cat([y for _, y in everything]).numpy()
    data = load_digits()
    pixels = data.images / 16
    expected = (pixels - pixels.mean()) / pixels.std()

    def ordered(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        flat = np.column_stack([rows.reshape(len(rows), -1).round(3), targets])
        return flat[np.lexsort(flat.T)]

    np.testing.assert_allclose(ordered(images, labels), ordered(expected, data.target), atol=2e-3)


def test_every_class_has_its_share_of_each_split() -> None:
    task = load_task("digits")
    share = np.bincount(load_digits().target) / 1797
    for batches in (task.validation, task.test):
        counts = torch.bincount(whole(batches)[1], minlength=10).numpy()
        np.testing.assert_allclose(counts, share * 450, atol=1)


def test_the_split_is_the_same_each_time_and_training_is_shuffled() -> None:
    first, second = load_task("digits"), load_task("digits")
    assert torch.equal(whole(first.test)[0], whole(second.test)[0])
    torch.manual_seed(0)
    one, other = (next(iter(first.train))[1] for _ in range(2))
    assert not torch.equal(one, other)


def test_no_training_batch_is_short() -> None:
    task = load_task("digits")
    assert {len(y) for _, y in task.train} == {64}


def test_the_model_takes_a_batch_and_gives_ten_classes() -> None:
    task = load_task("digits")
    model = task.model()
    x, y = next(iter(task.train))
    assert model(x).shape == (64, 10)
    assert task.loss(model(x), y).isfinite()
    assert task.metric(model(x), y).shape == (64,)
