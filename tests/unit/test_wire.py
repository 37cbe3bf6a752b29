import dataclasses

import pytest
import torch
from flwr.app import RecordDict

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation import wire
from fedmetanas_core.federation.screening import Screening
from fedmetanas_core.federation.update import ClientUpdate, Evaluation, Payload, ServerState
from fedmetanas_core.search.schedule import Schedule
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.spec import SpaceSpec
from fedmetanas_core.space.supernet import Supernet

SPEC = SpaceSpec(4, 3, 3, 1, 10, 8, 8)
SENT = (torch.empty(0), torch.empty(0))  # what the client got; counts only where changes are compressed
NPY_HEADER = 128  # bytes that numpy puts before the data of a small array


def make_state() -> ServerState:
    architecture = Architecture(SPEC).initialise(torch.Generator().manual_seed(0))
    architecture.without_none()
    supernet = Supernet(SPEC, architecture.operation_mask)
    supernet.initialise(torch.Generator().manual_seed(1))
    return ServerState(SPEC, supernet.weights.detach().clone(), supernet.statistics.clone(), architecture)


def make_payload() -> Payload:
    state = make_state()
    plan = Schedule(num_rounds=20, num_nodes=3, seed=5).plan(7)
    return Payload(state.weights, state.statistics, state.architecture, plan)


def make_update(votes: bool = False) -> ClientUpdate:
    state = make_state()
    kept = (state.architecture.operation_mask, state.architecture.input_mask) if votes else None
    return ClientUpdate(
        client=7,
        round=3,
        mask_version=1,
        num_examples=64,
        weights=state.weights,
        statistics=state.statistics,
        operation_logits=state.architecture.operation_logits.detach(),
        input_logits=state.architecture.input_logits.detach(),
        votes=kept,
        metrics={name: 2.0**power for power, name in enumerate(wire.REPORTED, start=-2)},
        note="slow: no compiler" if votes else "",
    )


IDENTITY = wire.RunIdentity('{"seed": 5}', "abc", "code", "0" * 32, "/runs/one")


def test_a_payload_survives_the_wire() -> None:
    sent = make_payload()
    record = wire.encode_payload(sent, wire.encode_run(IDENTITY))
    payload = wire.decode_payload(record, lambda plan: SPEC)
    assert payload.plan == sent.plan
    assert payload.alphas
    assert torch.equal(payload.weights, sent.weights)
    assert torch.equal(payload.statistics, sent.statistics)
    for name, tensor in sent.architecture.state_dict().items():
        assert torch.equal(payload.architecture.state_dict()[name], tensor), name
    assert payload.architecture.version == 1
    assert wire.decode_run(record) == IDENTITY


def test_a_payload_for_another_space_is_named() -> None:
    record = wire.encode_payload(make_payload(), wire.encode_run(IDENTITY))
    with pytest.raises(FedMetaNASError, match="does not fit this space"):
        wire.decode_payload(record, lambda plan: dataclasses.replace(SPEC, num_nodes=4))


def test_what_is_empty_or_not_shared_does_not_travel() -> None:
    sent = dataclasses.replace(make_payload(), statistics=torch.empty(0), alphas=False)
    record = wire.encode_payload(sent, wire.encode_run(IDENTITY))
    assert set(record.array_records[wire.ARRAYS]) == {"w/weights"}
    payload = wire.decode_payload(record, lambda plan: SPEC)
    assert not payload.alphas
    assert len(payload.statistics) == 0
    assert torch.equal(payload.architecture.operation_mask, sent.architecture.operation_mask)
    assert not payload.architecture.operation_logits.any()


@pytest.mark.parametrize("votes", [False, True])
def test_an_update_survives_the_wire(votes: bool) -> None:
    update = make_update(votes)
    back = wire.decode_update(wire.encode_update(update), SENT)
    for name, tensor in update.named_tensors().items():
        assert torch.equal(back.named_tensors()[name], tensor)
    assert (back.client, back.round, back.mask_version, back.num_examples) == (7, 3, 1, 64)
    assert back.metrics == update.metrics
    assert back.note == update.note
    if votes:
        assert update.votes is not None
        assert back.votes is not None
        assert all(torch.equal(a, b) for a, b in zip(back.votes, update.votes, strict=True))
    else:
        assert back.votes is None


def test_uplink_bytes_are_those_of_the_serialised_arrays() -> None:
    update = make_update()
    floats = sum(tensor.numel() for tensor in update.named_tensors().values())
    assert wire.array_bytes(wire.encode_update(update)) == 4 * floats + 4 * NPY_HEADER


def test_a_reply_without_its_parts_is_named() -> None:
    with pytest.raises(FedMetaNASError, match="reply without"):
        wire.decode_update(RecordDict(), SENT)
    with pytest.raises(FedMetaNASError, match="c/weights"):
        wire.decode_update(wire.encode_update(make_update()), SENT, "int8")


@pytest.mark.parametrize(("array", "words"), [("w/weights", "weights has shape (0,)"), ("a/input_logits", "missing")])
def test_a_reply_without_what_was_asked_for_is_refused_by_name(array: str, words: str) -> None:
    """What is empty does not travel, so only whoever knows what has to come back can tell."""
    sent, record = make_payload(), wire.encode_update(dataclasses.replace(make_update(), round=7))
    whole = wire.decode_update(record, SENT)
    no_variances = torch.empty(0, dtype=torch.long)
    assert Screening().alone(whole, sent, whole.named_tensors(), no_variances) is None
    del record.array_records[wire.ARRAYS][array]
    reason = Screening().alone(wire.decode_update(record, SENT), sent, whole.named_tensors(), no_variances)
    assert reason is not None
    assert words in reason
    assert array.partition("/")[2] in reason


@pytest.mark.parametrize("count", [float("nan"), 7.5, float("inf")])
def test_a_count_that_is_no_whole_number_is_refused(count: float) -> None:
    record = wire.encode_update(make_update())
    record.metric_records[wire.METRICS][wire.EXAMPLES] = count
    with pytest.raises(FedMetaNASError, match=r"num-examples is .*, which is not a whole number"):
        wire.decode_update(record, SENT)


def test_an_array_that_nobody_asked_for_is_refused_by_name() -> None:
    record = wire.encode_update(make_update())
    record.array_records[wire.ARRAYS]["w/backdoor"] = record.array_records[wire.ARRAYS]["w/weights"]
    with pytest.raises(FedMetaNASError, match="w/backdoor, which was not asked for"):
        wire.decode_update(record, SENT)
    record = wire.encode_update(make_update())
    record["more"] = record.array_records[wire.ARRAYS]
    with pytest.raises(FedMetaNASError, match="more, which was not asked for"):
        wire.decode_update(record, SENT)


@pytest.mark.parametrize(
    ("name", "value"), [("train_loss", float("nan")), ("seconds", float("inf")), ("compute_seconds", -1.0)]
)
def test_a_reply_with_a_senseless_figure_is_named(name: str, value: float) -> None:
    record = wire.encode_update(make_update())
    record.metric_records[wire.METRICS][name] = value
    with pytest.raises(FedMetaNASError, match=f"{name} is {value}, which cannot be"):
        wire.decode_update(record, SENT)
    del record.metric_records[wire.METRICS][name]
    with pytest.raises(FedMetaNASError, match=f"reply without '{name}'"):
        wire.decode_update(record, SENT)


def numpy_file(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1") + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 no archive",
        b"no numbers",
        numpy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }"),
        numpy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 80,), }"),
        numpy_file("{'descr': '<f4', ((("),
        numpy_file("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n."),
    ],
)
def test_bytes_that_are_no_array_are_refused_by_name(data: bytes) -> None:
    record = wire.encode_update(make_update())
    record.array_records[wire.ARRAYS]["w/weights"].data = data
    with pytest.raises(FedMetaNASError, match="the array w/weights cannot be read: "):
        wire.decode_update(record, SENT)


@pytest.mark.parametrize("count", [float("inf"), 7.5])
def test_an_evaluation_over_no_whole_number_of_images_is_refused(count: float) -> None:
    record = wire.encode_evaluation(Evaluation(3, 7, {"accuracy": 0.5}))
    assert wire.decode_evaluation(record) == Evaluation(3, 7, {"accuracy": 0.5})
    record.metric_records[wire.METRICS][wire.EXAMPLES] = count
    with pytest.raises(FedMetaNASError, match=r"num-examples is .*, which is not a whole number"):
        wire.decode_evaluation(record)
