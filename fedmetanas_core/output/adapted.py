"""What a few steps on a new client's images gave: as a table, a file and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedmetanas_core.output.pictures import Picture, drawing, saved

NAMES = {"adapted": "the found network, adapted", "from_scratch": "the same network, from scratch"}


@dataclass(frozen=True)
class Curves:
    """Accuracies in [0, 1] on held-out images after each number of ``steps``: of every client, one list each.

    ``images``: how many each client had for its steps, and how many were kept out of them.
    """

    steps: tuple[int, ...]
    clients: tuple[str, ...]
    adapted: tuple[tuple[float, ...], ...]
    from_scratch: tuple[tuple[float, ...], ...]
    images: tuple[tuple[int, int], ...]

    def means(self, kind: str) -> list[float]:
        """Over clients, after each number of steps."""
        return [fmean(values) for values in zip(*getattr(self, kind), strict=True)]

    def spreads(self, kind: str) -> list[float]:
        """The deviation between clients, 0 where there is but one."""
        return [stdev(values) if len(values) > 1 else 0.0 for values in zip(*getattr(self, kind), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "steps": self.steps,
            **{f"{kind}_{what.__name__}": what(kind) for kind in NAMES for what in (self.means, self.spreads)},
            "clients": [
                {"client": client, "images": images, "adapted": own, "from_scratch": scratch}
                for client, images, own, scratch in zip(
                    self.clients, self.images, self.adapted, self.from_scratch, strict=True
                )
            ],
        }


def curves_in_words(curves: Curves) -> str:
    """A line for each network, a column for each number of steps; what was measured, and who is ahead when.

    No trailing newline.
    """
    heads = [f"{number} step{'s'[: number != 1]}" for number in curves.steps]
    lines = [" " * 32 + "".join(f"{head:>16}" for head in heads)]
    for kind, name in NAMES.items():
        pairs = zip(curves.means(kind), curves.spreads(kind), strict=True)
        several = len(curves.clients) > 1
        shown = (f"{mean:.4f} ± {spread:.3f}" if several else f"{mean:.4f}" for mean, spread in pairs)
        lines.append(f"{name:32}" + "".join(f"{each:>16}" for each in shown))
    trained, measured = (sum(each) for each in zip(*curves.images, strict=True))
    lines.append(f"accuracy on {measured:,} images that were kept out, after steps on {trained:,} others;")
    lines.append(_ahead(curves))
    return "\n".join(lines)


def _ahead(curves: Curves) -> str:
    """After how many steps the found network is the better one."""
    pairs = zip(curves.steps, curves.means("adapted"), curves.means("from_scratch"), strict=True)
    better = [str(number) for number, own, scratch in pairs if own > scratch]
    if not better:
        return "the found network is never ahead"
    if len(better) == len(curves.steps):
        return "the found network is ahead throughout"
    return f"the found network is ahead after {', '.join(better)} step{'s'[: better != ['1']]}"


def draw_adaptation(curves: Curves, held_out: str = "accuracy on held-out images") -> Picture:
    """Both curves over the steps, with the deviation between clients; evenly spaced, since steps grow by factors."""
    with drawing("adaptation") as pyplot:
        figure, panel = pyplot.subplots(figsize=(5.2, 3.4))
        places = range(len(curves.steps))
        for kind, mark in zip(NAMES, ("o", "s"), strict=True):
            means, spreads = curves.means(kind), curves.spreads(kind)
            panel.plot(places, means, marker=mark, label=NAMES[kind])
            low, high = (_moved(means, spreads, sign) for sign in (-1, 1))
            panel.fill_between(places, low, high, alpha=0.15, linewidth=0)
        panel.set_xticks(places, [str(number) for number in curves.steps])
        panel.set(xlabel="steps on the client's own images", ylabel=held_out, ylim=(0.0, 1.02))
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, loc="lower right")
        figure.tight_layout()
        return saved(figure)


def _moved(means: Sequence[float], spreads: Sequence[float], sign: int) -> list[float]:
    return [min(1.0, max(0.0, mean + sign * spread)) for mean, spread in zip(means, spreads, strict=True)]
