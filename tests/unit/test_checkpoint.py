"""The checkpoint: exact, atomic, and never half believed."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmetanas_core.errors import RunFailedError
from fedmetanas_core.run.checkpoint import (
    KIND,
    PREVIOUS_FILE,
    STATE_FILE,
    load_checkpoint,
    save_checkpoint,
)

TENSORS = {
    "weights": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "mask": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "half": torch.tensor([0.5, float("nan")], dtype=torch.bfloat16),
    "exact": torch.tensor([math.pi], dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}
FACTS = {"round": 12, "phase": "search", "best": float("inf"), "history": [0.1, None], "name": "Zürich"}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(tensor))


def test_everything_comes_back(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, TENSORS, FACTS)
    tensors, facts = load_checkpoint(directory)
    assert_same(tensors, TENSORS)
    assert facts == FACTS
    assert [path.name for path in directory.iterdir()] == [STATE_FILE]
    tensors["weights"] += 1  # what is loaded can be trained on


def test_views_and_shared_memory_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given_tensors = {"whole": base, "column": base[:, 1], "transposed": base.t(), "again": base}
    parameter = torch.nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path, {**given_tensors, "parameter": parameter}, {})
    assert_same(load_checkpoint(tmp_path)[0], {**given_tensors, "parameter": parameter.detach()})


def test_the_state_before_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, {"t": torch.tensor(number)}, {"round": number})
    assert load_checkpoint(tmp_path)[1] == {"round": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS_FILE, STATE_FILE]
    # a crash between the two renames leaves only the previous file
    (tmp_path / STATE_FILE).unlink()
    assert load_checkpoint(tmp_path)[1] == {"round": 2}


def test_a_failed_save_leaves_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, {"t": torch.tensor(1)}, {"round": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunFailedError, match="No space left"):
            save_checkpoint(tmp_path, {"t": torch.tensor(2)}, {"round": 2})
    assert load_checkpoint(tmp_path)[1] == {"round": 1}
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="no checkpoint in"):
        load_checkpoint(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    save_checkpoint(tmp_path, TENSORS, FACTS)
    content = bytearray((tmp_path / STATE_FILE).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / STATE_FILE).write_bytes(content)
    refusal = ""
    try:
        tensors, facts = load_checkpoint(tmp_path)
    except RunFailedError as error:
        refusal = str(error)
    if refusal:
        assert STATE_FILE in refusal
        assert "\n" not in refusal
    else:  # such as the case of a hexadecimal digit in an escape
        assert_same(tensors, TENSORS)
        assert facts == FACTS


def test_every_flipped_bit_of_the_tensors_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"t": torch.tensor([1.0, 2.0])}, {})
    content = (tmp_path / STATE_FILE).read_bytes()
    for bit in range(64):
        flipped = bytearray(content)
        flipped[len(content) - 8 + bit // 8] ^= 1 << bit % 8
        (tmp_path / STATE_FILE).write_bytes(flipped)
        with pytest.raises(RunFailedError, match="checksum"):
            load_checkpoint(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, FACTS)
    content = (tmp_path / STATE_FILE).read_bytes()
    for length in [*range(0, len(content), 13), len(content) - 1]:
        (tmp_path / STATE_FILE).write_bytes(content[:length])
        with pytest.raises(RunFailedError, match=STATE_FILE):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a zip file, like those torch.save writes", b"\xff" * 64, bytes(64)]
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(RunFailedError, match=STATE_FILE):
        load_checkpoint(tmp_path)


def test_other_safetensors_and_newer_versions_are_refused(tmp_path: Path) -> None:
    for metadata, reason in (
        (None, "not written by this program"),
        ({"format": "pt"}, "not a fedmetanas-checkpoint of this program"),
        ({"format": KIND, "version": "3", "facts": "{}", "sha256": ""}, "format version 3, this program reads"),
    ):
        (tmp_path / STATE_FILE).write_bytes(safetensors.torch.save({"t": torch.ones(1)}, metadata))
        with pytest.raises(RunFailedError, match=reason):
            load_checkpoint(tmp_path)


def test_changed_facts_and_renamed_tensors_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"alphas": torch.ones(2)}, {"round": 12})
    save_checkpoint(tmp_path, {"alphas": torch.ones(2)}, {"round": 13})
    content = (tmp_path / STATE_FILE).read_bytes()
    for old, new in ((b'\\"round\\": 13', b'\\"round\\": 99'), (b'"alphas"', b'"alphaz"')):
        assert old in content
        (tmp_path / STATE_FILE).write_bytes(content.replace(old, new))
        with pytest.raises(RunFailedError, match="checksum; the state before it, of round 12, is whole"):
            load_checkpoint(tmp_path)


def test_facts_are_plain_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {}, {"loss": torch.tensor(0.5), "shape": (1, 2)})
    assert load_checkpoint(tmp_path) == ({}, {"loss": 0.5, "shape": [1, 2]})
    content = (tmp_path / STATE_FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["facts"]) == {"loss": 0.5, "shape": [1, 2]}
