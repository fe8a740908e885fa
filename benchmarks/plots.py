"""Pictures of what was measured, drawn from the JSON files by ``make plots``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .report import digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend must be chosen first

# How providers are called where their short names do not say enough.
TITLES = {
    "liger-ops-lean": "liger-ops with lean_activations",
    "torch": "transformers",
    "compile": "torch.compile",
    "liger": "liger-kernel",
    "trl": "TRL's head",
    "ours": "liger-ops",
    "ours-128MiB": "liger-ops, 128 MiB",
}

# One colour for each provider in every picture.
COLOURS = {
    "transformers": "#9aa0a6",
    "liger-kernel": "#e0a458",
    "liger-ops": "#2b6cb0",
    "liger-ops-lean": "#173f6d",
    "torch": "#9aa0a6",
    "compile": "#5f9e8f",
    "liger": "#e0a458",
    "trl": "#a05195",
    "ours": "#2b6cb0",
    "ours-128MiB": "#7aa6d6",
}

PASSES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}


def training(path: Path, document: dict) -> None:
    """Tokens per second and peak memory of each model and provider, side by side."""
    results = document["training_results"]
    models = list(document["models"])
    providers = [p for p in COLOURS if any(r["provider"] == p for r in results)]
    rows = {(r["model"], r["provider"]): r for r in results}
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.26 * len(models) * len(providers)), sharey=True, layout="constrained"
    )
    height = 0.8 / len(providers)
    for axis, key, scale, words in (
        (axes[0], "tokens_per_second", 1, "tokens per second"),
        (axes[1], "peak_mib", 1024, "peak memory, GiB"),
    ):
        for number, provider in enumerate(providers):
            for place, model in enumerate(models):
                record = rows.get((model, provider))
                if record is None:
                    continue
                y = place + (number - (len(providers) - 1) / 2) * height
                if key not in record:
                    axis.text(0, y, f" {record.get('failure', '')}", va="center", fontsize=8, color="#a33")
                    continue
                value = record[key] / scale
                axis.barh(y, value, height, color=COLOURS[provider])
                ratio = {"tokens_per_second": "speedup", "peak_mib": "memory_ratio"}[key]
                label = f"{value:,.0f}"
                if provider != "transformers" and ratio in record:
                    label += f"  ({record[ratio]:.2f}×)"
                axis.text(value, y, f" {label}", va="center", fontsize=8)
        axis.set_title(words, fontsize="medium")
        axis.margins(x=0.22)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(models)), [document["models"][m]["title"] for m in models])
    axes[0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    versions = document["environment"]["versions"]
    labels = [
        f"{TITLES.get(p, p)} {versions[p]}" if versions.get(p) and p != "liger-ops" else TITLES.get(p, p)
        for p in providers
    ]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(providers), frameon=False)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def legend(figure: plt.Figure, providers: list[str]) -> None:
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    labels = [TITLES.get(p, p) for p in providers]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(providers)), frameon=False)


def provider_bars(path: Path, document: dict, value, words: str, log: bool = False) -> bool:
    """A panel for each pass, a group of bars for each operator at its first size, a bar for each provider.

    Args:
        path: of the picture.
        document: of a run.
        value: of a row, the bar's length and its label; None where there is none.
        words: what the length is.
        log: of a logarithmic axis, where 0 is drawn as nothing.
    """
    panels: dict[str, dict[tuple[str, str], tuple[float, str]]] = {}
    for row in document["results"]:
        if "ms" in row and (found := value(row)) is not None:
            panels.setdefault(row["mode"], {}).setdefault((row["op"], row["provider"]), found)
    modes = [mode for mode in PASSES if panels.get(mode)]
    if not modes:
        return False
    measured = [key for mode in modes for key in panels[mode]]
    ops = list(dict.fromkeys(row["op"] for row in document["results"]))
    ops = [op for op in ops if any(key[0] == op for key in measured)]
    providers = [p for p in COLOURS if any(key[1] == p for key in measured)]
    figure, axes = plt.subplots(
        1,
        len(modes),
        figsize=(3 + 3.8 * len(modes), 1.2 + 0.19 * len(ops) * (len(providers) + 1)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    height = 0.84 / len(providers)
    for axis, mode in zip(axes[0], modes, strict=True):
        for number, provider in enumerate(providers):
            for place, op in enumerate(ops):
                if (op, provider) in panels[mode]:
                    length, label = panels[mode][op, provider]
                    y = place + (number - (len(providers) - 1) / 2) * height
                    axis.barh(y, length, height, color=COLOURS[provider])
                    axis.text(max(length, 1) if log else length, y, f" {label}", va="center", fontsize=7)
        if log:
            axis.set_xscale("log")
            axis.set_xlim(1, axis.get_xlim()[1] * 6)
        else:
            axis.margins(x=0.36)
            axis.set_xlim(left=0)
        axis.set_title(PASSES[mode], fontsize="medium")
        axis.set_xlabel(words)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(ops)), ops)
    axes[0][0].set_ylim(len(ops) - 0.45, -0.55)
    legend(figure, providers)
    save(figure, path)
    return True


def operators(path: Path, document: dict) -> bool:
    """The share of the floor that each operator and provider reaches, and its time."""

    def value(row: dict) -> tuple[float, str] | None:
        if not row.get("share_of_floor"):
            return None
        share = 100 * row["share_of_floor"]
        return share, f"{share:.0f} %, {digits(row['ms']['median'])} ms"

    return provider_bars(path, document, value, "floor / time, %")


def memory(path: Path, document: dict) -> bool:
    """What operators allocate beyond their results, where some provider allocates much."""
    most: dict[str, float] = {}
    for row in document["results"]:
        if found := row.get("memory"):
            most[row["op"]] = max(most.get(row["op"], 0), found["beyond_results_mib"])

    def value(row: dict) -> tuple[float, str] | None:
        if row["mode"] != "full" or not row.get("memory") or most[row["op"]] < 1:
            return None
        mib = row["memory"]["beyond_results_mib"]
        return mib, f"{mib:,.0f}" if mib >= 1 else "0"

    return provider_bars(path, document, value, "MiB beyond results", log=True)


def sweep(path: Path, op: str, documents: dict[str, dict]) -> bool:
    """The share of the floor over the width of the rows or the number of classes, a panel for each pass and
    number of tokens, a line for each provider; of the quick CUDA runs in bfloat16."""
    lines: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    axis_name = ""
    for document in documents.values():
        if not document["settings"]["quick"]:
            continue
        for row in document["results"]:
            if row["op"] != op or row["dtype"] != "bfloat16" or not row.get("share_of_floor"):
                continue
            *_, (axis_name, size) = row["sizes"].items()
            points = lines.setdefault((row["mode"], row["tokens"]), {}).setdefault(row["provider"], {})
            points[size] = 100 * row["share_of_floor"]
    lines = {key: found for key, found in lines.items() if any(len(points) > 1 for points in found.values())}
    if not lines:
        return False
    modes = [mode for mode in PASSES if any(key[0] == mode for key in lines)]
    tokens = sorted({key[1] for key in lines})
    providers = [p for p in COLOURS if any(p in found for found in lines.values())]
    figure, axes = plt.subplots(
        len(tokens),
        len(modes),
        figsize=(1 + 3.6 * len(modes), 0.8 + 2.3 * len(tokens)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis_row, count in zip(axes, tokens, strict=True):
        for axis, mode in zip(axis_row, modes, strict=True):
            for provider in providers:
                points = sorted(lines.get((mode, count), {}).get(provider, {}).items())
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[provider])
            axis.set_title(f"{PASSES[mode]}, {count} tokens", fontsize="medium")
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axis_row[0].set_ylabel("floor / time, %")
    ticks = sorted({size for found in lines.values() for points in found.values() for size in points})
    most = max(share for found in lines.values() for points in found.values() for share in points.values())
    axes[0][0].set_ylim(0, 1.06 * most)
    for axis in axes[-1]:
        axis.set_xlabel(axis_name)
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30, fontsize=8)
        axis.minorticks_off()
    legend(figure, providers)
    save(figure, path)
    return True
