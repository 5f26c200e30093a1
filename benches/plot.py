"""Draws docs/speed-light.svg and docs/speed-dark.svg of the tables in docs/benchmarks.md.

    pip install matplotlib==3.11.2 && python benches/plot.py

On the left how many times as long as ours from Python the same takes others; candle's time is from Rust. On
the right ours as a share of the memory's speed, from Rust.
"""

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]

# What is shown: the group of the table from Python, and the rows of the table from Rust that are the same
# passes, the forward one first. There is none with the entropy.
ROWS = [
    (
        "log-probabilities, f32",
        "logprob forward float32 512 x 49152",
        ["logprob_forward f32_512x49152"],
    ),
    (
        "log-prob. and gradient, f32",
        "logprob forward + backward float32 512 x 49152",
        ["logprob_forward f32_512x49152", "logprob_backward f32_512x49152"],
    ),
    (
        "log-probabilities, bf16",
        "logprob forward bfloat16 512 x 49152",
        ["logprob_forward bf16_512x49152"],
    ),
    (
        "entropy and gradient too, bf16",
        "logprob and entropy forward + backward bfloat16 512 x 49152",
        [],
    ),
    ("exact KL, f32", "full_kl forward float32 512 x 49152", ["kl_full_forward f32_512x49152"]),
    (
        "exact KL and gradients, f32",
        "full_kl forward + backward float32 512 x 49152",
        ["kl_full_forward f32_512x49152", "kl_full_backward f32_512x49152"],
    ),
    ("GAE", "gae 64 x 2048", ["gae f32_64x2048"]),
    ("whitening", "masked_whiten 64 x 2048", ["whiten f32_64x2048"]),
    (
        "PPO loss and gradient",
        "ppo_loss forward + backward 64 x 2048",
        ["ppo_loss_forward_backward f32_64x2048"],
    ),
]

# Who is beside us: how the table calls them, a colour and a mark.
OTHERS = {
    "candle": ("#e03131", "D"),
    "eager": ("#868e96", "o"),
    "torch.compile": ("#f08c00", "s"),
    "TRL": ("#0ca678", "^"),
    "verl": ("#1098ad", "v"),
    "OpenRLHF": ("#7048e8", "P"),
}
OURS = "#1c7ed6"
THEMES = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#3d444d")}


class Row(NamedTuple):
    """From Rust: our time and candle's, in seconds, and the share of the limit."""

    ours: float
    candle: float
    share: float


UNITS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def tables(text: str) -> tuple[dict[str, Row], dict[str, dict[str, float]]]:
    """The rows from Rust by pass and shape, and times from Python by group and who."""
    rust, python, group = {}, {}, ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"\d+%", cells[5]):
            ours = seconds(cells[2])
            row = Row(ours, ours * float(cells[4]), float(cells[5][:-1]) / 100)
            rust[f"{cells[0]} {cells[1]}"] = row
        elif len(cells) == 4 and re.fullmatch(r"[\d.]+", cells[3]):
            group = cells[0] or group
            python.setdefault(group, {})[cells[1]] = seconds(cells[2])
    return rust, python


def beside(group: dict[str, float]) -> dict[str, float]:
    """The time of the fastest form of each of the others over ours."""
    ours = next(time for who, time in group.items() if who.startswith("ours"))
    found: dict[str, float] = {}
    for who, time in group.items():
        name = next((name for name in OTHERS if who.startswith(name)), None)
        if name:
            found[name] = min(time / ours, found.get(name, time / ours))
    return found


def draw(theme: str, rust: dict, python: dict) -> None:
    background, ink, grid = THEMES[theme]
    plt.rcParams.update({"svg.hashsalt": "speed", "font.size": 10, "font.family": "DejaVu Sans"})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 4.4), sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    figure.set_facecolor(background)
    for i, (_, group, passes) in enumerate(ROWS):
        others = beside(python[group])
        rows = [rust[row] for row in passes]
        ours = next(time for who, time in python[group].items() if who.startswith("ours"))
        # Through autograd candle's time is another one than those of its passes.
        if len(rows) == 1:
            others["candle"] = rows[0].candle / ours
        left.plot([1, max(others.values())], [i, i], color=grid, zorder=1)
        for name, times in others.items():
            colour, mark = OTHERS[name]
            left.scatter(times, i, color=colour, marker=mark, s=46, zorder=2)
        if not rows:
            continue
        share = 100 * sum(row.ours * row.share for row in rows) / sum(row.ours for row in rows)
        right.barh(i, share, color=OURS, height=0.6)
        right.text(
            min(share, 100) - 3, i, f"{share:.0f}%", color="white", va="center", ha="right", size=9
        )
    left.axvline(1, color=OURS, linewidth=3, zorder=1)
    left.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_xlabel("time, times ours (the blue line); two cores of a CPU")
    left.set_yticks(range(len(ROWS)), [label for label, *_ in ROWS])
    left.invert_yaxis()
    right.set_xlim(0, 105)
    right.set_xlabel("ours, % of memory's speed")
    for axes in (left, right):
        axes.set_facecolor(background)
        axes.tick_params(colors=ink, length=0)
        axes.xaxis.label.set_color(ink)
        axes.grid(axis="x", color=grid, linewidth=0.6)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
    marks = [
        plt.Line2D([], [], color=colour, marker=mark, linestyle="", label=name)
        for name, (colour, mark) in OTHERS.items()
    ]
    figure.legend(
        handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, labelcolor=ink
    )
    path = ROOT / f"docs/speed-{theme}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    found = tables((ROOT / "docs/benchmarks.md").read_text())
    for theme in THEMES:
        draw(theme, *found)
