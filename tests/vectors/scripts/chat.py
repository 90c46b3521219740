"""Conversations in the templates of the supported families: their text as jinja2 renders it, and their tokens.

Text is what transformers' `render_jinja_template` makes (jinja2 in its sandbox, trimmed blocks); tokens are what the `tokenizers` package makes of it with
the shipped tokenizer, to which the templates' marks are added as special tokens. Writes ../chat/prompts.json; and ../chat/qwen2.json: texts and
tokens of the shipped vocabulary and merges as a `Qwen2Tokenizer`.
usage: chat.py REPOSITORY     (needs transformers 5.23, tokenizers, jinja2)
"""
import json
import pathlib
import sys
import tempfile

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(sys.argv[1])
CHAT = ROOT / "tests/vectors/chat"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CONVERSATIONS = [
    [user("Hello")],
    [system("You are brief."), user("Why is the sky blue?")],
    [user("one"), assistant("two"), user("three")],
    [system("S"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    [user("  white space around \n")],
    [user("汉字 and 🦀🦀, é and \u0301")],
    [user("a < b, b > c, <p>html</p> & \"quotes\" 'n' more")],
    [user("x = [1, 2]\n\nfor i in x:\n    print(i)\n")],
    [user("user"), assistant("assistant"), user("system")],
    [user("q"), assistant("<think>\nlet me see\n</think>\n\nanswer"), user("and now?")],
    [user("q"), assistant("<think>\nfirst\n</think>\n\na"), user("r"), assistant("<think>\nsecond\n</think>\n\nb"), user("s")],
    [user("ends with <"), assistant("> begins so"), user("|")],
    [user("")],
    [user("im_start im_end |im_end| <|"), assistant("|>"), user("<im_end>")],
    [user("tabs\tand\r\nlines\n\n\n\nmany  spaces   here")],
]


TEXTS = [conversation[0]["content"] for conversation in CONVERSATIONS] + [
    "It's they'LL don't 12345 3.14 \u1e9b\u0323 \ufb01 ﷺ <|im_end|>\n\n \t x  ", "fn main() {\n    println!(\"{}\", 1);\n}\n", "Ωμέγα мир שלום नमस्ते ไทย 한국어 日本語"
]


def slow_tokenizer():
    """The vocabulary and merges alone, made into a tokenizer by transformers."""
    shipped = json.loads((ROOT / "models/confrere-18m/tokenizer.json").read_text())["model"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "vocab.json").write_text(json.dumps(shipped["vocab"], ensure_ascii=False))
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in shipped["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
        added = {"8192": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}
        config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        cases = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    (CHAT / "qwen2.json").write_text(json.dumps({"config": config, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
    print(len(cases), "texts")


def main():
    tokenizer = Tokenizer.from_file(str(ROOT / "models/confrere-18m/tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in PLAIN])
    cases = []
    for template in sorted(CHAT.glob("*.jinja")):
        for messages in CONVERSATIONS:
            case = {"template": template.name, "messages": messages}
            try:
                texts, _ = render_jinja_template(
                    conversations=[messages], chat_template=template.read_text(), add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
                )
                case["prompt"] = texts[0]
                case["ids"] = tokenizer.encode(texts[0], add_special_tokens=False).ids
            except Exception as error:  # the template's own refusal
                case["refused"] = str(error)
            cases.append(case)
    slow_tokenizer()
    marks = {"special": SPECIAL, "plain": PLAIN}
    (CHAT / "prompts.json").write_text(json.dumps({"marks": marks, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
    print(len(cases), "cases,", sum("refused" in case for case in cases), "refused")


main()
