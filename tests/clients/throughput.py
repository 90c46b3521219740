"""Measures what 1, 4 and 8 clients at once get from a node, in tokens a second of all and against one; it checks the tokens, not the figures.

usage: throughput.py [DATA_DIR MODEL [TOKENS [SERVE_OPTION…]]]   by default the shipped model; one of your own may be without a tokenizer
"""
import asyncio
import sys
import time

import openai

import nodes
from conftest import lenient, strict

PROMPTS = [nodes.PROMPT, "def main():", "春", "The king said", "fn fmt(", "USER: I want a pizza.\nASSISTANT:", "Sec. 12. (a)", "O thou"]
ID_PROMPTS = [[7 * at + 1, 7 * at + 2, 7 * at + 3] for at in range(len(PROMPTS))]


async def ask(client, model, prompt, most):
    """A streamed answer: its tokens, and the seconds to the first of them."""
    began, first, tokens = time.monotonic(), None, []
    stream = await lenient(client).completions.create(
        model=model, prompt=prompt, temperature=0.7, seed=1, max_tokens=most, stream=True,
        stream_options={"include_usage": True}, extra_body={"return_token_ids": True},
    )
    async for chunk in stream:
        if chunk.choices:
            first = first or time.monotonic()
            tokens += getattr(chunk.choices[0], "token_ids", [])
        else:
            assert chunk.usage.completion_tokens == len(tokens)
    return tokens, first - began


async def together(serving, model, prompts, most, clients):
    """Every prompt twice, by so many clients: tokens a second, the mean seconds to the first, the tokens by prompt."""
    waiting = list(range(len(prompts))) * 2
    answers, count, firsts = {}, 0, []

    async def work(client):
        nonlocal count
        while waiting:
            at = waiting.pop()
            tokens, first = await ask(client, model, prompts[at], most)
            assert answers.setdefault(at, tokens) == tokens, f"other tokens after {prompts[at]!r}"
            count += len(tokens)
            firsts.append(first)
    async with strict(serving, openai.AsyncOpenAI) as client:
        began = time.monotonic()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        return count / (time.monotonic() - began), sum(firsts) / len(firsts), answers


def measure(serving, model, prompts, most):
    asyncio.run(together(serving, model, prompts[:1], most, 1))  # what it needs is in memory then
    print("clients  tokens/s  against one  first token")
    alone = None
    for clients in (1, 4, 8):
        rate, first, answers = asyncio.run(together(serving, model, prompts, most, clients))
        alone = alone or (rate, answers)
        assert answers == alone[1], "other tokens than for one client"
        print(f"{clients:7}  {rate:8.1f}  {rate / alone[0]:10.2f}x  {first * 1000:8.1f} ms", flush=True)
    print("throughput: 3 passed, 0 failed")


def main():
    if len(sys.argv) > 2:
        directory, model, most, options = sys.argv[1], sys.argv[2], int((sys.argv[3:4] or ["64"])[0]), sys.argv[4:]
        with nodes.Node(directory).serve("--model", model, *options) as serving:
            details = serving.http.get(f"/api/models/{model}").raise_for_status().json()
            measure(serving, model, PROMPTS if details["tokenizer"] else ID_PROMPTS, most)
    else:
        with nodes.serving_with("long", args=["--model", "long", *nodes.ROOMY]) as serving:
            measure(serving, "long", PROMPTS, 400)


if __name__ == "__main__":
    main()
