"""The tokenizer in the layout Qwen3-Omni publishes: vocab.json, merges.txt, tokenizer_config.json, chat_template.json.

The byte-level merges come from an existing tokenizer (that of confrere-18m, so that figures per byte and per token compare);
the special tokens are those of Qwen3-Omni, in its order, after the text tokens. "assistant" gets a token of its own,
as every role has in the published tokenizer.
"""
import functools, json, pathlib, re

SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
           "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"]
PLAIN = {s for s in SPECIAL if re.match(r"</?(tool|think)|<\|(fim|repo|file)", s)}  # added, but shown when text is decoded
MULTIMODAL = dict(image_token="<|image_pad|>", audio_token="<|audio_pad|>", video_token="<|video_pad|>", vision_bos_token="<|vision_start|>",
                  vision_eos_token="<|vision_end|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>")
MEDIA = {"image": "<|vision_start|><|image_pad|><|vision_end|>", "audio": "<|audio_start|><|audio_pad|><|audio_end|>", "video": "<|vision_start|><|video_pad|><|vision_end|>"}
TEMPLATE = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
            "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
            "{%- if part.type == 'image' %}{{- '" + MEDIA["image"] + "' }}{%- elif part.type == 'audio' %}{{- '" + MEDIA["audio"] + "' }}"
            "{%- elif part.type == 'video' %}{{- '" + MEDIA["video"] + "' }}{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}"
            "{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
ADDED_MERGES = [("ist", "ant"), ("ass", "istant")]


def write(source, folder):
    """Writes the tokenizer's files, from the tokenizer.json of a byte-level BPE whose id 0 is the end of text."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(source.read_text())["model"]
    vocab = {w: i - 1 for w, i in sorted(model["vocab"].items(), key=lambda p: p[1]) if w != END_OF_TEXT}
    assert sorted(vocab.values()) == list(range(len(vocab)))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    for pair in ADDED_MERGES:
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
    ids = {s: len(vocab) + i for i, s in enumerate(SPECIAL)}
    save = lambda name, value: (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=None if name == "vocab.json" else 1) + "\n")
    save("vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    save("tokenizer_config.json", dict(
        tokenizer_class="Qwen2Tokenizer", processor_class="Qwen3OmniMoeProcessor", add_bos_token=False, add_prefix_space=False, bos_token=None, unk_token=None,
        eos_token="<|im_end|>", pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False, errors="replace", split_special_tokens=False, model_max_length=4096,
        additional_special_tokens=[s for s in SPECIAL if s not in PLAIN and s != END_OF_TEXT], extra_special_tokens=MULTIMODAL, **MULTIMODAL,
        added_tokens_decoder={str(i): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=s not in PLAIN) for s, i in ids.items()}))
    save("chat_template.json", {"chat_template": TEMPLATE})
    tok = load(folder)
    for role in ("system", "user", "assistant"):
        assert len(tok.encode(role)) == 1, role
    print(f"{len(vocab)} text tokens, {len(merges)} merges, {len(SPECIAL)} special tokens")


class Tokenizer:
    def __init__(self, folder):
        from tokenizers import Regex, Tokenizer as Base, decoders, models, normalizers, pre_tokenizers
        folder = pathlib.Path(folder)
        self.base = Base(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        self.base.normalizer = normalizers.NFC()
        self.base.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self.base.decoder = decoders.ByteLevel()
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.special = {t["content"]: int(i) for i, t in added.items()}
        self.size = max(self.special.values()) + 1
        self.cut = re.compile("(" + "|".join(re.escape(s) for s in self.special) + ")")
        self.piece = functools.lru_cache(65536)(lambda text: tuple(self.base.encode(text, add_special_tokens=False).ids))

    def encode(self, text):
        """Ids of a text in which special tokens may stand."""
        ids = []
        for part in self.cut.split(text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.piece(part)
        return ids

    def decode(self, ids):
        return self.base.decode([int(i) for i in ids if i < self.base.get_vocab_size()])


def load(folder):
    return Tokenizer(folder)
