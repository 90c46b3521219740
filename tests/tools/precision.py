"""What a model loses at each precision: nats a token, divergence, changed choices, greedy text. Beside other programs' figures, if given.

    python3 tests/tools/precision.py CONFRERE DATA_DIR MODEL --text FILE --tokenizer FILE [--calibrate FILE] [--field FIELD.csv] [--out DIR]

MODEL, in DATA_DIR, has plain weights. It is converted to q8, q4, q3 and q2, without and with FILE to calibrate by, unless that was done before,
and measured on `--text`, whose documents the byte 0x1e separates:
- loss: `eval perplexity`, nats a token above MODEL;
- divergence: Kullback-Leibler from MODEL's distribution, nats, mean and 99.9th percentile, and the share of tokens whose likeliest successor
  changed: over the first 512 tokens of eight documents of 256 or more, spread evenly;
- greedy: of up to 256 tokens behind the first 32 of each of those documents, how many come before the first that differs, as a share, the mean.
`--tokenizer` is the checkpoint's tokenizer.json. FIELD.csv has lines of `name,megabytes,loss`. Needs Python 3.10, numpy and tokenizers. Prints a table for docs/precision.md; with --out, writes
precision.json and precision.svg.
"""
import argparse, csv, json, math, pathlib, struct, subprocess, tempfile

import numpy as np
import tokenizers

DOCUMENTS, TOKENS, PROMPT, GREEDY = 8, 512, 32, 256


def logits(path):
    """The logits in a file of `eval logits`, (tokens, vocab)."""
    data = path.read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    entry = json.loads(data[8:8 + size])["logits"]
    start, end = entry["data_offsets"]
    return np.frombuffer(data[8 + size + start:8 + size + end], "<f4").reshape(entry["shape"])


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def drawing(points, field):
    """Loss by bytes, both axes logarithmic, as SVG; without what is much larger than the field."""
    largest = 1.15 * max((size for _, size, _ in field), default=math.inf)
    points = [point for point in points if point[1] <= largest]
    every = [(size, loss) for _, size, loss in points + field if loss > 0]
    left, right = min(s for s, _ in every) * 0.95, max(s for s, _ in every) * 1.05
    low, high = min(v for _, v in every) * 0.7, max(v for _, v in every) * 1.4
    x = lambda size: 60 + 560 * math.log(size / left) / math.log(right / left)
    y = lambda loss: 20 + 340 * (1 - math.log(loss / low) / math.log(high / low))
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 410" font-family="sans-serif" font-size="11">',
           '<rect width="760" height="410" fill="#fff"/>']
    for loss in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        if low < loss < high:
            out.append(f'<path d="M60 {y(loss):.1f}H640" stroke="#ddd"/><text x="54" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for size in range(math.ceil(left), math.floor(right) + 1, 1 if right - left < 15 else 4):
        out.append(f'<path d="M{x(size):.1f} 20V360" stroke="#eee"/><text x="{x(size):.1f}" y="376" text-anchor="middle">{size}</text>')
    out.append('<text x="350" y="396" text-anchor="middle">MB, everything</text><text x="60" y="14">nats a token above 16 bits</text>')
    taken = []
    for colour, some in (("#c02020", points), ("#707070", field)):
        for name, size, loss in some:
            if loss > 0:
                # Beside the point where there is room, else a line or more away from it.
                wide = 6.2 * len(name)
                places = [(x(size) + side, y(loss) + 4 + down) for down in (0, 10, -10, 20, -20, 30, -30) for side in (6, -6 - wide)]
                clear = lambda at: all(abs(at[1] - other[1]) >= 10 or at[0] + wide < other[0] or other[0] + other[2] < at[0] for other in taken)
                left_end, base = next((at for at in places if clear(at)), places[0])
                taken.append((left_end, base, wide))
                out.append(f'<circle cx="{x(size):.1f}" cy="{y(loss):.1f}" r="3.5" fill="{colour}"/>')
                out.append(f'<text x="{left_end:.1f}" y="{base:.1f}" fill="{colour}">{name}</text>')
    return "\n".join(out + ["</svg>\n"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("confrere")
    parser.add_argument("data_dir")
    parser.add_argument("model")
    for name in ("text", "tokenizer", "calibrate", "field", "out"):
        parser.add_argument("--" + name, type=pathlib.Path, required=name in ("text", "tokenizer"))
    args = parser.parse_args()

    def confrere(*command):
        ended = subprocess.run([args.confrere, "--data-dir", args.data_dir, "--offline", "--json", *map(str, command)], capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"confrere {command[0]}: {ended.stderr.strip()}")
        return json.loads(ended.stdout)

    models, here = [(args.model, "16 bits")], {model["name"] for model in confrere("ls")}
    for calibrate in (False, True) if args.calibrate else (False,):
        for precision in ("q8", "q4", "q3", "q2"):
            name = f"{args.model}-{precision}" + "-calibrated" * calibrate
            if name not in here:
                confrere("requantize", args.model, precision, "--name", name, *(["--calibrate", args.calibrate] if calibrate else []))
            models.append((name, precision + ", calibrated" * calibrate))

    tokenizer = tokenizers.Tokenizer.from_file(str(args.tokenizer))
    documents = [d.decode() for d in args.text.read_bytes().split(b"\x1e")]
    encoded = [ids for ids in (tokenizer.encode(d, add_special_tokens=False).ids for d in documents) if len(ids) >= TOKENS // 2]
    chosen = encoded[::max(1, len(encoded) // DOCUMENTS)][:DOCUMENTS]

    def measured(name, work):
        """Loss, megabytes, log-probabilities of the chosen documents, greedy tokens behind their beginnings."""
        loss, size = confrere("eval", "perplexity", name, args.text), next(m["bytes"] for m in confrere("ls") if m["name"] == name)
        probabilities, answers = [], []
        for ids in chosen:
            (work / "tokens.json").write_text(json.dumps(ids[:TOKENS]))
            confrere("eval", "logits", name, "--tokens", work / "tokens.json", "--out", work / "logits")
            probabilities.append(log_softmax(logits(work / "logits")))
            answer = confrere("run", name, tokenizer.decode(ids[:PROMPT]), "--raw", "--temperature", 0, "--max-tokens", GREEDY)
            answers.append(answer["tokens"])
        return loss, size / 1e6, np.concatenate(probabilities), answers

    rows = []
    with tempfile.TemporaryDirectory() as work:
        whole = measured(models[0][0], pathlib.Path(work))
        for name, label in models[1:]:
            loss, size, p, answers = measured(name, pathlib.Path(work))
            divergence = (np.exp(whole[2]) * (whole[2] - p)).sum(-1)
            same = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y))) / len(x) for x, y in zip(whole[3], answers)]
            rows.append(dict(
                precision=label, megabytes=round(size, 2), loss=loss["nats_per_token"] - whole[0]["nats_per_token"], tokens=loss["tokens"],
                divergence=divergence.mean(), divergence_999=np.quantile(divergence, 0.999), changed=(whole[2].argmax(-1) != p.argmax(-1)).mean(),
                positions=len(p), greedy=float(np.mean(same))))
    print(f"{rows[0]['tokens']} tokens; divergence over {rows[0]['positions']}; at 16 bits {whole[1]:.1f} MB, {whole[0]['nats_per_token']:.4f} nats")
    print("| precision | MB | loss | divergence | its 99.9th percentile | choices changed | greedy text the same |\n|---|---|---|---|---|---|---|")
    for r in rows:
        print("| {precision} | {megabytes:.1f} | {loss:.4f} | {divergence:.4f} | {divergence_999:.3f} | {changed:.1%} | {greedy:.0%} |".format(**r))
    if args.out:
        field = [(r[0], float(r[1]), float(r[2])) for r in csv.reader(args.field.open())] if args.field else []
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "precision.json").write_text(json.dumps(rows, indent=1, default=float) + "\n")
        (args.out / "precision.svg").write_text(drawing([(r["precision"], r["megabytes"], r["loss"]) for r in rows], field))


if __name__ == "__main__":
    main()
