"""Measures the Qwen3-MoE that train.py made: held-out loss beside xz and a 5-gram, expert usage by domain, samples.

    python models/evaluate.py --corpus CORPUS --model models/NAME --log WORK/log.jsonl --out models/

CORPUS is what train.py read. Writes to OUT: loss.png, specialisation.png, results.json, results.md, samples.md.
Every document is tokenised alone, without special tokens, and cut into windows of the model's context length that
do not overlap; a window's first token is context only. All models are scored on the same tokens and bytes, except
xz, which compresses the whole held-out file. Leaves out: training, and any judgement of the samples.
"""
import argparse, json, lzma, math, pathlib, time

import numpy as np

from train import DOMAINS, END_OF_TEXT, documents

ORDER = 5
SAMPLE = dict(max_new_tokens=120, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
SEED = 1
PROMPTS = {
    "rust": "/// Counts the lamps that are lit.\npub fn count_lit(lamps: &[Lamp]) ->",
    "python": "def longest_line(path):\n    \"\"\"Return the longest",
    "stories": "Once a small grey goose lived beside the mill, and",
    "prose": "Mrs. Hallam put down her teacup and looked at the curate.",
    "poetry": "Slow falls the snow upon the harbour wall,\n",
    # A title ("Autumn rain, sent to a friend in the mountains"), a made-up poet, and the first three characters.
    "chinese_poetry": "\u79cb\u96e8\u5bc4\u5c71\u4e2d\u6545\u4eba\n\u6797\u9060\u821f\n\u5bd2\u96e8\u6ef4",
    "law": "    (c) Inspection of lighthouses\n      The Secretary shall",
    "manuals": "LAMPCTL 8\n\nNAME\nlampctl\nswitch lamps on and off\n\nSYNOPSIS\n",
    "maths": "Q: Lena picks 12 plums and buys 3 bags of 4 plums each. How many plums does she have?\nA:",
    "dialogue": "USER: Hi, could I have a large flat white with oat milk?\nASSISTANT:",
}


# ---------------------------------------------------------------------------------------------- text

def token_bytes(tokenizer):
    """Bytes of text each token stands for: a byte-level piece has one character per byte."""
    return np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])


def encoded(tokenizer, docs):
    """Token ids of each document, a few hundred documents at a time since encodings are large."""
    for a in range(0, len(docs), 256):
        for encoding in tokenizer.encode_batch(docs[a:a + 256], add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int64)


def held_out_windows(tokenizer, docs, context, limit):
    """The windows with at least one token to score; with a limit, so many of them evenly spread."""
    size, end = token_bytes(tokenizer), tokenizer.token_to_id(END_OF_TEXT)
    windows = []
    for doc, ids in zip(docs, encoded(tokenizer, docs)):
        assert size[ids].sum() == len(doc.encode()) and end not in ids
        windows += [w for w in np.split(ids, range(context, len(ids), context)) if len(w) > 1]
    if limit and limit < len(windows):
        windows = [windows[i] for i in np.linspace(0, len(windows) - 1, limit).astype(int)]
    return windows


def xz_bits_per_byte(corpus, domain):
    """Bits per byte of `xz -9e` on the text of the held-out file, separators included."""
    with lzma.open(pathlib.Path(corpus) / f"{domain}.validation.txt.xz", "rb") as file:
        text = file.read()
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(text)


# ---------------------------------------------------------------------------------------------- model

def load_model(path, threads):
    """The checkpoint in f32: transformers' own code on the weights as stored."""
    import torch
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.set_num_threads(threads)
    from transformers import Qwen3MoeForCausalLM
    return Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


def measure_model(model, windows, budget=8192):
    """Nats of each window's scored tokens, and (windows, layers, experts) counts of the router's choices."""
    import torch
    import torch.nn.functional as F
    layers, experts, k = model.config.num_hidden_layers, model.config.num_experts, model.config.num_experts_per_tok
    chosen = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda module, inputs, logits: chosen.append(logits.topk(k, -1).indices))
             for layer in model.model.layers]
    nats, counts = np.zeros(len(windows)), np.zeros((len(windows), layers, experts), dtype=np.int64)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))  # like lengths together: little padding
    with torch.no_grad():
        while order:
            width = len(windows[order[0]])
            batch, order = order[:budget // width], order[budget // width:]
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, :len(windows[i])] = torch.from_numpy(windows[i])
            chosen.clear()
            # Padding stands at the end, where causal attention hides it from all that is counted.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            choice = torch.stack(chosen).view(layers, len(batch), width, k)
            for row, i in enumerate(batch):
                n = len(windows[i])
                nats[i] = F.cross_entropy(model.lm_head(hidden[row, :n - 1]), ids[row, 1:n], reduction="sum").item()
                for l in range(layers):
                    counts[i, l] = torch.bincount(choice[l, row, :n].reshape(-1), minlength=experts).numpy()
    for hook in hooks:
        hook.remove()
    return nats, counts


def write_samples(model, tokenizer, path):
    """One continuation of each prompt, as it came."""
    import torch
    from transformers import GenerationConfig
    # In place of the checkpoint's own settings, whose top_k and penalty generate() would add to ours.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.token_to_id(END_OF_TEXT), pad_token_id=tokenizer.token_to_id(END_OF_TEXT), **SAMPLE)
    lines = [f"# Samples\n\nOne prompt per domain, written for this purpose; {SAMPLE['max_new_tokens']} new tokens, temperature {SAMPLE['temperature']}, "
             f"top-p {SAMPLE['top_p']}, seeds {SEED} to {SEED + len(DOMAINS) - 1} in order, one try, unedited. `[[` and `]]` enclose what the model wrote.\n"]
    for i, domain in enumerate(DOMAINS):
        ids = torch.tensor([tokenizer.encode(PROMPTS[domain], add_special_tokens=False).ids])
        torch.manual_seed(SEED + i)
        new = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1]:].tolist()
        ended = new[-1] == model.generation_config.eos_token_id
        text = tokenizer.decode(new, skip_special_tokens=True)
        lines.append(f"## {domain}\n\n~~~~~~~~text\n{PROMPTS[domain]}[[{text}]]\n~~~~~~~~\n")
        if ended:
            lines.append(f"It ended there by itself, with `{END_OF_TEXT}`.\n")
    path.write_text("\n".join(lines))


# ---------------------------------------------------------------------------------------------- 5-gram

def training_stream(tokenizer, corpus):
    """All training documents as tokens, an end-of-text before, between and after them."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.array([end], dtype=np.int64)]
    for domain in DOMAINS:
        for ids in encoded(tokenizer, documents(corpus, domain, "train")):
            parts += [ids, parts[0]]
    return np.concatenate(parts)


def discounts(counts):
    """What is taken off a count of 0, 1, 2 and 3 or more: Chen and Goodman's estimates."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        d = np.array([0] + [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)])
        if (d >= 0).all() and (d <= np.arange(4)).all():
            return d
    return np.array([0, 0.5, 1.0, 1.5])  # too few to estimate from, as among the single tokens: KenLM's fallback


def ngram_tables(stream, vocabulary, end):
    """tables[n]: sorted keys of the n-grams seen, a key being the place of the n-gram's first n - 1 tokens in tables[n - 1]
    times the vocabulary plus its last token; and for raw counts and for continuation counts (in how many different
    n + 1-grams it stands last) the count of each key, the discounts, and per context the total and the mass discounted."""
    tables = [dict(keys=np.zeros(1, dtype=np.int64)), dict(keys=np.arange(vocabulary), raw=np.bincount(stream, minlength=vocabulary))]
    ids, start = stream, np.arange(len(stream))  # which n-gram begins at a place, and the places where one does
    for n in range(2, ORDER + 1):
        start = start[start + n <= len(stream)]
        if n > 2:
            start = start[stream[start + n - 2] != end]  # an n-gram may begin or end at a document's border, not cross it
        keys, first, inverse, raw = np.unique(ids[start] * vocabulary + stream[start + n - 1], return_index=True, return_inverse=True, return_counts=True)
        tables[n - 1]["continuation"] = np.bincount(ids[start[first] + 1], minlength=len(tables[n - 1]["keys"]))
        tables.append(dict(keys=keys, raw=raw))
        ids = np.full(len(stream), -1)
        ids[start] = inverse
    for n in range(1, ORDER + 1):
        t, contexts = tables[n], len(tables[n - 1]["keys"])
        for kind in ("raw", "continuation"):
            if kind in t:
                d, context = discounts(t[kind]), t["keys"] // vocabulary
                t[kind + "_discount"] = d
                t[kind + "_total"] = np.bincount(context * (n > 1), weights=t[kind], minlength=contexts)
                t[kind + "_freed"] = np.bincount(context * (n > 1), weights=d[np.minimum(t[kind], 3)], minlength=contexts)
    return tables


def ngram_place(tables, grams, vocabulary):
    """The place of each row's n-gram in its table, -1 where training had none."""
    if grams.shape[1] == 0:
        return np.zeros(len(grams), dtype=np.int64)
    place = grams[:, 0]
    for n in range(2, grams.shape[1] + 1):
        keys, key = tables[n]["keys"], place * vocabulary + grams[:, n - 1]
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        place = np.where((keys[at] == key) & (place >= 0), at, -1)
    return place


def ngram_probability(tables, grams, vocabulary):
    """Interpolated modified Kneser-Ney probability of the last column after the columns before it."""
    width = grams.shape[1]
    p = np.full(len(grams), 1 / vocabulary)
    for n in range(1, width + 1):
        t, kind = tables[n], "raw" if n == width else "continuation"
        context = ngram_place(tables, grams[:, width - n:width - 1], vocabulary)
        gram = ngram_place(tables, grams[:, width - n:], vocabulary)
        count = np.where(gram >= 0, t[kind][gram], 0)
        total, freed = t[kind + "_total"][context], t[kind + "_freed"][context]
        seen = (context >= 0) & (total > 0)
        kept = count - t[kind + "_discount"][np.minimum(count, 3)]
        p[seen] = ((kept + freed * p) / np.where(seen, total, 1))[seen]
    return p


def check_normalised(tables, windows, vocabulary):
    rng = np.random.default_rng(SEED)
    for width in range(2, ORDER + 1):
        for _ in range(5):
            window = windows[rng.choice([i for i, w in enumerate(windows) if len(w) >= width])]
            a = rng.integers(0, len(window) - width + 1)
            grams = np.column_stack([np.tile(window[a:a + width - 1], (vocabulary, 1)), np.arange(vocabulary)])
            assert abs(ngram_probability(tables, grams, vocabulary).sum() - 1) < 1e-9


def ngram_nats(tables, windows, vocabulary):
    """Nats of the scored tokens of all windows; near a window's start the context, and with it the order, is shorter."""
    total = 0.0
    for width in range(2, ORDER + 1):
        long = [w for w in windows if len(w) >= width]
        if long:
            grams = np.stack([w[:width] for w in long]) if width < ORDER else np.concatenate([np.lib.stride_tricks.sliding_window_view(w, width) for w in long])
            total -= np.log(ngram_probability(tables, grams, vocabulary)).sum()
    return float(total)


# ---------------------------------------------------------------------------------------------- expert usage

def entropy(p):
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)


def divergences(counts, label, groups):
    """(layers, groups, groups): Jensen-Shannon divergence in bits of the groups' shares of the routed choices."""
    member = (label == np.arange(groups)[:, None]).astype(float)
    usage = np.tensordot(member, counts, 1).transpose(1, 0, 2)
    usage /= usage.sum(-1, keepdims=True)
    a, b = usage[:, :, None], usage[:, None]
    return np.maximum(entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2, 0)


def pair_mean(divergence):
    """Mean over the pairs of different groups, per layer."""
    i, j = np.triu_indices(divergence.shape[-1], 1)
    return divergence[:, i, j].mean(1)


def specialisation(counts, label, shuffles):
    """Per layer the pairwise divergences, their mean, and mean and 95th percentile of that mean with the windows' labels shuffled."""
    groups = sorted(set(label.tolist()))
    label = np.searchsorted(groups, label)
    rng = np.random.default_rng(SEED)
    found = divergences(counts, label, len(groups))
    control = np.array([pair_mean(divergences(counts, rng.permutation(label), len(groups))) for _ in range(shuffles)])
    return found, pair_mean(found), control.mean(0), np.percentile(control, 95, axis=0)


# ---------------------------------------------------------------------------------------------- pictures

def read_log(path):
    """The log's entries by step; a resumed run repeats the steps since its last save, and the later entry holds."""
    entries = {}
    for line in path.read_text().splitlines():
        if line.endswith("}"):  # the last line may be in the writing
            entry = json.loads(line)
            entries[entry["step"]] = entry
    return [entries[step] for step in sorted(entries)]


def draw_loss(log, path):
    from matplotlib import pyplot as plt
    tokens, loss = np.array([e["tokens"] for e in log]) / 1e6, np.array([e["loss"] for e in log])
    span = max(1, min(50, len(log) // 10))
    smooth = np.convolve(loss, np.ones(span) / span, "valid")
    held = [(e["tokens"] / 1e6, np.mean(list(e["held_out"].values()))) for e in log if "held_out" in e]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(tokens[span - 1:], smooth, linewidth=0.8, color="tab:gray", label=f"training batches (mixed by domain), mean of {span} steps")
    if held:
        axes.plot(*zip(*held), color="tab:blue", marker="o", markersize=3, linewidth=1, label="held-out, mean of the ten domains")
    # The first steps, near ln(vocabulary), would flatten all that follows.
    low = min([smooth.min()] + [loss for _, loss in held])
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", xlim=(0, None), ylim=(low - 0.1, min(smooth.max(), low + 4) + 0.1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_specialisation(found, mean, percentile, path):
    """A matrix of domain pairs per layer on one colour scale, and below them the layers' means beside the shuffled labels."""
    from matplotlib.colors import PowerNorm
    from matplotlib import pyplot as plt
    layers, columns = len(found), min(3, len(found))
    rows = math.ceil(layers / columns)
    names = [d.replace("chinese_poetry", "ch. poetry") for d in DOMAINS]
    figure = plt.figure(figsize=(2.7 * columns + 1.4, 2.7 * rows + 2.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.7 * rows + 0.4, 2.3])
    grid = above.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[layers:]:
        axes.set_visible(False)
    for l, axes in enumerate(grid.flat[:layers]):
        # By the square root, or the pairs with Chinese would leave one colour to all the others.
        image = axes.imshow(found[l], cmap="viridis", norm=PowerNorm(0.5, 0, found.max()))
        axes.set_title(f"layer {l}", fontsize=9)
        axes.set_xticks(range(len(names)), names if l + columns >= layers else [], rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names if l % columns == 0 else [], fontsize=7)
    bar = above.colorbar(image, ax=grid, shrink=0.8, ticks=[t for t in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1) if t <= found.max()])
    bar.set_label("Jensen-Shannon divergence of expert usage (bits)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes = below.subplots()
    axes.bar(np.arange(layers) - 0.2, mean, 0.38, color="tab:blue", label="domains")
    axes.bar(np.arange(layers) + 0.2, percentile, 0.38, color="tab:orange", label="domain labels shuffled over windows, 95th percentile")
    axes.bar_label(axes.containers[0], fmt="%.3f", fontsize=7)
    axes.bar_label(axes.containers[1], fmt="%.4f", fontsize=7)
    axes.set_xticks(range(layers), [f"layer {l}" for l in range(layers)], fontsize=8)
    axes.set_ylim(0, 1.4 * mean.max())
    axes.set_ylabel("mean over pairs (bits)", fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- report

def table(head, rows):
    """A markdown table; all columns but the first to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)] + rows
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def report(results):
    """The markdown of results.md."""
    held, layers, pairs = results["held_out"], results["layers"], results["pairs"]
    of = lambda d, key: held[d][key]
    columns = ["model_bits_per_byte", "ngram_bits_per_byte", "xz_bits_per_byte"]
    numbers = lambda e: [f"{e[c]:.3f}" for c in columns] + [f"{e['model_nats_per_token']:.3f}", f"{e['ngram_nats_per_token']:.3f}"]
    rows = [[d] + numbers(held[d]) + [of(d, "tokens"), of(d, "bytes"), of(d, "windows")] for d in DOMAINS]
    rows.append(["**mean of domains**"] + numbers(results["mean"]) + [sum(of(d, c) for d in DOMAINS) for c in ("tokens", "bytes", "windows")])
    rows[-1][-3:] = [f"{n} in all" for n in rows[-1][-3:]]
    listing = lambda ds: ", ".join(ds) if ds else "none"
    below = [d for d in DOMAINS if of(d, columns[0]) < min(of(d, columns[1]), of(d, columns[2]))]
    text = "### Held-out bits per byte\n\n"
    text += table(["domain", "this model", f"{ORDER}-gram", "xz -9e", "model, nats/token", f"{ORDER}-gram, nats/token",
                   "tokens scored", "bytes scored", "windows"], rows)
    text += f"\nBelow both the {ORDER}-gram and xz in {len(below)} of {len(DOMAINS)} domains: {listing(below)}. "
    text += f"Not below the {ORDER}-gram: {listing([d for d in DOMAINS if of(d, columns[0]) >= of(d, columns[1])])}. "
    text += f"Not below xz: {listing([d for d in DOMAINS if of(d, columns[0]) >= of(d, columns[2])])}.\n"
    text += (f"\nEach held-out document is tokenised alone and cut into windows of {results['context']} tokens that do not overlap; "
             "the first token of a window is context only. "
             "Bits per byte are the nats of the scored tokens, over ln 2, over the bytes of those tokens. "
             "The model's weights are the stored bf16, its arithmetic f32. "
             f"The {ORDER}-gram is an interpolated modified Kneser-Ney model over the same tokens, trained on the ten training files together "
             f"({results['ngram']['training_tokens']} tokens, {results['ngram']['ngrams'][-1]} different {ORDER}-grams) "
             "and scored on the same tokens with the same windows. "
             "xz compresses the text of the whole held-out file: it has seen no training text, but all of the file so far where the others see one window.\n")
    if results["limit_windows"]:
        text += f"\n**Trial run: at most {results['limit_windows']} windows a domain were scored.**\n"
    text += "\n### Expert usage by domain\n\n"
    rows = []
    for l, e in enumerate(layers):
        rest = e["without_chinese_poetry"]
        rows.append([l, f"{e['mean']:.4f}", f"{e['shuffled_mean']:.5f}", f"{e['shuffled_95']:.5f}", f"{rest['mean']:.4f}", f"{rest['shuffled_95']:.5f}",
                     f"{e['unused_experts']} of {results['experts']}", f"{e['least_share']:.2f}", f"{e['largest_share']:.2f}"])
    text += table(["layer", "divergence of domains", "shuffled, mean", "shuffled, 95th percentile", "without chinese_poetry", "its shuffled, 95th percentile",
                   "unused experts", "least used", "most used"], rows)
    text += (f"\nDivergence: Jensen-Shannon, in bits, between two domains' shares of the router's choices ({results['routed']} in each layer), "
             f"mean over the pairs. Shuffled: the same with the domain labels dealt anew over the windows, {results['shuffles']} times. "
             "Least and most used: an expert's share over all ten domains' held-out text, 1 being an equal share.\n")
    text += "\n### Most distinct pairs of domains\n\n"
    rows = [[p["pair"].replace("/", " / "), f"{p['mean']:.3f}"] + [f"{v:.3f}" for v in p["layers"]] for p in pairs[:10] + pairs[-3:]]
    text += table(["pair", "mean of layers"] + [f"layer {l}" for l in range(len(layers))], rows[:10] + [["...", *[""] * (len(layers) + 1)]] + rows[10:])
    text += "\nThe ten most distinct, then the three most alike.\n\n"
    nearest = {d: [p for p in pairs if d in p["pair"].split("/")] for d in DOMAINS}
    other = lambda p, d: [x for x in p["pair"].split("/") if x != d][0]
    text += table(["domain", "most distinct from", "bits", "most like", "bits"],
                  [[d, other(nearest[d][0], d), f"{nearest[d][0]['mean']:.3f}", other(nearest[d][-1], d), f"{nearest[d][-1]['mean']:.3f}"] for d in DOMAINS])
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--limit-windows", type=int, default=0, help="windows a domain, for a trial (0: all)")
    parser.add_argument("--shuffles", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="torch's; more than there are idle cores makes it slower by far")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    from tokenizers import Tokenizer
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    say = lambda what: print(f"{time.time() - began:6.0f} s  {what}", flush=True)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load_model(args.model, args.threads)
    config, size = model.config, token_bytes(tokenizer)
    vocabulary, context = tokenizer.get_vocab_size(), config.max_position_embeddings
    log = read_log(args.log)
    draw_loss(log, args.out / "loss.png")
    write_samples(model, tokenizer, args.out / "samples.md")
    say("samples written")

    windows, held, counts, label = {}, {}, [], []
    for i, d in enumerate(DOMAINS):
        windows[d] = held_out_windows(tokenizer, documents(args.corpus, d, "validation"), context, args.limit_windows)
        nats, chosen = measure_model(model, windows[d])
        counts.append(chosen)
        label += [i] * len(nats)
        held[d] = dict(windows=len(nats), tokens=sum(len(w) - 1 for w in windows[d]), bytes=int(sum(size[w[1:]].sum() for w in windows[d])),
                       model_nats=nats.sum(), xz_bits_per_byte=xz_bits_per_byte(args.corpus, d))
        say(f"{d}: {held[d]['tokens']} tokens, {held[d]['model_nats'] / held[d]['tokens']:.4f} nats a token")
    counts, label = np.concatenate(counts), np.array(label)

    stream = training_stream(tokenizer, args.corpus)
    say(f"{len(stream)} training tokens for the {ORDER}-gram")
    tables = ngram_tables(stream, vocabulary, tokenizer.token_to_id(END_OF_TEXT))
    check_normalised(tables, [w for d in DOMAINS for w in windows[d]], vocabulary)
    for d in DOMAINS:
        held[d]["ngram_nats"] = ngram_nats(tables, windows[d], vocabulary)
        for kind in ("model", "ngram"):
            held[d][f"{kind}_nats_per_token"] = held[d][f"{kind}_nats"] / held[d]["tokens"]
            held[d][f"{kind}_bits_per_byte"] = held[d][f"{kind}_nats"] / math.log(2) / held[d]["bytes"]
    ngram = dict(order=ORDER, training_tokens=len(stream), ngrams=[len(t["keys"]) for t in tables[1:]],
                 discounts=[t["raw_discount"].tolist() for t in tables[1:]])
    say(f"{ORDER}-gram scored")

    found, mean, shuffled, percentile = specialisation(counts, label, args.shuffles)
    others = label != DOMAINS.index("chinese_poetry")  # a script of its own: is there more than that?
    rest = specialisation(counts[others], label[others], args.shuffles)
    used = counts.sum(0)
    share = used / used.sum(1, keepdims=True) * used.shape[1]
    layers = [dict(mean=mean[l], shuffled_mean=shuffled[l], shuffled_95=percentile[l], unused_experts=int((used[l] == 0).sum()),
                   least_share=share[l].min(), largest_share=share[l].max(), choices=used[l].tolist(), pairwise=found[l].tolist(),
                   without_chinese_poetry=dict(mean=rest[1][l], shuffled_mean=rest[2][l], shuffled_95=rest[3][l])) for l in range(len(found))]
    pairs = [dict(pair=f"{DOMAINS[i]}/{DOMAINS[j]}", mean=found[:, i, j].mean(), layers=found[:, i, j].tolist())
             for i, j in zip(*np.triu_indices(len(DOMAINS), 1))]
    pairs.sort(key=lambda p: -p["mean"])
    draw_specialisation(found, mean, percentile, args.out / "specialisation.png")

    columns = ("model_bits_per_byte", "ngram_bits_per_byte", "xz_bits_per_byte", "model_nats_per_token", "ngram_nats_per_token")
    results = dict(model=args.model.name, steps=log[-1]["step"], training_tokens=log[-1]["tokens"], limit_windows=args.limit_windows, context=context,
                   domains=DOMAINS, held_out=held, mean={c: np.mean([held[d][c] for d in DOMAINS]) for c in columns}, ngram=ngram,
                   experts=config.num_experts, routed=int(used[0].sum()), shuffles=args.shuffles, layers=layers, pairs=pairs)
    (args.out / "results.json").write_text(json.dumps(results, indent=1, default=float) + "\n")
    (args.out / "results.md").write_text(report(results))
    say("done")


if __name__ == "__main__":
    main()
