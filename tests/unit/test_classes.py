"""What a found network says of each class: counted by hand, in a summary, and on the page."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from local_grid import run_all
from rounds import prepare

from fedmetanas_core.output.report import sections
from fedmetanas_core.output.report.facts import RunFacts
from fedmetanas_core.output.result import _short, guessing, weakest
from fedmetanas_core.search.evaluation import confusion
from fedmetanas_core.search.local_data import LocalData
from server_app.measuring import MOST_ANSWERS, by_class

LABELS = torch.tensor([0, 0, 0, 2, 2, 1])
SAID = torch.tensor([0, 1, 1, 2, 0, 1])
TAKEN = torch.tensor([[1, 1, 2, 0], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
COUNTS = torch.tensor([[1, 2, 0], [0, 1, 0], [1, 0, 1]])


def test_answers_are_counted_by_class_and_by_what_was_said() -> None:
    data = LocalData(torch.zeros(6, 1, 2, 2), LABELS, lambda images, generator: images)
    logits = torch.nn.functional.one_hot(SAID, 3).float()
    assert torch.equal(confusion(logits, data), COUNTS)


def test_classes_have_their_names_and_what_they_were_taken_for() -> None:
    found = by_class(("cat", "dog", "cow"), COUNTS)
    assert found == [
        {"name": "cat", "images": 3, "right": 1, "answers": [1, 2, 0]},
        {"name": "dog", "images": 1, "right": 1, "answers": [0, 1, 0]},
        {"name": "cow", "images": 2, "right": 1, "answers": [1, 0, 1]},
    ]
    assert guessing(found) == 0.5
    assert weakest(found) == [("cat", pytest.approx(1 / 3)), ("cow", 0.5), ("dog", 1.0)]


def test_answers_of_very_many_classes_are_left_out() -> None:
    many = MOST_ANSWERS + 1
    found = by_class([str(number) for number in range(many)], torch.eye(many, dtype=torch.int64))
    assert found[-1] == {"name": str(many - 1), "images": 1, "right": 1}


def test_a_run_and_its_page_agree_on_the_classes(tmp_path: Path) -> None:
    run, grid = prepare(tmp_path, num_rounds=4)
    summary = run_all(run, grid)
    run.folder.write_summary(summary)
    classes = summary["test_classes"]
    labels = run.experiment.dataset.test.labels
    assert [each["images"] for each in classes] == [int((labels == number).sum()) for number in range(10)]
    assert [sum(each["answers"]) for each in classes] == [each["images"] for each in classes]
    right = sum(each["right"] for each in classes)
    assert summary["test_accuracy"] == right / len(labels)
    page = sections.classes(RunFacts.of(run.folder.path))
    assert page.count("<tr>") == 1 + 10
    assert all(f"<td>{name}</td>" in page for name in run.experiment.dataset.class_names)


def page_of(classes: list[dict[str, object]]) -> str:
    nothing = np.zeros((0, 0), dtype=np.int64)
    return sections.classes(RunFacts("run", Path(), {}, [], [], {"test_classes": classes}, nothing, ()))


def test_the_page_says_what_each_class_was_taken_for_and_which_had_no_images() -> None:
    page = page_of(by_class(("cat", "<dog>", "cow", "emu"), TAKEN))
    rows = re.findall(r"<tr><td>(.*?)</td>.*?>([\d.]+ %)</td><td>(.*?)</td></tr>", page)
    cat, *others = rows
    assert cat == ("cat", "25.0 %", "cow (2), &lt;dog&gt; (1)")
    assert others == [("&lt;dog&gt;", "100.0 %", ""), ("cow", "100.0 %", "")]
    assert "Without a test image: emu." in page


def test_the_page_of_very_many_classes_has_the_weakest_and_no_empty_column() -> None:
    many = MOST_ANSWERS + 1
    page = page_of(by_class([str(number) for number in range(many)], torch.eye(many, dtype=torch.int64)))
    assert page.count("<tr>") == 1 + sections.MOST_CLASSES
    assert f"The {sections.MOST_CLASSES} weakest of {many} classes." in page
    assert "taken for" not in page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ten letter", "ten letter"),
        ("eleven lett", "eleven le…"),
        ("abcdefg\x1b[31m long", "abcdefg…"),  # of \x1b nothing rather than a part
        ("\n\n\n", "\\n\\n\\n"),
        ("", ""),
    ],
)
def test_a_long_name_is_cut_between_letters(name: str, shown: str) -> None:
    assert _short(name) == shown
