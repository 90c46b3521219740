"""Whether the experts that a profile ranks first for a domain really serve it.

usage: ablate.py --confrere BINARY --data-dir DIR --model NAME --corpus CORPUS --out OUT.json --picture OUT.png [--bytes 60000] [--draws 20]

For each domain: `experts which DOMAIN --top 10`, then held-out loss with those ten left out, on the domain and on prose (on stories, for prose), and
on the domain with ten experts drawn at random, 20 times. Rises are in nats a token against the whole model. Intervals of 95%: over the draws for random
experts, by bootstrap over documents for the others. Held-out text is CORPUS/*.validation.txt.xz, which is not in this repository; the profile's probes are other text.
Needs matplotlib and numpy.
"""
import argparse
import json
import lzma
import os
import subprocess
import tempfile

import numpy as np

# The probes' domain, and the held-out files that are of it.
DOMAINS = {"code": ["python", "rust"], "maths": ["maths"], "law": ["law"], "dialogue": ["dialogue"], "chinese_poetry": ["chinese_poetry"], "poetry": ["poetry"]}
OTHER = "prose"


def main():
    parser = argparse.ArgumentParser()
    for name in ("confrere", "data-dir", "model", "corpus", "out", "picture"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--bytes", type=int, default=60_000)
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    work = tempfile.mkdtemp()

    def run(*words):
        command = [args.confrere, "--data-dir", args.data_dir, "--offline", "--json", *words]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def held_out(files):
        documents = []
        for name in files:
            text = lzma.open(os.path.join(args.corpus, name + ".validation.txt.xz"), "rt", encoding="utf-8").read()
            size = 0
            for document in text.split("\x1e"):
                if size >= args.bytes // len(files):
                    break
                document = document[:4000]
                size += len(document.encode())
                documents.append(document)
        path = os.path.join(work, files[0] + ".txt")
        with open(path, "w", encoding="utf-8") as f:
            f.write("\x1e".join(documents))
        return path

    def losses(path, slots):
        without = ["--without", ",".join(slots)] if slots else []
        documents = run("eval", "perplexity", args.model, path, *without)["documents"]
        return np.array([[d["nats"], d["tokens"]] for d in documents])

    rng = np.random.default_rng(3)

    def rise(whole, without):
        """Nats a token more, with a bootstrap over documents."""
        difference = lambda rows: (without[rows, 0] - whole[rows, 0]).sum() / whole[rows, 1].sum()
        rows = np.arange(len(whole))
        draws = [difference(rng.choice(rows, len(rows))) for _ in range(2000)]
        return [float(difference(rows)), *map(float, np.percentile(draws, [2.5, 97.5]))]

    shape = run("show", args.model)["config"]
    slots = [f"{layer}:{expert}" for layer in range(shape["num_hidden_layers"]) for expert in range(shape["num_experts"])]
    other = held_out([OTHER])
    whole_other = losses(other, [])
    table = []
    for domain, files in DOMAINS.items():
        top = [f"{e['layer']}:{e['expert']}" for e in run("experts", "which", domain, "--model", args.model, "--top", "10")["experts"]]
        own = held_out(files)
        whole = losses(own, [])
        on_own, on_other = rise(whole, losses(own, top)), rise(whole_other, losses(other, top))
        random = []
        for _ in range(args.draws):
            drawn = losses(own, list(rng.choice(slots, 10, replace=False)))
            random.append(float((drawn[:, 0] - whole[:, 0]).sum() / whole[:, 1].sum()))
        mean, half = float(np.mean(random)), float(2.093 * np.std(random, ddof=1) / len(random) ** 0.5)
        row = {
            "domain": domain,
            "experts": top,
            "tokens": int(whole[:, 1].sum()),
            "loss": float(whole[:, 0].sum() / whole[:, 1].sum()),
            "own": on_own,
            "other": on_other,
            "random": [mean, mean - half, mean + half],
            "random_draws": random,
        }
        table.append(row)
        print(
            f"| {domain} | {row['loss']:.3f} | +{on_own[0]:.3f} ({on_own[1]:.3f}–{on_own[2]:.3f}) | +{on_other[0]:.4f} ({on_other[1]:.4f}–{on_other[2]:.4f}) "
            f"| +{mean:.4f} ({mean - half:.4f}–{mean + half:.4f}) | {on_own[0] / max(on_other[0], 1e-9):.1f} | {on_own[0] / mean:.1f} |",
            flush=True,
        )
    with open(args.out, "w") as f:
        json.dump(table, f, indent=1)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2))
    for shift, (key, label, hatch) in enumerate([("own", "its top 10, on the domain", ""), ("other", f"its top 10, on {OTHER}", "//"), ("random", "10 at random, on the domain", "..")]):
        values = np.array([row[key] for row in table])
        x = np.arange(len(table)) + (shift - 1) * 0.27
        errors = np.abs(values[:, 1:].T - values[:, 0])
        axes.bar(x, values[:, 0], 0.25, yerr=errors, label=label, hatch=hatch, capsize=2, color=["#332288", "#88ccee", "#ddcc77"][shift], edgecolor="black")
    axes.set_xticks(np.arange(len(table)), [row["domain"] for row in table])
    axes.set_ylabel("rise of held-out loss, nats a token")
    axes.set_title("Leaving out ten experts of 192")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)


main()
