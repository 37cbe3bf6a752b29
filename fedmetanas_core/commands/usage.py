"""The commands, how each is written, and what it does: the only place that lists them."""

COMMANDS = {
    "setup": (
        "[--nodes N]",
        "add this project's connections to Flower's configuration",
    ),
    "search": (
        "[--config FILE.toml] [KEY=VALUE ...]",
        "search, and print the run folder; `fedmetanas search --help` lists every key, its default and its meaning",
    ),
    "estimate": (
        "[--config FILE.toml] [KEY=VALUE ...] [--json]",
        "what such a search would take of bytes, memory and time, without running it",
    ),
    "compare": (
        "TABLE.toml [--results DIR]",
        "run what a table lacks, and print its page's path",
    ),
    "report": (
        "RUN... [--output FILE.html]",
        "write the page of a run, or of several side by side, and print its path",
    ),
    "adapt": (
        "RUN --data FOLDER|FILE.npz [--steps 0,1,5,20] [--rate X] [--client ID] [--output DIR]  (or --unseen)",
        "adapt the found network to a new client in a few steps, and compare with training from scratch",
    ),
    "draw": (
        "RUN",
        "write the pictures of a run (SVG and PNG), and print their folder",
    ),
    "export": (
        "RUN [--format safetensors|torch|onnx] [--client ID] [--output PATH]",
        "write the found network for other programs, check it, and print the file's path",
    ),
    "predict": (
        "RUN|FILE.onnx IMAGE... [--top K] [--json] [--client ID]",
        "say what is on images: the likeliest classes, three unless told otherwise, and their probabilities",
    ),
}


def form(command: str) -> str:
    """How the command is written."""
    return f"fedmetanas {command} {COMMANDS[command][0]}"


def usage() -> str:
    """All of them, for --help."""
    lines = [line for command, (_, what) in COMMANDS.items() for line in (f"  {form(command)}", f"      {what}")]
    return "\n".join(["usage:", *lines, "  fedmetanas --version", "", "A first search needs no key: fedmetanas search"])
