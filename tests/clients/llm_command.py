"""Checks that the `llm` command works with a node, told of it as its manual says: answers, streams, conversations, and errors by exit code."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nodes import PROMPT

LLM = Path(sys.executable).with_name("llm")
MODELS = """
- {{model_id: chat, model_name: tiny, api_base: {url}/v1}}
- {{model_id: completion, model_name: tiny, api_base: {url}/v1, completion: true}}
- {{model_id: missing, model_name: gpt-9, api_base: {url}/v1}}
- {{model_id: nowhere, model_name: tiny, api_base: "http://127.0.0.1:9/v1"}}
"""
GREEDY = ["-o", "temperature", "0"]


@pytest.fixture
def llm(tiny, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(url=tiny.url))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def run(*args, code=0):
        ended = subprocess.run([LLM, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=environment)
        assert ended.returncode == code, f"exit code {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stderr if code else ended.stdout.removesuffix("\n")
    return run


def logged(llm):
    return json.loads(llm("logs", "list", "-n", "0", "--json"))


def test_an_answer(tiny, llm):
    assert llm("-m", "chat", *GREEDY, "Tell me a story.") == tiny.node.run("Tell me a story.")["text"]


def test_an_answer_without_a_stream(llm):
    assert llm("-m", "chat", *GREEDY, "--no-stream", "Tell me a story.") == llm("-m", "chat", *GREEDY, "Tell me a story.")


def test_a_completion(tiny, llm):
    text = llm("-m", "completion", *GREEDY, "-o", "max_tokens", "20", PROMPT)
    assert text == tiny.node.run(PROMPT, "--raw", "--max-tokens", "20")["text"]


def test_a_seed(llm):
    hot = ["-m", "completion", "-o", "temperature", "1", "-o", "max_tokens", "30", PROMPT]
    assert llm("-o", "seed", "5", *hot) == llm("-o", "seed", "5", *hot)
    assert llm("-o", "seed", "5", *hot) != llm("-o", "seed", "6", *hot)


def test_a_system_prompt(tiny, llm):
    said = llm("-m", "chat", *GREEDY, "-s", "Speak of coffee.", "Hello.")
    assert said == tiny.node.run("Speak of coffee.\nUSER: Hello.\nASSISTANT:", "--raw")["text"]


def test_a_conversation_goes_on(tiny, llm):
    first = llm("-m", "chat", *GREEDY, "Hello.")
    second = llm("-c", *GREEDY, "A coffee, please.")
    history = f"USER: Hello.\nASSISTANT: {first}\nUSER: A coffee, please.\nASSISTANT:"
    assert second == tiny.node.run(history, "--raw")["text"]
    turns = logged(llm)
    assert len({turn["conversation_id"] for turn in turns}) == 1
    assert sorted(turn["response"] for turn in turns) == sorted([first, second])


def test_usage_is_noted(tiny, llm):
    llm("-m", "chat", *GREEDY, "Tell me a story.")
    [turn] = logged(llm)
    assert turn["output_tokens"] >= len(tiny.node.run("Tell me a story.")["tokens"])
    assert turn["input_tokens"] > 0


def test_what_is_refused_ends_with_1_and_says_why(llm):
    for args, why in [
        (["-m", "missing", "Hello."], "gpt-9"),
        (["-m", "chat", "word " * 600], "512"),
        (["-m", "chat", "-o", "presence_penalty", "1", "Hello."], "presence_penalty"),
        (["-m", "chat", "-o", "json_object", "1", "Hello."], "response_format"),
        (["-m", "nowhere", "Hello."], "onnect"),
    ]:
        said = llm(*args, code=1)
        assert why in said, said
