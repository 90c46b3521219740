"""Measures what a checkpoint can do: every task on samples of seen kinds and on held-out kinds, beside chance and beside shuffled media; text in bits a byte.

    python evaluate.py --weights WORK/state.pt --config WORK/config.json --cache CACHE --fonts DIR --out results.json [--samples 200] [--only read,transcribe] [--text CORPUS]

Answers are greedy. Each task and split (see tasks.py) gets `--samples` samples, drawn from a seed of its own that training never uses.
- accuracy: the answer is right word for word. For transcriptions and reading also the share of words (letters) that are right, by edit distance.
- chance: one over the number of possible answers, and the share of the commonest answer of the sample, whichever is larger.
- shuffled: the same questions with the pictures (sounds) of other samples of the same task and split; with both, each alone, too.
- interval: 95%, by bootstrap over samples.
Text is scored as models/evaluate.py of Confrere does it: documents alone, windows of 512 tokens that do not overlap, the first token of a window is context only.
"""
import argparse, collections, json, lzma, math, pathlib, time

import numpy as np
import torch

import data, model, prepare, tasks, tokenizer


def edits(a, b):
    """Edit distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def answer_all(thinker, tok, samples, budget=6000):
    """Greedy answers in the order of the samples, in batches of like length."""
    encoded = [data.encode(tok, dict(s, answer=None)) for s in samples]
    order, answers = sorted(range(len(samples)), key=lambda i: (samples[i]["task"], len(encoded[i]["ids"]))), [None] * len(samples)
    ends = {tok.special["<|im_end|>"], tok.special["<|endoftext|>"]}
    while order:
        mine, size = [], 0
        while order and size < budget:
            mine.append(order.pop())
            size += len(encoded[mine[-1]]["ids"])
        batch = data.tensors(data.pack([encoded[i] for i in mine]))
        for i, ids in zip(mine, model.generate(thinker, batch, ends)):
            answers[i] = tok.decode(ids).strip()
    return answers


def shuffled(samples, kinds):
    """The samples with their media of these kinds taken from another sample whose answer differs, where there is one."""
    out, n = [], len(samples)
    rng = np.random.default_rng(3)
    for s in samples:
        options = [int(i) for i in rng.permutation(n)]
        other = next((samples[i] for i in options if samples[i]["answer"] != s["answer"]), samples[options[0]])
        parts = list(s["parts"])
        for i, p in enumerate(parts):
            if not isinstance(p, str) and p[0] in kinds:
                parts[i] = next(q for q in other["parts"] if not isinstance(q, str) and q[0] == p[0])
            elif not isinstance(p, str) and p[0] == "video_with_sound":
                q = next(q for q in other["parts"] if not isinstance(q, str) and q[0] == p[0])
                parts[i] = (p[0], q[1] if "video" in kinds else p[1], p[2], q[3] if "audio" in kinds else p[3])
        out.append(dict(s, parts=parts))
    return out


def interval(values, weights=None, draws=1000):
    values, weights = np.asarray(values, dtype=float), np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    pick = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    return [round(float(q), 4) for q in np.quantile(values[pick].sum(1) / weights[pick].sum(1), [0.025, 0.975])]


def score(samples, answers):
    right = [a == s["answer"] for s, a in zip(samples, answers)]
    result = dict(accuracy=round(float(np.mean(right)), 4), interval=interval(right))
    if samples[0]["task"] in ("transcribe", "read"):
        cut = str.split if samples[0]["task"] == "transcribe" else list
        wrong, size = zip(*[(min(edits(cut(a), cut(s["answer"])), len(cut(s["answer"]))), len(cut(s["answer"]))) for s, a in zip(samples, answers)])
        right = [n - w for w, n in zip(wrong, size)]
        result |= dict(units="words" if cut is str.split else "letters", unit_accuracy=round(sum(right) / sum(size), 4), unit_interval=interval(right, size))
    return result


def abilities(thinker, tok, store, names, count):
    results, examples = {}, {}
    for task in names:
        for split in tasks.TASKS[task][1]:
            began = time.time()
            rng = np.random.default_rng([777, sum(task.encode()), sum(split.encode())])
            samples = [tasks.draw(store, task, split, rng) for _ in range(count)]
            answers = answer_all(thinker, tok, samples)
            common = collections.Counter(s["answer"] for s in samples).most_common(1)[0][1] / count
            result = dict(samples=count, **score(samples, answers), chance=round(max(common, 1 / samples[0]["options"] if samples[0]["options"] else 0), 4))
            kinds = set()
            for p in samples[0]["parts"]:
                kinds |= set() if isinstance(p, str) else {"video", "audio"} if p[0] == "video_with_sound" else {p[0]}
            for away in [kinds] + ([{k} for k in sorted(kinds)] if len(kinds) > 1 else []):
                if away:
                    mixed = shuffled(samples, away)
                    result["shuffled " + " and ".join(sorted(away))] = score(mixed, answer_all(thinker, tok, mixed)).get("unit_accuracy" if "unit_accuracy" in result else "accuracy")
            results[f"{task}/{split}"] = result
            examples[f"{task}/{split}"] = [[next((p for p in reversed(s["parts"]) if isinstance(p, str)), ""), s["answer"], a] for s, a in zip(samples[:6], answers)]
            print(f"{task:20} {split:9}", {k: v for k, v in result.items() if k not in ("samples", "units")}, f"{time.time() - began:.0f} s", flush=True)
    return results, examples


@torch.no_grad()
def bits_per_byte(thinker, tok, corpus, limit):
    size = np.array([len(tok.base.id_to_token(i)) for i in range(tok.base.get_vocab_size())])
    result = {}
    for domain in prepare.DOMAINS:
        with lzma.open(corpus / f"{domain}.validation.txt.xz", "rb") as file:
            docs = [d for d in file.read().decode().split("\x1e") if d]
        windows = []
        for encoding in tok.base.encode_batch(docs, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.int64)
            windows += [w for w in np.split(ids, range(512, len(ids), 512)) if len(w) > 1]
        if limit and limit < len(windows):
            windows = [windows[i] for i in np.linspace(0, len(windows) - 1, limit).astype(int)]
        nats = tokens = 0.0
        for a in range(0, len(windows), 16):
            each = model.losses(thinker, data.tensors(data.pack([data.plain(w) for w in windows[a:a + 16]])))[2]
            nats, tokens = nats + float(each.sum()), tokens + len(each)
        size_of = sum(int(size[w[1:]].sum()) for w in windows)
        result[domain] = dict(bits_per_byte=round(nats / math.log(2) / size_of, 4), nats_per_token=round(nats / tokens, 4), windows=len(windows))
        print(domain, result[domain], flush=True)
    result["mean"] = round(float(np.mean([r["bits_per_byte"] for r in result.values()])), 4)
    print("mean", result["mean"], flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "config", "cache", "fonts", "out"):
        parser.add_argument("--" + name, type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, help="the corpus: also score held-out text")
    parser.add_argument("--windows", type=int, default=0, help="score so many windows of each domain only")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", default="", help="tasks, with commas; 'none' for text alone")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tok, config = tokenizer.load(args.cache / "tokenizer"), json.loads(args.config.read_text())
    thinker = model.build(config).eval()
    weights = torch.load(args.weights, weights_only=True)
    weights, tokens = weights.get("model", weights), weights.get("tokens")
    thinker.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in weights.items()})  # what will be stored
    names = [t for t in tasks.TASKS if t not in ("chat", "continue")] if not args.only else [t for t in args.only.split(",") if t != "none"]
    store = tasks.Store(args.cache, args.fonts, "validation")
    results = dict(weights=args.weights.name, tokens=tokens)
    with torch.no_grad():
        results["abilities"], results["examples"] = abilities(thinker, tok, store, names, args.samples)
        if args.text:
            results["text"] = bits_per_byte(thinker, tok, args.text, args.windows)
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
