"""What Flower and Ray take whatever is searched. Measured, because nothing here can know it before they are started.

`python benchmarks/flower_fixed.py --repeats 2` (three loads of digits searches in turn, 20 clients, two workers) at
commit 0d60f13: 2 cores of a shared AMD EPYC with AVX-512, flwr 1.41.0, ray 2.55, torch 2.15, 25 GB of memory; load of
others about one to three cores. Medians.
"""

START_S = 19.0  # from the command to the server's first round: five programs in turn, each with its imports
END_S = 7.0  # from the last measurement to the end of the command: report, pictures, the end of Flower and Ray
ROUND_S = 0.079  # of a round, beyond the clients' own seconds: looking for replies, the slower worker
MESSAGE_S = 0.0038  # more for every client's message
BYTE_S = 1.68e-9  # more for every byte down or up

# A plain process that does the same is measured; these come on top of it.
WORKER_BYTES = 120_000_000  # Ray and Flower in a worker
SERVER_BYTES = 130_000_000  # Ray's driver and Flower in the server
OTHERS_BYTES = 970_000_000  # SuperLink, Ray's own processes and idle workers, together
