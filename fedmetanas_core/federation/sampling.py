"""Which clients train in which round: functions of the seed, the round and who can be asked."""

from collections.abc import Sequence

from fedmetanas_core.seeds import numpy_stream


def sample_clients(seed: int, round_number: int, candidates: Sequence[int], clients_per_round: int) -> list[int]:
    """Those of the candidates that train in a round, ascending: uniform without replacement.

    A function of seed, round and candidates alone; fewer where there are fewer.
    """
    stream, count = numpy_stream(seed, "client sampling", round_number), min(clients_per_round, len(candidates))
    return sorted(candidates[chosen] for chosen in stream.choice(len(candidates), count, replace=False))


def take_turns(
    seed: int, round_number: int, num_clients: int, candidates: Sequence[int], clients_per_round: int
) -> list[int]:
    """Those of a round, ascending: the next ones of a shuffled circle that are among the candidates."""
    circle = numpy_stream(seed, "turns").permutation(num_clients)
    first = (round_number - 1) * clients_per_round
    order = [int(circle[(first + step) % num_clients]) for step in range(num_clients)]
    return sorted([client for client in order if client in set(candidates)][:clients_per_round])
