"""What Flower and Ray take whatever is searched. Measured, because nothing here can know it before they are started.

`python benchmarks/flower_fixed.py --repeats 2` (three loads of digits searches in turn, 20 clients, two workers) at
commit 98732fd: 2 cores of an AMD EPYC with AVX-512 and nothing else to do, flwr 1.41.0, ray 2.55, torch 2.15, 25 GB of
memory. Medians; starts were 12.7 to 17.8 s, ends 5.7 to 7.0 s.
"""

START_S = 17.2  # from the command to the server's first round: five programs in turn, each with its imports
END_S = 6.5  # from the last measurement to the end of the command: report, pictures, the end of Flower and Ray
ROUND_S = 0.069  # of a round, beyond the clients' own seconds: looking for replies, the slower worker
MESSAGE_S = 0.0044  # more for every client's message
BYTE_S = 2.69e-9  # more for every byte down or up

# A plain process that does the same is measured; these come on top of it.
WORKER_BYTES = 120_000_000  # Ray and Flower in a worker
SERVER_BYTES = 130_000_000  # Ray's driver and Flower in the server
OTHERS_BYTES = 1_060_000_000  # SuperLink, Ray's own processes and idle workers, together
