"""Between this project's values and Flower's records; the only place in the core that knows them.

Down: ``arrays`` (flat weights and statistics of the alive network, logits), ``masks`` (uint8) and ``plan``.
Up: ``arrays`` of the same keys (and keep bits, where clients vote; the mask of what was touched, where that is less),
``metrics``, as Flower's FedAvg expects, and what the client has ``said`` in words. With compression, bytes that stand
for the weights' changes since the payload and for the statistics take their place. What a method does not share, and
what is empty, is not there.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmetanas_core.errors import FedMetaNASError
from fedmetanas_core.federation.compression import Sent, apply_changes
from fedmetanas_core.federation.update import ClientUpdate, Evaluation, Payload, RoundPlan
from fedmetanas_core.space.architecture import Architecture
from fedmetanas_core.space.fixed import Space

ARRAYS, MASKS, PLAN, RUN, METRICS, SAID = "arrays", "masks", "plan", "run", "metrics", "said"
CLIENT, QUESTION, NODE = "client", "question", "node"
EXAMPLES = "num-examples"  # the key by which Flower's strategies weight replies
_TENSORS = ("w/weights", "w/statistics", "a/operation_logits", "a/input_logits")
_CHANGES = ("c/weights", "c/statistics")
_VOTES = ("v/operations", "v/inputs")
_TOUCHED, _SCORES = "t/operations", "s/operations"
_MASKS = ("operations", "inputs")
_NAMES = dict(zip(("weights", "statistics", "operation_logits", "input_logits"), _TENSORS, strict=True))
_FACTS = ("round", "client", "mask_version")
_NOTE, _GENOTYPE, _RUN_ID = "note", "genotype", "run_id"
_KNOWN = frozenset((*_TENSORS, *_CHANGES, *_VOTES, _TOUCHED, _SCORES))
LONGEST_NOTE = 300
_COSTS = ("seconds", "compute_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")
REPORTED = ("train_loss", "support_loss", *_COSTS)  # what every update says of itself


def array_bytes(record: RecordDict) -> int:
    """Bytes of all serialised arrays in a message."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def _to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def _tensor(record: ArrayRecord, name: str) -> Tensor:
    if name not in record:
        raise FedMetaNASError(f"message without the array {name}")
    try:
        return torch.from_numpy(record[name].numpy())  # read from bytes, so nobody else has it
    except Exception as error:  # numpy's reader of files, given any bytes, fails in more ways than it names
        what = f"{type(error).__name__}: {error}"[:LONGEST_NOTE]
        raise FedMetaNASError(f"the array {name} cannot be read: {what}") from error


def encode_payload(payload: Payload, run: ConfigRecord) -> RecordDict:
    """One client's message; ``run`` identifies the run and its code."""
    architecture, plan = payload.architecture, payload.plan
    tensors = dict(zip(_TENSORS, (payload.weights, payload.statistics, *_logits(architecture)), strict=True))
    if not payload.alphas:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("a/")}
    masks = {name: mask.to(torch.uint8) for name, (_, mask) in zip(_MASKS, architecture.rows(), strict=True)}
    facts = {**asdict(plan), "pair_caps": list(plan.pair_caps), "mask_version": architecture.version}
    return RecordDict(
        {ARRAYS: _to_record(_filled(tensors)), MASKS: _to_record(_filled(masks)), PLAN: ConfigRecord(facts), RUN: run}
    )


def addressed(record: RecordDict, client: int) -> RecordDict:
    """The same message for one client, which is told its number; arrays are shared, not copied."""
    return RecordDict({**record, CLIENT: ConfigRecord({"number": client})})


def decode_client(record: RecordDict) -> int:
    """The number that ``addressed`` told; FedMetaNASError if it is not there."""
    try:
        return int(record.config_records[CLIENT]["number"])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise FedMetaNASError(f"message without its client's number: {error}") from error


def _logits(architecture: Architecture) -> tuple[Tensor, Tensor]:
    return architecture.operation_logits.detach(), architecture.input_logits.detach()


def _filled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that hold anything; whoever reads fills in the empty ones."""
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def decode_payload(record: RecordDict, space_of: Callable[[RoundPlan], Space]) -> Payload:
    """What ``encode_payload`` sent, in the plan's space; FedMetaNASError if something is missing or does not fit."""
    try:
        arrays, masks = record.array_records[ARRAYS], record.array_records[MASKS]
        facts: dict[str, Any] = dict(record.config_records[PLAN])
        version, facts["pair_caps"] = int(facts.pop("mask_version")), tuple(facts["pair_caps"])
        plan = RoundPlan(**facts)
    except (KeyError, TypeError, ValueError) as error:
        raise FedMetaNASError(f"message without a complete plan: {error}") from error
    architecture = Architecture(space_of(plan))
    try:
        with torch.no_grad():
            for name, mask_name, (logits, mask) in zip(_TENSORS[2:], _MASKS, architecture.rows(), strict=True):
                if logits.numel():
                    mask.copy_(_tensor(masks, mask_name).bool())
                    if name in arrays:
                        logits.copy_(_tensor(arrays, name))
    except RuntimeError as error:
        raise FedMetaNASError(f"the server's architecture does not fit this space: {error}") from error
    architecture.version = version
    weights, statistics = (_tensor_or_empty(arrays, name) for name in _TENSORS[:2])
    return Payload(weights, statistics, architecture, plan, alphas=_TENSORS[2] in arrays)


def _tensor_or_empty(record: ArrayRecord, name: str) -> Tensor:
    return _tensor(record, name) if name in record else torch.empty(0)


def encode_update(update: ClientUpdate) -> RecordDict:
    """A client's reply."""
    tensors = _filled({_NAMES[name]: tensor for name, tensor in update.named_tensors().items()})
    if update.changes is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("a/")}
        tensors.update(zip(_CHANGES, map(torch.from_numpy, update.changes), strict=True))
    if update.votes is not None:
        tensors.update(zip(_VOTES, (vote.to(torch.uint8) for vote in update.votes), strict=True))
    if update.scores is not None:
        tensors[_SCORES] = update.scores
    if update.touched is not None:
        tensors[_TOUCHED] = update.touched.to(torch.uint8)
    metrics: dict[str, int | float] = {EXAMPLES: update.num_examples, **update.metrics}
    metrics.update({name: getattr(update, name) for name in _FACTS})
    said = ConfigRecord({_NOTE: update.note, _RUN_ID: update.run_id})
    return RecordDict({ARRAYS: _to_record(tensors), METRICS: MetricRecord(dict(metrics)), SAID: said})


def decode_update(record: RecordDict, sent: Sent, compression: str = "none") -> ClientUpdate:
    """What ``encode_update`` made; FedMetaNASError if something is missing or is not a finite number.

    ``sent`` are the weights and statistics that the client got, from which compressed changes count.
    """
    try:
        arrays, reported = record.array_records[ARRAYS], dict(record.metric_records[METRICS])
        facts = {name: _whole_number(reported.pop(name), name) for name in _FACTS}
        examples = _whole_number(reported.pop(EXAMPLES), EXAMPLES)
        metrics = {name: float(reported[name]) for name in {**dict.fromkeys(REPORTED), **reported}}  # type: ignore[arg-type]
        said = record.config_records[SAID]
        note, run_id = str(said[_NOTE])[:LONGEST_NOTE], str(said[_RUN_ID])
    except (KeyError, TypeError, ValueError) as error:
        raise FedMetaNASError(f"reply without {error}") from error
    _require_finite(metrics)
    foreign = sorted((set(arrays) - _KNOWN) | (set(record.array_records) - {ARRAYS}))
    if foreign:
        raise FedMetaNASError(f"reply with {foreign[0][:60]}, which was not asked for")
    weights, statistics = _weights_and_statistics(arrays, sent, compression)
    operation_logits, input_logits = (_tensor(arrays, name) if name in arrays else None for name in _TENSORS[2:])
    votes = (_tensor(arrays, _VOTES[0]).bool(), _tensor(arrays, _VOTES[1]).bool()) if _VOTES[0] in arrays else None
    return ClientUpdate(
        client=facts["client"],
        round=facts["round"],
        mask_version=facts["mask_version"],
        num_examples=examples,
        weights=weights,
        statistics=statistics,
        operation_logits=operation_logits,
        input_logits=input_logits,
        votes=votes,
        scores=_tensor(arrays, _SCORES) if _SCORES in arrays else None,
        touched=_tensor(arrays, _TOUCHED).bool() if _TOUCHED in arrays else None,
        metrics=metrics,
        note=note,
        run_id=run_id,
    )


def _whole_number(value: object, name: str) -> int:
    """A count as it was sent: 7.5 or NaN is none, and is not made one."""
    if not isinstance(value, int):
        raise FedMetaNASError(f"{name} is {value!r}, which is not a whole number")
    return value


def _require_finite(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not isfinite(value) or (name in _COSTS and value < 0):
            raise FedMetaNASError(f"{name} is {value}, which cannot be")


def _weights_and_statistics(arrays: ArrayRecord, sent: Sent, compression: str) -> Sent:
    if compression == "none":
        return _tensor_or_empty(arrays, _TENSORS[0]), _tensor_or_empty(arrays, _TENSORS[1])
    weights, statistics = (_tensor(arrays, name).numpy() for name in _CHANGES)
    return apply_changes(sent, (weights, statistics), compression)


def encode_evaluation(evaluation: Evaluation) -> RecordDict:
    """A client's answer."""
    metrics = {EXAMPLES: evaluation.num_examples, "client": evaluation.client, **evaluation.metrics}
    records: dict[str, Any] = {METRICS: MetricRecord(dict(metrics))}
    if evaluation.weights is not None and evaluation.statistics is not None:
        tensors = dict(zip(_TENSORS, (evaluation.weights, evaluation.statistics), strict=False))
        records[ARRAYS] = _to_record(_filled(tensors))
        records[SAID] = ConfigRecord({_GENOTYPE: evaluation.genotype or ""})
    return RecordDict(records)


def decode_evaluation(record: RecordDict) -> Evaluation:
    """What ``encode_evaluation`` made; FedMetaNASError if something is missing."""
    try:
        reported = dict(record.metric_records[METRICS])
        examples, client = (_whole_number(reported.pop(name), name) for name in (EXAMPLES, "client"))
        metrics = {name: float(value) for name, value in reported.items()}  # type: ignore[arg-type]
        _require_finite(metrics)
        if ARRAYS not in record.array_records:
            return Evaluation(client, examples, metrics)
        arrays, genotype = record.array_records[ARRAYS], str(record.config_records[SAID][_GENOTYPE])
    except (KeyError, TypeError, ValueError) as error:
        raise FedMetaNASError(f"answer without {error}") from error
    tensors = (_tensor_or_empty(arrays, name) for name in _TENSORS[:2])
    return Evaluation(client, examples, metrics, genotype or None, *tensors)


@dataclass(frozen=True)
class RunIdentity:
    """What a client must know to take part: the resolved configuration as JSON, and what to compare itself with.

    ``directory`` is the run folder on the server's machine, of use to virtual clients only.
    """

    config: str
    partition_hash: str
    fingerprint: str
    run_id: str
    directory: str


def encode_run(identity: RunIdentity) -> ConfigRecord:
    """The record that goes with every message."""
    return ConfigRecord(asdict(identity))


def decode_run(record: RecordDict) -> RunIdentity:
    """What ``encode_run`` sent; FedMetaNASError if it is not there."""
    try:
        facts = record.config_records[RUN]
        return RunIdentity(**{each.name: str(facts[each.name]) for each in fields(RunIdentity)})
    except KeyError as error:
        raise FedMetaNASError(f"message without {error} of its run") from error


@dataclass(frozen=True)
class SiteQuestion:
    """What a node is asked before it takes part; where ``own_images``, also about those.

    They are held out by ``seed`` and brought to ``image_size`` (0: as they are); ``class_names`` are the run's, with
    commas, where they are fixed. ``space``, as JSON, if it is to measure how long each operation takes there.
    """

    own_images: bool
    seed: int
    image_size: int
    class_names: str
    space: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """A node's answer: its code, who it is (-1 and "": its configuration does not say) and what it has.

    ``site`` are facts about its own images (data.sites); ``refusal`` is why it cannot take part, if it cannot.
    ``limits`` is what a network may cost there, as JSON by key; ``latencies`` what it was asked to measure.
    """

    fingerprint: str
    partition_id: int = -1
    name: str = ""
    site: str = ""
    refusal: str = ""
    cores: int = 0
    gpu_memory_bytes: int = 0
    limits: str = "{}"
    latencies: str = ""


def encode_question(question: SiteQuestion) -> RecordDict:
    """A message for a node."""
    return RecordDict({QUESTION: ConfigRecord(asdict(question))})


def decode_question(record: RecordDict) -> SiteQuestion:
    """What ``encode_question`` sent; FedMetaNASError if something is missing."""
    try:
        facts: dict[str, Any] = dict(record.config_records[QUESTION])
        return SiteQuestion(**facts)
    except (KeyError, TypeError) as error:
        raise FedMetaNASError(f"question without {error}") from error


def encode_facts(facts: NodeFacts) -> RecordDict:
    """A node's answer."""
    return RecordDict({NODE: ConfigRecord(asdict(facts))})


def decode_facts(record: RecordDict) -> NodeFacts:
    """What ``encode_facts`` made; FedMetaNASError if something is missing."""
    try:
        facts: dict[str, Any] = dict(record.config_records[NODE])
        found = NodeFacts(**facts)
    except (KeyError, TypeError) as error:
        raise FedMetaNASError(f"answer without {error}") from error
    for each in fields(NodeFacts):
        value = getattr(found, each.name)
        if type(value) is not type(each.default if each.name != "fingerprint" else ""):
            raise FedMetaNASError(f"{each.name} is {str(value)[:40]!r}")
    return replace(found, name=found.name[:LONGEST_NOTE], refusal=found.refusal[:LONGEST_NOTE])
