"""How a client's images are paired into tasks."""

import pytest
import torch
from helpers import stream

from fedmetanas_core.search.local_data import draw_steps


def test_600_images_in_batches_of_32_give_nine_disjoint_pairs() -> None:
    tasks = draw_steps(600, 32, stream(0))
    assert len(tasks) == 9
    assert all(len(support) == len(query) == 32 for support, query in tasks)
    used = torch.cat([part for task in tasks for part in task])
    assert len(used.unique()) == 9 * 64
    assert int(used.min()) >= 0
    assert int(used.max()) < 600


@pytest.mark.parametrize(
    ("count", "batch_size", "tasks", "size"),
    [
        (64, 32, 1, 32),
        (63, 32, 1, 31),
        (40, 32, 1, 20),
        (2, 32, 1, 1),
        (3, 32, 1, 1),
        (96, 32, 1, 32),
        (128, 32, 2, 32),
        (10, 1, 5, 1),
    ],
)
def test_tasks_of_small_clients(count: int, batch_size: int, tasks: int, size: int) -> None:
    drawn = draw_steps(count, batch_size, stream(1))
    assert len(drawn) == tasks
    for support, query in drawn:
        assert len(support) == len(query) == size
        assert not set(support.tolist()) & set(query.tolist())


def test_one_image_is_support_and_query() -> None:
    ((support, query),) = draw_steps(1, 32, stream(1))
    assert support.tolist() == query.tolist() == [0]


def test_a_single_task_is_one_whatever_the_data() -> None:
    for count in (1, 2, 40, 600):
        drawn = draw_steps(count, 32, stream(3), single=True)
        assert len(drawn) == 1
        assert torch.equal(drawn[0][1], draw_steps(count, 32, stream(3))[0][1])


def test_tasks_are_drawn_anew_each_epoch_and_reproducibly() -> None:
    generator = stream(4)
    first, second = (draw_steps(600, 32, generator) for _ in range(2))
    assert not torch.equal(first[0][1], second[0][1])
    assert torch.equal(first[0][1], draw_steps(600, 32, stream(4))[0][1])
