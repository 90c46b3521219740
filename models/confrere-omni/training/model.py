"""The model: transformers' own Qwen3-Omni thinker (`Qwen3OmniMoeThinkerForConditionalGeneration`) at a small size, and a forward that a CPU can train.

The modules, their parameters and their arithmetic are those of transformers; what is replaced is the order of work:
- samples of all tasks lie one after the other in one row, without padding (`Packed`), and attention is done in groups of
  samples of like length;
- the rows of each expert are gathered, padded to a multiple of 128, and multiplied at once.
`check.py` proves on a mixed batch that loss, logits and gradients are those of transformers' own forward, sample by sample.
"""
import math, os

import numpy as np
import torch
import torch.nn.functional as F

torch.cuda.is_current_stream_capturing = lambda: False  # a CPU-only machine with the registry's CUDA build
from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration, modeling_qwen3_omni_moe as modeling  # noqa: E402

BF16 = torch.bfloat16


def thinker_config(special, layers=8, experts=32, expert_size=64):
    """`thinker_config` of config.json, with the keys that the published one has."""
    rope = dict(interleaved=True, mrope_interleaved=True, mrope_section=[12, 10, 10], rope_type="default", type="default")
    return dict(
        model_type="qwen3_omni_moe_thinker", dtype="bfloat16", audio_token_id=special["<|audio_pad|>"], image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"], audio_start_token_id=special["<|audio_start|>"], audio_end_token_id=special["<|audio_end|>"],
        vision_start_token_id=special["<|vision_start|>"], vision_end_token_id=special["<|vision_end|>"], user_token_id=special["user"],
        position_id_per_seconds=13, seconds_per_chunk=2, initializer_range=0.02,
        audio_config=dict(model_type="qwen3_omni_moe_audio_encoder", num_mel_bins=128, encoder_layers=4, encoder_attention_heads=3, encoder_ffn_dim=384, d_model=192,
                          max_source_positions=1500, n_window=50, n_window_infer=800, conv_chunksize=500, downsample_hidden_size=32, output_dim=256, activation_function="gelu",
                          scale_embedding=False, dropout=0, attention_dropout=0, activation_dropout=0),
        vision_config=dict(model_type="qwen3_omni_moe_vision_encoder", depth=6, hidden_size=128, num_heads=4, intermediate_size=384, patch_size=16, spatial_patch_size=16,
                           spatial_merge_size=2, temporal_patch_size=2, in_channels=3, in_chans=3, out_hidden_size=256, num_position_embeddings=144,
                           deepstack_visual_indexes=[1, 3, 4], apply_vit_abs_pos_embed=True, hidden_act="gelu_pytorch_tanh", image_size=192, tokens_per_second=2),
        text_config=dict(model_type="qwen3_omni_moe_text", vocab_size=(special["size"] + 63) // 64 * 64, hidden_size=256, intermediate_size=4 * expert_size, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=64, moe_intermediate_size=expert_size, num_experts=experts, num_experts_per_tok=4, norm_topk_prob=True,
                         rope_theta=10000, rope_scaling=rope, rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=False, decoder_sparse_step=1,
                         mlp_only_layers=[], attention_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0, hidden_act="silu", router_aux_loss_coef=0.001,
                         sliding_window=None, use_sliding_window=False))


def special_ids(tok):
    return dict(tok.special, size=tok.size, user=tok.encode("user")[0], system=tok.encode("system")[0], assistant=tok.encode("assistant")[0])


def build(config, seed=0):
    """A new thinker in f32. Matrices start at 1/sqrt(inputs); what writes into the residual stream starts smaller by 1/sqrt(2 x layers)."""
    import copy
    torch.manual_seed(seed)
    thinker = modeling.Qwen3OmniMoeThinkerForConditionalGeneration(configuration.Qwen3OmniMoeThinkerConfig(**copy.deepcopy(config)))
    thinker = thinker.float()
    depth = {"language_model": len(thinker.model.language_model.layers), "visual": len(thinker.model.visual.blocks), "audio_tower": len(thinker.model.audio_tower.layers)}
    with torch.no_grad():
        for name, p in thinker.named_parameters():
            part = next((k for k in depth if k in name), None)
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim == 1:
                p.fill_(1.0)
            elif "embed_tokens" in name or "pos_embed" in name or "gate.weight" in name or "lm_head" in name:
                p.normal_(0, 0.02)
            else:
                inputs = math.prod(p.shape[1:]) if p.ndim != 3 else p.shape[-1]
                p.normal_(0, 1 / math.sqrt(inputs))
                if name.endswith(("o_proj.weight", "down_proj", "attn.proj.weight", "linear_fc2.weight", "out_proj.weight", "fc2.weight")):
                    p.mul_(1 / math.sqrt(2 * depth[part]))
    return thinker


def wide_residuals(thinker):
    """Under autocast the towers' residual streams would run in bf16: make them f32, as the text model's is."""
    for module in (thinker.model.visual.patch_embed, thinker.model.audio_tower.conv_out):
        module.register_forward_hook(lambda m, a, r: r.float())


# ------------------------------------------------------------------------------------------------ packed attention

class Take(torch.autograd.Function):
    """Rows by index, where `back` says at which place of the result each row stands (once); copies elsewhere get no gradient."""
    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class PutBack(torch.autograd.Function):
    """The rows of a padded layout that are real, in the order of the packed row."""
    @staticmethod
    def forward(ctx, x, index, back, real):
        ctx.save_for_backward(index, real)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        index, real = ctx.saved_tensors
        return grad.index_select(0, index) * real, None, None, None


class Groups:
    """Where the samples of a packed row stand once those of like length are padded and stacked."""
    STEPS = [16, 24, 36, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096]

    def __init__(self, lengths, causal):
        lengths = np.asarray(lengths)
        start = np.concatenate([[0], lengths.cumsum()[:-1]])
        size = np.array([next(s for s in self.STEPS if s >= n) for n in lengths])
        index, real, back, at, self.shapes, self.masks = [], [], np.empty(lengths.sum(), dtype=np.int64), 0, [], []
        for s in np.unique(size):
            members = np.flatnonzero(size == s)
            many = -(-len(members) // 4) * 4 if len(members) < 32 else -(-len(members) // 16) * 16  # few shapes: a new one costs a compile
            within = np.arange(s)
            inside = within[None] < lengths[members, None]
            rows = start[members, None] + np.minimum(within[None], lengths[members, None] - 1)
            back[rows[inside]] = at + np.flatnonzero(inside.reshape(-1))
            if many > len(members):
                inside = np.concatenate([inside, np.zeros((many - len(members), s), dtype=bool)])
                rows = np.concatenate([rows, np.broadcast_to(rows[:1], (many - len(members), s))])
            index.append(rows.reshape(-1))
            real.append(inside.reshape(-1))
            at += rows.size
            self.shapes.append((many, int(s)))
            if causal:  # a causal sample needs no mask for what follows it
                self.masks.append(torch.full((int(s), int(s)), -math.inf).triu(1).to(BF16))
            else:
                allowed = inside | ~inside.any(1, keepdims=True)
                self.masks.append(None if allowed.all() else torch.from_numpy(np.where(allowed, 0.0, -np.inf)).to(BF16)[:, None, None, :])
        self.index, self.back = torch.from_numpy(np.concatenate(index)), torch.from_numpy(back)
        self.real = torch.from_numpy(np.concatenate(real)).to(BF16)[:, None]

    def attend(self, q, k, v):
        """q (scaled) [T, heads, size], k and v [T, groups of heads, size] -> [T, heads * size]; bf16 (f32 where autocast is off)."""
        T, heads, size = q.shape
        kind = working_type()
        repeat = heads // k.shape[1]
        # One gather for all three: their rows go the same way.
        joint = torch.cat([q.reshape(T, -1).to(kind), k.reshape(T, -1).to(kind), v.reshape(T, -1).to(kind)], 1)
        joint = Take.apply(joint, self.index, self.back)
        out = []
        for block, (rows, length), mask in zip(joint.split([r * n for r, n in self.shapes]), self.shapes, self.masks):
            a, b, c = block.view(rows, length, -1, size).transpose(1, 2).split([heads, k.shape[1], v.shape[1]], 1)
            if repeat > 1:
                b, c = b.repeat_interleave(repeat, 1), c.repeat_interleave(repeat, 1)
            scores = a @ b.mT
            if mask is not None:
                scores = scores + mask.to(kind)
            out.append((torch.softmax(scores, -1) @ c).transpose(1, 2).reshape(rows * length, heads * size))
        return PutBack.apply(torch.cat(out), self.index, self.back, self.real.to(kind))


class Packed:
    """What the replaced modules need to know of the batch in hand: set before a forward, read within it."""
    text = vision = audio = None
    fractions = None  # per layer: share of the choices that went to each expert
    balance = None    # per layer: load-balancing loss, 1 when every expert is used alike
    routing = None    # a list, if the choices are wanted


# ------------------------------------------------------------------------------------------------ small steps, fused

compiled = torch.compile(dynamic=True) if os.environ.get("OMNI_COMPILE", "1") == "1" else lambda f: f


def working_type():
    return BF16 if torch.is_autocast_enabled("cpu") else torch.float32


@compiled
def normalise(x, weight, eps: float):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@compiled
def normalise_and_rotate(x, weight, eps: float, cos, sin, scale: float):
    """q or k [T, heads, size]: RMS norm over a head, then rotation; cos and sin [T, 1, size / 2]."""
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1) * scale


@compiled
def swiglu(a, share):
    gate, up = a.float().chunk(2, -1)
    return (F.silu(gate) * up * share).to(a.dtype)


@compiled
def swiglu_backward(a, share, grad):
    """Gradients of swiglu for its two inputs."""
    gate, up = a.float().chunk(2, -1)
    grad, s = grad.float(), torch.sigmoid(gate)
    silu = gate * s
    return torch.cat((grad * up * share * (s + silu * (1 - s)), grad * silu * share), -1).to(a.dtype), (grad * silu * up).sum(-1, keepdim=True)


@compiled
def softmax_loss(logits, label, weight):
    """Each row's loss, and the gradient of the weighted sum for the logits."""
    x = logits.float()
    scale = torch.logsumexp(x, 1, keepdim=True)
    hit = torch.arange(x.shape[1])[None] == label
    loss = (scale - torch.where(hit, x, 0.0).sum(1, keepdim=True))[:, 0]
    return loss, ((torch.exp(x - scale) - hit.float()) * weight).to(logits.dtype)


def rms_norm(self, hidden_states):
    return normalise(hidden_states, self.weight, self.variance_epsilon)


def patch_embed(self, hidden_states):
    """A convolution whose stride is its kernel is a matrix product."""
    return F.linear(hidden_states, self.proj.weight.view(self.embed_dim, -1), self.proj.bias)


def text_attention(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **_):
    T = hidden_states.shape[1]
    x = hidden_states[0].to(working_type())
    cos, sin = position_embeddings
    eps = self.q_norm.variance_epsilon
    q = normalise_and_rotate(self.q_proj(x).view(T, -1, self.head_dim), self.q_norm.weight, eps, cos, sin, self.scaling)
    k = normalise_and_rotate(self.k_proj(x).view(T, -1, self.head_dim), self.k_norm.weight, eps, cos, sin, 1.0)
    return self.o_proj(Packed.text.attend(q, k, self.v_proj(x).view(T, -1, self.head_dim)))[None], None


def vision_attention(self, hidden_states, cu_seqlens=None, position_embeddings=None, max_seqlen=None, **_):
    n = hidden_states.shape[0]
    q, k, v = self.qkv(hidden_states).reshape(n, 3, self.num_heads, -1).unbind(1)
    q, k = modeling.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    return self.proj(Packed.vision.attend(q * self.scaling, k, v))


def audio_attention(self, hidden_states, cu_seqlens=None, max_seqlen=None, **_):
    n = hidden_states.shape[0]
    split = lambda x: x.reshape(n, self.num_heads, -1)
    q, k, v = split(self.q_proj(hidden_states)), split(self.k_proj(hidden_states)), split(self.v_proj(hidden_states))
    return self.out_proj(Packed.audio.attend(q * self.scaling, k, v))


# ------------------------------------------------------------------------------------------------ experts

PAD = 128  # rows of an expert are padded to a multiple: a new matmul shape costs oneDNN a compile


class Experts(torch.autograd.Function):
    """Sum over each token's experts of share * down(silu(gate) * up), with the rows of each expert together.

    `token` names the row of x at each padded place, `slot` the places of each token's choices; padding has share 0."""
    @staticmethod
    def forward(ctx, x, share, gate_up, down, token, slot, sizes):
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        rows = x.index_select(0, token)
        a, y = rows.new_empty(len(rows), gate_up.shape[1]), torch.empty_like(rows)
        for mine, out, w in zip(rows.split(sizes), a.split(sizes), gate_up):
            if len(mine):
                torch.mm(mine, w.T, out=out)
        h = swiglu(a, share)
        for mine, out, w in zip(h.split(sizes), y.split(sizes), down):
            if len(mine):
                torch.mm(mine, w.T, out=out)
        ctx.save_for_backward(rows, a, h, share, gate_up, down, token, slot)
        ctx.sizes = sizes
        return y.index_select(0, slot).view(len(x), -1, x.shape[1]).sum(1)

    @staticmethod
    def backward(ctx, grad):
        rows, a, h, share, gate_up, down, token, slot = ctx.saved_tensors
        sizes = ctx.sizes
        grads, dh, dx = grad.index_select(0, token), torch.empty_like(h), torch.empty_like(rows)
        d_down, d_gate_up = torch.zeros_like(down), torch.zeros_like(gate_up)
        for g, out, mine, w, dw in zip(grads.split(sizes), dh.split(sizes), h.split(sizes), down, d_down):
            if len(g):
                torch.mm(g, w, out=out)
                torch.mm(g.T, mine, out=dw)
        da, d_share = swiglu_backward(a, share, dh)
        for g, out, mine, w, dw in zip(da.split(sizes), dx.split(sizes), rows.split(sizes), gate_up, d_gate_up):
            if len(g):
                torch.mm(g, w, out=out)
                torch.mm(g.T, mine, out=dw)
        dx = dx.index_select(0, slot).view(len(grad), -1, grad.shape[1]).sum(1)
        return dx, d_share, d_gate_up.float(), d_down.float(), None, None, None


def moe_block(self, hidden_states):
    """Qwen3OmniMoeThinkerTextSparseMoeBlock: router in f32, experts grouped; leaves the balance loss of the layer in `Packed`."""
    shape = hidden_states.shape
    x = hidden_states.reshape(-1, shape[-1])
    N, E, K = x.shape[0], self.gate.num_experts, self.gate.top_k
    with torch.autocast("cpu", enabled=False):
        p = F.softmax(F.linear(x.float(), self.gate.weight), -1)
        w, choice = p.topk(K, -1)
        w = w / w.sum(-1, keepdim=True)
    flat = choice.reshape(-1)
    order = flat.argsort(stable=True)
    count = torch.bincount(flat, minlength=E)
    padded = (count + PAD - 1) // PAD * PAD
    position = (padded.cumsum(0) - padded)[flat[order]] + torch.arange(N * K) - (count.cumsum(0) - count)[flat[order]]
    slot, token = torch.empty_like(order), torch.zeros(int(padded.sum()), dtype=torch.long)
    slot[order], token[position] = position, order // K
    share = torch.zeros(len(token)).index_copy(0, slot, w.reshape(-1))[:, None]
    y = Experts.apply(x.to(working_type()), share, self.experts.gate_up_proj, self.experts.down_proj, token, slot, padded.tolist())
    fraction = count.float() / count.sum()
    if Packed.balance is not None:
        Packed.fractions.append(fraction)
        Packed.balance.append(E * (fraction * p.mean(0)).sum())
    if Packed.routing is not None:
        Packed.routing.append((choice, w))
    return y.to(x.dtype).view(shape)


# Only these classes of transformers are touched, and only while a forward of ours runs.
REPLACED = [(modeling.Qwen3OmniMoeThinkerTextAttention, text_attention), (modeling.Qwen3OmniMoeVisionAttention, vision_attention),
            (modeling.Qwen3OmniMoeAudioAttention, audio_attention), (modeling.Qwen3OmniMoeThinkerTextSparseMoeBlock, moe_block),
            (modeling.Qwen3OmniMoeThinkerTextRMSNorm, rms_norm), (modeling.Qwen3OmniMoeTextRMSNorm, rms_norm), (modeling.Qwen3OmniMoeVisionPatchEmbed, patch_embed)]


class fast:
    """`with fast():` the replaced order of work; outside of it transformers is as it came."""
    def __enter__(self):
        self.kept = [(c, c.forward) for c, _ in REPLACED]
        for c, f in REPLACED:
            c.forward = f

    def __exit__(self, *_):
        for c, f in self.kept:
            c.forward = f


# ------------------------------------------------------------------------------------------------ forward of a packed batch

def perceive(thinker, batch):
    """What the towers make of a packed batch: rows for audio placeholders, rows for picture and video placeholders, deepstack rows."""
    m, ids = thinker.model, batch["ids"]
    heard = seen = None
    deep = []
    if batch.get("mel") is not None:
        Packed.audio = Groups(batch["audio_tokens"], causal=False)
        heard = m.audio_tower(batch["mel"], feature_lens=batch["mel_lengths"]).last_hidden_state
    if batch.get("patches") is not None:
        grids = batch["grids"]
        Packed.vision = Groups(np.repeat((grids[:, 1] * grids[:, 2]).numpy(), grids[:, 0].numpy()), causal=False)
        out = m.visual(batch["patches"], grid_thw=grids)
        n = int(((ids == m.config.image_token_id) | (ids == m.config.video_token_id)).sum())  # a blank picture may follow that only fills up the number of patches
        seen, deep = out.pooler_output[:n], [feature[:n] for feature in out.deepstack_features]
    return heard, seen, deep


def hidden_states(thinker, batch, perceived=None):
    """Last hidden states [T, hidden] of a packed batch (see data.py)."""
    m, ids = thinker.model, batch["ids"]
    heard, seen, deep = perceived or perceive(thinker, batch)
    Packed.text = Groups(batch["lengths"], causal=True)
    Packed.fractions, Packed.balance = [], []
    x = m.language_model.embed_tokens(ids)
    if heard is not None:
        x = x.index_copy(0, (ids == m.config.audio_token_id).nonzero()[:, 0], heard.to(x.dtype))
    if seen is not None:
        places = ((ids == m.config.image_token_id) | (ids == m.config.video_token_id)).nonzero()[:, 0]
        x = x.index_copy(0, places, seen.to(x.dtype))
    x = x[None]
    half = m.config.text_config.head_dim // 2
    rope = [table[0, :, None, :half].contiguous() for table in m.language_model.rotary_emb(x, batch["positions"][:, None])]
    for i, layer in enumerate(m.language_model.layers):
        x = layer(x, position_embeddings=rope)
        if i < len(deep):
            x = x.index_add(1, places, deep[i].to(x.dtype)[None])
    return m.language_model.norm(x)[0]


class CrossEntropy(torch.autograd.Function):
    """Weighted sum of the losses of rows, whose gradient is formed with it, a chunk of rows at a time: the logits never stand in memory."""
    @staticmethod
    def forward(ctx, x, head, target, weight):
        x, head = x.to(working_type()), head.to(working_type())
        dx, dw, each = torch.empty_like(x), torch.zeros(head.shape), []
        for a in range(0, x.shape[0], 2048):
            rows = x[a:a + 2048]
            loss, grad = softmax_loss(F.linear(rows, head), target[a:a + 2048, None], weight[a:a + 2048, None])
            each.append(loss)
            dx[a:a + 2048] = grad @ head
            dw += grad.T @ rows
        each = torch.cat(each)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(each)
        return (each * weight).sum(), each

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        return dx.float() * grad, dw * grad, None, None


def losses(thinker, batch):
    """(weighted loss, balance loss summed over layers, loss of each labelled token)."""
    with fast():
        x = hidden_states(thinker, batch)
    loss, each = CrossEntropy.apply(x.index_select(0, batch["where"]), thinker.lm_head.weight, batch["target"], batch["weight"])
    return loss, torch.stack(Packed.balance).sum(), each


@torch.no_grad()
def generate(thinker, batch, ends, most=48):
    """Greedy answers for every sample of a packed batch, as lists of ids. No cache of keys and values: the samples are short, and those done drop out."""
    m, lengths = thinker.model, [int(n) for n in batch["lengths"]]
    with fast():
        heard, seen, deep = perceive(thinker, batch)
    ids, positions = batch["ids"].split(lengths), batch["positions"].split(lengths, 1)
    own = lambda features, *pads: features.split([int(sum((i == p).sum() for p in pads)) for i in ids]) if features is not None else None
    heard = own(heard, m.config.audio_token_id)
    seen, deep = own(seen, m.config.image_token_id, m.config.video_token_id), [own(d, m.config.image_token_id, m.config.video_token_id) for d in deep]
    rows, answers, alive = list(zip(ids, positions)), [[] for _ in ids], list(range(len(ids)))
    join = lambda features: torch.cat([features[i] for i in alive]) if features is not None else None
    for _ in range(most):
        now = dict(ids=torch.cat([rows[i][0] for i in alive]), positions=torch.cat([rows[i][1] for i in alive], 1), lengths=[len(rows[i][0]) for i in alive])
        with fast():
            x = hidden_states(thinker, now, (join(heard), join(seen), [join(d) for d in deep]))
        last = torch.tensor(now["lengths"]).cumsum(0) - 1
        choice = F.linear(x[last].float(), thinker.lm_head.weight.float()).argmax(-1)
        still = []
        for i, token in zip(alive, choice):
            if int(token) not in ends:
                answers[i].append(int(token))
                rows[i] = (torch.cat([rows[i][0], token[None]]), torch.cat([rows[i][1], (rows[i][1].max() + 1).expand(3, 1)], 1))
                still.append(i)
        alive = still
        if not alive:
            break
    return answers


def parameters(thinker):
    return sum(p.numel() for p in thinker.parameters())
