"""Every command that README.md and the documentation tell people to type, and what makes sure that it works.

A command that is in no line of PROVEN fails ``tests/unit/test_docs_proven.py``: run it, name the test that does, or
say why nothing can.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# docs/reference is made of the code, and shows forms rather than commands to type.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    *(
        "fedmetanas",
        "flwr",
        "python",
        "pip",
        "mkdocs",
        "ray",
        "docker",
        "sudo",
        "printf",
        "tensorboard",
        "mlflow",
        "wandb",
    ),
    *("git", "uv", "curl", "export", "cd", "./", ".ci/", "docker/", "benchmarks/", "FEDMETANAS_"),
)


@dataclass(frozen=True)
class Command:
    """As it stands in a page, in one line, without the comment behind it."""

    page: str
    text: str


@dataclass(frozen=True)
class Run:
    """It is run by tests/e2e/test_docs_commands.py, with this behind it: the same in less time."""

    small: str = ""


@dataclass(frozen=True)
class Covered:
    """Another test runs it, or a script."""

    by: str


@dataclass(frozen=True)
class Impossible:
    """Nothing runs it in CI."""

    because: str


QUICK = "local_epochs=1 init_channels=2 num_nodes=2"
SMALL = f"num_clients=6 clients_per_round=2 num_rounds=2 evaluate_every=2 {QUICK}"
SEARCHES = "tests/e2e/test_search.py::test_a_search_with_a_hundred_clients"
RESUMES = "tests/e2e/test_search.py::test_an_interrupted_run_is_saved_leaves_nothing_behind_and_goes_on"
FLWR_RUN = "tests/e2e/test_flwr_run.py::test_setup_then_the_literal_command_and_another_project_beside_it"
DEPLOYS = (
    "tests/e2e/test_deployment.py::test_a_search_outlives_a_killed_node_a_killed_superlink_and_takes_in_a_late_node"
)
CLUSTER = "tests/e2e/test_ray_cluster.py::test_a_search_goes_on_when_a_machine_of_its_cluster_dies"
ELSEWHERE = "tests/unit/test_launch.py::test_a_run_begun_on_a_cluster_that_is_gone_goes_on_elsewhere"
SECRETS = "tests/unit/test_docker.py::test_keys_and_certificates_are_made_for_their_owner_alone_and_kept"
LATENCY = "tests/unit/test_budgets.py::test_a_latency_budget_counts_what_was_measured"
BENCHMARKS = "tests/unit/test_benchmarks.py::test_the_round_of"
GPU = Impossible("needs a GPU; tests/gpu is skipped where there is none")
BOXES = Impossible("needs a box of one's own, with root; tests/unit/test_docker.py reads the units")
CONTAINERS = Impossible("needs Docker and its images; tests/e2e/test_deployment.py starts the same programs natively")

# The first that matches the whole command holds.
PROVEN: list[tuple[str, Run | Covered | Impossible]] = [
    (r"pip install -e \. && fedmetanas search", Covered(SEARCHES)),
    (r'pip install -e ".*"( && pytest)?', Covered(".ci/run")),
    (r"\.ci/run", Covered(".ci/run")),
    (r"python examples/make_photos\.py", Run()),
    (
        r"fedmetanas search dataset=photos/ num_clients=20 .*",
        Run(f"samples_per_client=16 {QUICK}"),
    ),
    (r"fedmetanas search dataset=(photos/|images\.npz)", Run(SMALL)),
    (r"fedmetanas estimate dataset=photos/", Run(QUICK)),
    (r"fedmetanas search --config conf/mnist-laptop\.toml dir_alpha=0\.3", Run(f"dataset=images.npz {SMALL}")),
    (r"fedmetanas search method=fedrlnas dir_alpha=0\.1", Run(SMALL)),
    (
        r"fedmetanas search dp_clip=.*",
        Run(f"num_clients=50 samples_per_client=16 num_rounds=1 {QUICK}"),
    ),
    (r"fedmetanas search (max_macs|max_parameters|run_name)=.*", Run(SMALL)),
    (r"fedmetanas search max_latency_ms=.*", Covered(LATENCY)),
    (r"fedmetanas estimate \[.*", Covered("tests/unit/test_estimate.py")),
    (r"python benchmarks/adaptation\.py .*", Covered(f"{BENCHMARKS}_searches_that_clients_adapt_from")),
    (r"python benchmarks/budget\.py", Covered(f"{BENCHMARKS}_searches_within_a_budget")),
    (r"fedmetanas search track=tensorboard(,mlflow)?", Covered("tests/unit/test_trackers.py")),
    (r"fedmetanas search resume=runs/NAME", Covered(RESUMES)),
    (r"fedmetanas search resume=runs/NAME ray_address=.*", Covered(ELSEWHERE)),
    (r"fedmetanas search ray_address=.*", Covered(CLUSTER)),
    (r"ray start .*", Covered(CLUSTER)),
    (r"fedmetanas search dataset=cifar10 data_root=.*", Impossible("downloads 170 MB from a place that may be away")),
    (r"fedmetanas search device=cuda", GPU),
    (r"flwr run \. gpu", GPU),
    (r"benchmarks/gpu\.sh", Covered("tests/unit/test_benchmarks.py::test_the_gpu_script_is_proven_on_a_processor")),
    (r"fedmetanas (predict|export|adapt|report|draw) runs/.*", Run()),
    (r"fedmetanas compare .*", Covered("tests/e2e/test_compare.py::test_a_table_survives_sigkill")),
    (r"fedmetanas setup", Covered(FLWR_RUN)),
    (r"flwr run \. --run-config dir_alpha=0\.1", Covered(FLWR_RUN)),
    (r"flwr run \. edge --run-config .*", Covered(DEPLOYS)),
    (r"flwr supernode register .*", Covered(DEPLOYS)),
    (r"flwr build", Covered("tests/unit/test_hub.py::test_flwr_build_packs_the_app_without_a_word_of_warning")),
    (r"mkdocs build --strict", Covered("tests/unit/test_docs_site.py::test_the_site_is_built_without_a_warning")),
    (r"mkdocs serve", Impossible("goes on until it is stopped")),
    (r"docker/(certificates|node-key)\.sh .*", Covered(SECRETS)),
    (r"docker compose .*|printf .* > docker/\.env|sudo chown 49999 .*", CONTAINERS),
    (r"sudo .*", BOXES),
]


def proof_of(command: Command) -> Run | Covered | Impossible | None:
    """What makes sure that it works; None if nothing is known to."""
    return next((proof for pattern, proof in PROVEN if re.fullmatch(pattern, command.text)), None)


def commands(page: Path) -> list[Command]:
    """Those of a page, in its order."""
    name = page.relative_to(ROOT).as_posix()
    return [Command(name, text) for kind, text in blocks(page) if kind == "bash" for text in lines_of(text)]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Fenced blocks with their language, and indented lines that begin with a program as ``bash``; in order."""
    fence, held = None, list[str]()
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        if found := re.match(r"\s*```(\w*)", line):
            if fence is not None:
                yield fence, "\n".join(held)
            fence, held = (found[1] or "text", []) if fence is None else (None, [])
        elif fence is not None:
            held.append(line)
        elif held or re.match(rf" {{4,}}({'|'.join(map(re.escape, PROGRAMS))})", line):
            held.append(line)
            if not line.endswith("\\"):
                yield "bash", "\n".join(held)
                held = []


def lines_of(block: str) -> list[str]:
    """The commands of a block: lines that end in a backslash joined, comments left out."""
    joined = re.sub(r"\\\n\s*", "", block)
    bare = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in joined.splitlines())
    return [line for line in bare if line]
