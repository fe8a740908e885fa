"""Pictures of what was measured, drawn from the JSON files by ``python -m benchmarks.document``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

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
}


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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def operators(path: Path, document: dict) -> None:
    """Forward and backward of each operator: time, as a share of transformers' own, and what it is in ms."""
    rows = {
        (r["op"], r["provider"]): r["ms"]["median"]
        for r in document["results"]
        if r["mode"] == "full" and "ms" in r
    }
    ops = list(dict.fromkeys(op for op, provider in rows if (op, "torch") in rows))
    providers = [p for p in COLOURS if any((op, p) in rows for op in ops)]
    height = 0.8 / len(providers)
    figure, axis = plt.subplots(figsize=(9, 1 + 0.2 * len(ops) * len(providers)), layout="constrained")
    for number, provider in enumerate(providers):
        for place, op in enumerate(ops):
            if (op, provider) not in rows:
                continue
            y = place + (number - (len(providers) - 1) / 2) * height
            share = rows[op, provider] / rows[op, "torch"]
            axis.barh(y, share, height, color=COLOURS[provider])
            axis.text(share, y, f" {rows[op, provider]:.3g} ms", va="center", fontsize=7)
    axis.set_yticks(range(len(ops)), ops)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.set_xlabel("time of forward and backward, transformers = 1")
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[p]) for p in providers]
    labels = [TITLES.get(p, p) for p in providers]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(providers), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
