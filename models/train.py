"""Trains the Qwen3-MoE that ships in this folder, from scratch: tokenizer, weights, checkpoint.

    python models/train.py tokenizer --corpus CORPUS --work WORK
    python models/train.py train     --corpus CORPUS --work WORK --tokens 60e6 [--workers 2]
    python models/train.py export    --work WORK --out models/NAME

CORPUS holds DOMAIN.train.txt.xz and DOMAIN.validation.txt.xz, documents separated by the byte 0x1e.
`train` saves its state every few minutes and resumes from it; progress goes to WORK/log.jsonl. Up to the
decay at the end the learning rate does not depend on --tokens, so a run may be lengthened while it lasts.
Leaves out: measuring the result (see evaluate.py).
"""
import argparse, json, lzma, math, os, pathlib, sys, time

import numpy as np

DOMAINS = ["rust", "python", "stories", "prose", "poetry", "chinese_poetry", "law", "manuals", "maths", "dialogue"]
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512
CONFIG = dict(vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
              head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=96, rope_theta=10000.0)


def documents(corpus, domain, split):
    with lzma.open(pathlib.Path(corpus) / f"{domain}.{split}.txt.xz", "rb") as file:
        return [text for text in file.read().decode().split("\x1e") if text]


# ---------------------------------------------------------------------------------------------- tokenizer

def train_tokenizer(corpus, work):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as Qwen does: numbers of any length are then spelled the same way.
    split = Regex(r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(1)
    texts = []
    for domain in DOMAINS:  # an equal share each, or the small domains would get no merges of their own
        budget = 2_500_000
        docs = documents(corpus, domain, "train")
        for i in rng.permutation(len(docs)):
            if budget <= 0:
                break
            texts.append(docs[i][:budget])
            budget -= len(docs[i].encode())
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=[AddedToken(END_OF_TEXT, special=True)],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    for split_name in ("train", "validation"):
        for domain in DOMAINS:
            docs = documents(corpus, domain, split_name)
            ids = []
            for encoding in tokenizer.encode_batch(docs):
                ids += encoding.ids + [end]
            np.save(work / f"{domain}.{split_name}.npy", np.array(ids, dtype=np.uint16))
            size = sum(len(d.encode()) for d in docs)
            print(f"{domain} {split_name}: {len(ids)} tokens, {size / len(ids):.2f} bytes a token", flush=True)


# ---------------------------------------------------------------------------------------------- model

def build_model():
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    C = CONFIG
    BF16 = torch.bfloat16
    D, H, KV, HD, E, K, I = (C[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                                            "num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    PAD = 128  # rows of an expert are padded to a multiple: a new matmul shape costs oneDNN a compile

    class GatherRows(torch.autograd.Function):
        """Rows in expert order; backwards a plain index_select and a sum over the K copies of each row."""
        @staticmethod
        def forward(ctx, x, token, slot):
            ctx.save_for_backward(slot)
            return x.index_select(0, token)

        @staticmethod
        def backward(ctx, grad):
            (slot,) = ctx.saved_tensors
            return grad.index_select(0, slot).view(-1, K, grad.shape[-1]).sum(1), None, None

    class ReturnRows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, choice, real, slot):
            ctx.save_for_backward(choice, real)
            return y.index_select(0, slot)

        @staticmethod
        def backward(ctx, grad):
            choice, real = ctx.saved_tensors
            return grad.index_select(0, choice) * real, None, None, None

    class RmsNorm(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)

    class CrossEntropy(torch.autograd.Function):
        """Mean loss of the tied head, whose gradient is formed with it, a chunk of rows at a time: the logits never stand in memory."""
        @staticmethod
        def forward(ctx, x, weight, target):
            dx, dw, total, n = torch.empty_like(x), torch.zeros(weight.shape), 0.0, x.shape[0]
            for a in range(0, n, 2048):
                rows, label = x[a:a + 2048], target[a:a + 2048, None]
                logits = F.linear(rows, weight).float()
                logits -= logits.amax(1, keepdim=True)
                picked = logits.gather(1, label)
                logits.exp_()
                scale = logits.sum(1, keepdim=True)
                total += (scale.log() - picked).sum()
                logits /= scale
                logits.scatter_add_(1, label, torch.full_like(picked, -1.0))
                grad = logits.to(BF16)
                dx[a:a + 2048] = grad @ weight
                dw += (rows.T @ grad).T
            ctx.save_for_backward(dx, dw)
            ctx.scale = 1 / n
            return total / n

        @staticmethod
        def backward(ctx, grad):
            dx, dw = ctx.saved_tensors
            return dx * (grad * ctx.scale), (dw * (grad * ctx.scale)).to(BF16), None

    def linear(x, weight):
        return F.linear(x.to(BF16), weight.to(BF16))

    def matrix(*shape):
        return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_norm, self.post_norm, self.q_norm, self.k_norm = RmsNorm(D), RmsNorm(D), RmsNorm(HD), RmsNorm(HD)
            self.q, self.k, self.v = matrix(H * HD, D), matrix(KV * HD, D), matrix(KV * HD, D)
            self.o = nn.Parameter(torch.zeros(D, H * HD))
            self.router = nn.Parameter(torch.randn(E, D) * 0.02)
            self.gate_up = matrix(E, 2, I, D)
            self.down = nn.Parameter(torch.randn(E, D, I) / math.sqrt(I) * 0.1)

        def attention(self, x, cos, sin):
            B, T, _ = x.shape
            q = linear(x, self.q).view(B, T, H, HD)
            k = linear(x, self.k).view(B, T, KV, HD)
            v = linear(x, self.v).view(B, T, KV, HD).transpose(1, 2)
            q, k = self.q_norm(q.float()).transpose(1, 2), self.k_norm(k.float()).transpose(1, 2)

            def rotate(t):
                a, b = t.chunk(2, -1)
                return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(BF16)
            q, k = rotate(q), rotate(k)
            k, v = k.repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
            # Plain matmuls: on a CPU in bf16 they are 2.5 times as fast as scaled_dot_product_attention here.
            scores = (q * HD ** -0.5) @ k.mT + torch.full((T, T), -math.inf, dtype=BF16).triu(1)
            a = torch.softmax(scores, -1) @ v
            return linear(a.transpose(1, 2).reshape(B, T, H * HD), self.o).float()

        def route(self, x):
            p = F.softmax(F.linear(x, self.router), -1)
            w, choice = p.topk(K, -1)
            return p, w / w.sum(-1, keepdim=True), choice

        def experts(self, x, world):
            N = x.shape[0]
            p, w, choice = self.route(x)
            flat = choice.reshape(-1)
            order = flat.argsort(stable=True)
            count = torch.bincount(flat, minlength=E)
            padded = (count + PAD - 1) // PAD * PAD
            rank = torch.arange(N * K) - (count.cumsum(0) - count)[flat[order]]
            position = (padded.cumsum(0) - padded)[flat[order]] + rank
            slot = torch.empty_like(order)
            slot[order] = position
            total = int(padded.sum())
            token = torch.zeros(total, dtype=torch.long)
            token[position] = order // K
            back = torch.zeros(total, dtype=torch.long)
            back[position] = order
            real = torch.zeros(total, 1, dtype=BF16)
            real[position] = 1
            rows = GatherRows.apply(x.to(BF16), token, slot)
            gate_up, down = self.gate_up.to(BF16).view(E, 2 * I, D).unbind(0), self.down.to(BF16).unbind(0)
            out = []
            for e, xe in enumerate(rows.split(padded.tolist())):
                if xe.shape[0]:
                    g, u = F.linear(xe, gate_up[e]).chunk(2, -1)
                    out.append(F.linear(F.silu(g) * u, down[e]))
            y = ReturnRows.apply(torch.cat(out), back, real, slot).view(N, K, D)
            # Load balancing over the global batch: the fractions are summed over all workers before they
            # meet the probabilities, so that one sequence may use few experts as long as the batch uses all.
            fraction = count.float()
            if world > 1:
                torch.distributed.all_reduce(fraction)
            fraction /= fraction.sum()
            balance = E * (fraction * p.mean(0)).sum()
            self.fraction = fraction
            return (y.float() * w.unsqueeze(-1)).sum(1), balance

        def forward(self, x, cos, sin, world):
            B, T, _ = x.shape
            x = x + self.attention(self.input_norm(x), cos, sin)
            y, balance = self.experts(self.post_norm(x).view(B * T, D), world)
            return x + y.view(B, T, D), balance

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Parameter(torch.randn(C["vocab_size"], D) * 0.02)
            self.layers = nn.ModuleList(Layer() for _ in range(C["num_hidden_layers"]))
            self.norm = RmsNorm(D)

        def forward(self, ids, target, world=1):
            """Mean cross-entropy and mean balance loss of (rows, CONTEXT) token ids."""
            frequency = C["rope_theta"] ** (-torch.arange(0, HD, 2).float() / HD)
            angle = torch.outer(torch.arange(ids.shape[1]).float(), frequency)
            cos, sin = angle.cos(), angle.sin()
            x = F.embedding(ids, self.embed)
            balance = 0.0
            for layer in self.layers:
                x, b = layer(x, cos, sin, world)
                balance = balance + b
            x = self.norm(x).view(-1, D).to(BF16)
            return CrossEntropy.apply(x, self.embed.to(BF16), target.reshape(-1)), balance / len(self.layers)

    return Model()


# ---------------------------------------------------------------------------------------------- training

def orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix of each (…, rows, columns); Muon, Jordan 2024."""
    import torch
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).float()


def muon_step(params, momenta, lr, weight_decay, momentum=0.95):
    import torch
    with torch.no_grad():
        for p, m in zip(params, momenta):
            m.lerp_(p.grad, 1 - momentum)
            g = p.grad.lerp(m, momentum)
            update = orthogonalise(g)
            p.mul_(1 - lr * weight_decay)
            p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2], p.shape[-1])))


def domain_weights(streams):
    size = np.array([len(streams[d]) for d in DOMAINS], dtype=float)
    weight = size ** 0.6
    return weight / weight.sum()


def sample_batch(streams, weight, rng, rows):
    import torch
    batch = np.empty((rows, CONTEXT + 1), dtype=np.int64)
    for i, d in enumerate(rng.choice(len(DOMAINS), rows, p=weight)):
        stream = streams[DOMAINS[d]]
        start = rng.integers(0, len(stream) - CONTEXT - 1)
        batch[i] = stream[start:start + CONTEXT + 1]
    return torch.from_numpy(batch)


def held_out_loss(model, valid, windows=24):
    import torch
    result = {}
    with torch.no_grad():
        for d in DOMAINS:
            n = min(windows, (len(valid[d]) - 1) // CONTEXT)
            stride = (len(valid[d]) - CONTEXT - 1) // max(n - 1, 1)
            ids = torch.from_numpy(np.stack([valid[d][i * stride:i * stride + CONTEXT + 1] for i in range(n)]).astype(np.int64))
            result[d] = round(model(ids[:, :-1], ids[:, 1:])[0].item(), 4)
    return result


def train(rank, args):
    import torch
    import torch.distributed as dist
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.set_num_threads(args.threads)
    world = args.workers
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.work}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = build_model()
    matrices = [p for l in model.layers for p in (l.q, l.k, l.v, l.o, l.gate_up, l.down)]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state_file = args.work / "state.pt"
    step = tokens = 0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        for m, saved in zip(momenta, state["momenta"]):
            m.copy_(saved)
        step, tokens = state["step"], state["tokens"]
    streams = {d: np.load(args.work / f"{d}.train.npy", mmap_mode="r") for d in DOMAINS}
    valid = {d: np.load(args.work / f"{d}.validation.npy") for d in DOMAINS}
    weight = domain_weights(streams)
    everything = list(model.parameters())
    flat = torch.empty(sum(p.numel() for p in everything))
    saved_at = time.time()
    log = open(args.work / "log.jsonl", "a")
    while tokens < args.tokens:
        began = time.time()
        rng = np.random.default_rng([step, rank])  # a resumed run draws what an uninterrupted one would
        ids = sample_batch(streams, weight, rng, args.rows)
        loss, balance = model(ids[:, :-1], ids[:, 1:], world)
        (loss + args.balance * balance).backward()
        if world > 1:
            torch.cat([p.grad.reshape(-1) for p in everything], out=flat)
            dist.all_reduce(flat)
            flat /= world
            for p, g in zip(everything, flat.split([p.numel() for p in everything])):
                p.grad.copy_(g.view_as(p))
        warm = min(1.0, (step + 1) / 100)
        decay = min(1.0, max(0.0, (args.tokens - tokens) / (args.decay * args.tokens)))
        rate = warm * decay
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * rate
        adam.step()
        muon_step(matrices, momenta, args.muon_lr * rate, 0.1)
        for p in everything:
            p.grad = None
        step += 1
        tokens += world * args.rows * CONTEXT
        if rank == 0:
            entry = dict(step=step, tokens=tokens, loss=round(loss.item(), 4), balance=round(balance.item(), 4), rate=round(rate, 4), seconds=round(time.time() - began, 2))
            if step % args.every == 0 or tokens >= args.tokens:
                entry["held_out"] = held_out_loss(model, valid)
                entry["unused_experts"] = int(sum((l.fraction < 1e-4).sum() for l in model.layers))
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if time.time() - saved_at > 240 or tokens >= args.tokens:
                temporary = state_file.with_suffix(".tmp")
                torch.save(dict(model=model.state_dict(), adam=adam.state_dict(), momenta=momenta, step=step, tokens=tokens), temporary)
                os.replace(temporary, state_file)
                saved_at = time.time()


# ---------------------------------------------------------------------------------------------- export

def export(work, out):
    """Writes the checkpoint as transformers publishes one: per-expert names, bf16, shards with an index."""
    import shutil
    import torch
    from safetensors.torch import save_file
    state = torch.load(work / "state.pt", map_location="cpu", weights_only=True)["model"]
    tensors = {"model.embed_tokens.weight": state["embed"]}
    for l in range(CONFIG["num_hidden_layers"]):
        a, b = f"layers.{l}.", f"model.layers.{l}."
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")):
            tensors[f"{b}self_attn.{theirs}.weight"] = state[a + ours]
        for ours, theirs in (("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm"), ("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm")):
            tensors[f"{b}{theirs}.weight"] = state[f"{a}{ours}.weight"]
        tensors[f"{b}mlp.gate.weight"] = state[a + "router"]
        for e in range(CONFIG["num_experts"]):
            x = f"{b}mlp.experts.{e}."
            tensors[x + "gate_proj.weight"], tensors[x + "up_proj.weight"] = state[a + "gate_up"][e]
            tensors[x + "down_proj.weight"] = state[a + "down"][e]
    tensors["model.norm.weight"] = state["norm.weight"]
    out.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, t in tensors.items():
        t = t.to(torch.bfloat16).contiguous().clone()
        if size + t.nbytes > 12_000_000 and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)
        index |= {t: name for t in shard}
    total = sum(t.nbytes for s in shards for t in s.values())
    write = lambda name, value: (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    write("config.json", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **CONFIG, "attention_bias": False, "attention_dropout": 0.0,
                          "bos_token_id": None, "eos_token_id": 0, "decoder_sparse_step": 1, "dtype": "bfloat16", "hidden_act": "silu", "initializer_range": 0.02, "intermediate_size": 384,
                          "max_position_embeddings": CONTEXT, "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False, "rms_norm_eps": 1e-06,
                          "rope_scaling": None, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False})
    # Dialogues in the corpus read "USER: …\nASSISTANT: …": the template writes just that, and a new turn of the user's ends the answer.
    template = ("{%- for message in messages %}{%- if message['role'] == 'system' %}{{- message['content'] + '\\n' }}"
                "{%- elif message['role'] == 'user' %}{{- 'USER: ' + message['content'] + '\\n' }}"
                "{%- elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' + message['content'] + '\\n' }}"
                "{%- else %}{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}{%- endfor %}"
                "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}")
    write("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "bos_token": None, "add_bos_token": False,
                                    "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT, "model_input_names": ["input_ids", "attention_mask"], "chat_template": template,
                                    "added_tokens_decoder": {"0": {"content": END_OF_TEXT, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}})
    write("generation_config.json", {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": 0, "pad_token_id": 0})
    shutil.copy(work / "tokenizer.json", out / "tokenizer.json")
    print(f"{len(tensors)} tensors, {len(shards)} shards, {total} bytes, {total // 2} parameters")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["tokenizer", "train", "export"])
    parser.add_argument("--corpus", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--tokens", type=float, default=60e6)
    parser.add_argument("--workers", type=int, default=2, help="processes; each takes --rows sequences a step")
    parser.add_argument("--threads", type=int, default=1, help="threads a worker")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--every", type=int, default=100, help="steps between held-out measurements")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the tokens, over which the learning rate falls to 0")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--balance", type=float, default=0.02, help="coefficient of the load-balancing loss")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.action == "tokenizer":
        train_tokenizer(args.corpus, args.work)
    elif args.action == "export":
        export(args.work, args.out)
    elif args.workers == 1:
        train(0, args)
    else:
        import torch.multiprocessing as mp
        (args.work / "rendezvous").unlink(missing_ok=True)
        mp.spawn(train, (args,), args.workers)


if __name__ == "__main__":
    main()
