"""Trains the small omni model from scratch, on a CPU, resumably.

    python train.py --cache CACHE --fonts DIR --work WORK --tokens 60e6

CACHE comes from prepare.py; DIR holds the folders dejavu/ and noto/ of fonts. The state (weights, optimisers, step) is saved
to WORK/state.pt every few minutes and when the process is asked to stop; the same command goes on from there. Batches depend
on the step number alone, and nothing else is random, so the state needs no generator's state.

A step is --parts packed batches, shared out among --workers processes of --threads threads each; with one thread a process
wastes least. The number of workers changes nothing but the speed, and may change at a restart.

Up to the decay at the end the learning rate does not depend on --tokens: a run may be lengthened or shortened while it lasts,
as long as the decay (the last --decay of the tokens) has not begun.

Progress: WORK/log.csv, a line every --every steps: tokens, seconds, the mean loss of each task in nats a token (empty: the task
did not come), balance loss, how unevenly experts are used; WORK/held_out.csv: text that training never sees, by domain.
Weights along the way: WORK/checkpoint-TOKENS.pt (bf16), once each of --keep is reached, and checkpoint-0.pt, untrained.
"""
import argparse, csv, ctypes.util, json, math, multiprocessing, os, pathlib, signal, sys, time

# Large blocks are kept by the allocator (else a step spends much of its time on page faults): by jemalloc where there is one,
# which needs the least memory and takes it in large pages (half as fast again). A thread that waits sleeps, so that other work on the machine gets the core. Compiled matrix
# products are remembered.
SURROUNDINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "6000", "PYTHONWARNINGS": "ignore"}
if __name__ == "__main__" and os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") is None:
    jemalloc = ctypes.util.find_library("jemalloc")
    SURROUNDINGS |= (dict(LD_PRELOAD=jemalloc, MALLOC_CONF="dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:2,thp:always") if jemalloc else
                     {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "300000000"})
    os.execve(sys.executable, [sys.executable] + sys.argv, os.environ | SURROUNDINGS)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data, model, tasks, tokenizer  # noqa: E402


def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix of each (…, rows, columns); Muon, Jordan 2024."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).float()


def as_matrices(name, p):
    """A parameter as the stack of matrices that it is: gate and up apart, query, key and value apart."""
    if name.endswith("gate_up_proj"):
        return p.view(p.shape[0], 2, -1, p.shape[-1])
    if name.endswith("qkv.weight"):
        return p.view(3, -1, p.shape[-1])
    return p


class Optimiser:
    """Muon for the matrices of layers and towers; Adam for embeddings, head, routers, norms, biases, and (slower) convolutions."""
    def __init__(self, thinker, muon_lr, adam_lr, weight_decay=0.1):
        self.muon_lr, self.weight_decay = muon_lr, weight_decay
        self.matrices, quick, slow = [], [], []
        for name, p in thinker.named_parameters():
            if "conv2d" in name or "patch_embed" in name or "pos_embed" in name:
                slow.append(p)
            elif p.ndim < 2 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight"):
                quick.append(p)
            else:
                self.matrices.append((name, p))
        self.momenta = [torch.zeros_like(p) for _, p in self.matrices]
        self.others = quick + slow
        self.adam = torch.optim.AdamW([dict(params=quick, peak=adam_lr), dict(params=slow, peak=adam_lr / 3)], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, rate):
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * rate
        self.adam.step()
        lr = self.muon_lr * rate
        for (name, p), m in zip(self.matrices, self.momenta):
            m.lerp_(p.grad, 0.05)
            update = orthogonalise(as_matrices(name, p.grad.lerp(m, 0.95)))
            scale = 0.2 * math.sqrt(max(update.shape[-2:]))
            p.mul_(1 - lr * self.weight_decay).add_(update.reshape(p.shape), alpha=-lr * scale)

    def state(self):
        return dict(adam=self.adam.state_dict(), momenta=self.momenta)

    def load(self, state):
        self.adam.load_state_dict(state["adam"])
        for m, saved in zip(self.momenta, state["momenta"]):
            m.copy_(saved)


def save_atomically(value, path):
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def keep_weights(thinker, path):
    save_atomically({n: p.detach().to(torch.bfloat16) for n, p in thinker.state_dict().items()}, path)


@torch.no_grad()
def held_out_text(thinker, text, windows, length=512):
    """Mean loss of each domain's held-out text, nats a token, on a fixed sample of windows."""
    result = {}
    for domain, stream in text.items():
        n = min(windows, (len(stream) - 1) // length)
        stride = (len(stream) - length - 1) // max(n - 1, 1)
        batch = data.tensors(data.pack([data.plain(np.asarray(stream[i * stride:i * stride + length + 1])) for i in range(n)]))
        with torch.autocast("cpu", torch.bfloat16):
            result[domain] = model.losses(thinker, batch)[2].mean().item()
    return result


def gini(share):
    share = np.sort(share)
    n = len(share)
    return float((2 * np.arange(1, n + 1) - n - 1) @ share / (n * share.sum()))


class Table:
    """A CSV file that survives a restart: lines of steps after the resumed one are dropped, for they will be written again."""
    def __init__(self, path, columns, step):
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["step"]) <= step]
        self.file, self.columns = open(path, "w", newline=""), columns
        self.writer = csv.DictWriter(self.file, columns, extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def add(self, row):
        self.writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()


def feed(queue, parent, *args):
    """Draws batches until training ends or its process is gone."""
    import queue as queues
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Patient:
        def put(self, item):
            while True:
                try:
                    return queue.put(item, timeout=5)
                except queues.Full:
                    if os.getppid() != parent:
                        os._exit(0)
    data.feed(Patient(), *args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--fonts", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=float, default=60e6, help="tokens in all, placeholders of media included")
    parser.add_argument("--decay", type=float, default=0.35, help="last share of the tokens, over which the learning rate falls to 0")
    parser.add_argument("--parts", type=int, default=4, help="packed batches a step, over all workers")
    parser.add_argument("--rows", type=int, default=4, help="windows of 512 tokens of text in a packed batch")
    parser.add_argument("--mix", choices=["all", "pictures"], default="all", help="shares of the tasks: see tasks.py")
    parser.add_argument("--media", type=int, default=2048, help="tokens of the other tasks in a packed batch")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--balance", type=float, default=0.001, help="coefficient of the load-balancing loss, which is summed over layers and 1 a layer when all experts are used alike")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--expert-size", type=int, default=64)
    parser.add_argument("--keep", default="0.5e6,2e6,6e6,16e6,32e6", help="tokens at which weights are kept")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--test-every", type=int, default=250)
    parser.add_argument("--save-seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads a worker")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    assert args.parts % args.workers == 0
    (args.work / "rendezvous").unlink(missing_ok=True)
    processes = multiprocessing.get_context("fork")  # before this process starts threads of its own
    others = [processes.Process(target=train, args=(rank, args), daemon=False) for rank in range(1, args.workers)]
    for other in others:
        other.start()
    train(0, args)
    for other in others:
        other.join()


def train(rank, args):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    state_file = args.work / "state.pt"
    state = torch.load(state_file, weights_only=True) if state_file.exists() else dict(step=0, tokens=0, text_tokens=0, seconds=0.0)
    step, tokens, text_tokens = state["step"], state["tokens"], state["text_tokens"]
    mine = range(rank * args.parts // args.workers, (rank + 1) * args.parts // args.workers)
    context = multiprocessing.get_context("fork")
    queue = context.Queue(maxsize=4)
    feeder = context.Process(target=feed, args=(queue, os.getpid(), args.cache, args.fonts, step, mine, args.rows, args.media, args.mix), daemon=True)
    feeder.start()

    torch.set_num_threads(args.threads)
    if args.workers > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{args.work.resolve()}/rendezvous", rank=rank, world_size=args.workers)
    lead = rank == 0
    tok = tokenizer.load(args.cache / "tokenizer")
    config = model.thinker_config(model.special_ids(tok), args.layers, args.experts, args.expert_size)
    if lead:
        (args.work / "config.json").write_text(json.dumps(config, indent=1))
    thinker = model.build(config)
    model.wide_residuals(thinker)
    optimiser = Optimiser(thinker, args.muon_lr, args.adam_lr)
    if "model" in state:
        thinker.load_state_dict(state["model"])
        optimiser.load(state)
    if lead and step:
        print(f"resumed at step {step}, {tokens} tokens", flush=True)
    elif lead:
        keep_weights(thinker, args.work / "checkpoint-0.pt")
        print(f"{model.parameters(thinker)} parameters", flush=True)
    spent = state["seconds"]
    del state
    if lead:
        text = {p.name.split(".")[1]: np.load(p) for p in sorted(args.cache.glob("text.*.validation.npy"))}
        log = Table(args.work / "log.csv", ["step", "tokens", "text_tokens", "seconds", "step_seconds", "rate", "balance", "unused", "gini", "text"] + list(tasks.TASKS), step)
        held = Table(args.work / "held_out.csv", ["step", "tokens", "text_tokens", "mean"] + list(text), step)
    parameters = list(thinker.parameters())
    flat = torch.empty(sum(p.numel() for p in parameters) + 2)
    keep = sorted(int(float(k)) for k in args.keep.split(","))
    began = saved = last = time.time()
    sums, counts, balances, used = {}, {}, [], []

    def save():
        save_atomically(dict(model=thinker.state_dict(), step=step, tokens=tokens, text_tokens=text_tokens, seconds=spent + time.time() - began, **optimiser.state()), state_file)

    while tokens < args.tokens:
        rate = min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (args.tokens - tokens) / (args.decay * args.tokens)))
        before, drawn_tokens = tokens, 0
        for part in mine:
            drawn, number, batch = queue.get()
            assert (drawn, number) == (step, part)
            with torch.autocast("cpu", torch.bfloat16):
                loss, balance, each = model.losses(thinker, data.tensors(batch))
            ((loss + args.balance * balance) / args.parts).backward()
            drawn_tokens += len(batch["ids"])
            if lead:  # the lead's share of the batches stands for all in the log
                each, owner = each.numpy(), np.array([batch["tasks"].index(t) for t in batch["tasks"]])[batch["owner"]]
                for i in np.unique(owner):
                    t = batch["tasks"][i]
                    sums[t] = sums.get(t, 0.0) + float(each[owner == i].sum())
                    counts[t] = counts.get(t, 0) + int((owner == i).sum())
                balances.append(float(balance.detach()) / args.layers)
                used.append(torch.stack(model.Packed.fractions).numpy())
        for p in parameters:
            if p.grad is None:  # no sample of the batches needed it
                p.grad = torch.zeros_like(p)
        if args.workers > 1:
            torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([float(drawn_tokens), float(len(stop))])], out=flat)
            torch.distributed.all_reduce(flat)
            for p, g in zip(parameters, flat[:-2].split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p))
            drawn_tokens, stopping = int(flat[-2]), bool(flat[-1])
        else:
            stopping = bool(stop)
        optimiser.step(rate)
        for p in parameters:
            p.grad = None
        step += 1
        tokens += drawn_tokens
        text_tokens += 512 * args.rows * args.parts
        if not lead:
            if stopping:
                break
            continue
        if step % args.every == 0:
            share, now = np.mean(used, 0), time.time()
            log.add(dict(step=step, tokens=tokens, text_tokens=text_tokens, seconds=spent + now - began, step_seconds=(now - last) / args.every, rate=rate, balance=float(np.mean(balances)),
                         unused=int((share < 1e-3).sum()), gini=float(np.mean([gini(s) for s in share])), **{t: sums[t] / counts[t] for t in sums}))
            sums, counts, balances, used, last = {}, {}, [], [], now
        if step % args.test_every == 0:
            result = held_out_text(thinker, text, windows=8)
            held.add(dict(step=step, tokens=tokens, text_tokens=text_tokens, mean=float(np.mean(list(result.values()))), **result))
            last = time.time()
        for k in keep:
            if before < k <= tokens:
                keep_weights(thinker, args.work / f"checkpoint-{k}.pt")
        if stopping:
            break
        if time.time() - saved > args.save_seconds:
            save()
            saved = time.time()
    if lead:
        save()
        if tokens >= args.tokens:
            keep_weights(thinker, args.work / f"checkpoint-{int(args.tokens)}.pt")
        print(f"stopped at step {step}, {tokens} tokens", flush=True)
    feeder.terminate()


if __name__ == "__main__":
    main()
