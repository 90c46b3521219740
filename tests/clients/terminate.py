"""Checks that a node that is told to stop under load ends every stream with its finished text or an error event, within 10 s and with exit code 0."""
import threading
import time

import httpx
import openai
import pytest

import nodes
from conftest import lenient, strict

STREAMS = 8
WITHIN = 10  # seconds


def follow(client, max_tokens, began, ends):
    """Reads a stream; notes how it ended."""
    try:
        with lenient(client).completions.create(model="long", prompt=nodes.PROMPT, temperature=0, max_tokens=max_tokens, stream=True) as stream:
            reason = None
            for chunk in stream:
                reason = chunk.choices[0].finish_reason if chunk.choices else reason
                began.set()
        ends.append(reason or "silence")
    except openai.APIError as error:
        ends.append(f"error {error.code}")
    except Exception as error:
        ends.append(repr(error))
    finally:
        began.set()


def stop_amid(serving, follow_one):
    """Stops a node once all streams are under way; how each ended, the exit code, and the seconds that it took."""
    begun, ends = [threading.Event() for _ in range(STREAMS)], []
    threads = [threading.Thread(target=follow_one, args=(began, ends)) for began in begun]
    for thread in threads:
        thread.start()
    assert all(began.wait(60) for began in begun), "not all streams begin"
    assert not ends, f"ended before the node was stopped: {ends}"
    at = time.monotonic()
    code = serving.stop(60)
    for thread in threads:
        thread.join(60)
    return ends, code, time.monotonic() - at


@pytest.fixture
def node():
    with nodes.node_with("long") as node:
        yield node


@pytest.mark.parametrize("max_tokens", [1_500, 8_000], ids=["short", "long"])
def test_streams_of_the_sdk(node, figure, max_tokens):
    with node.serve("--model", "long", *nodes.ROOMY) as serving, strict(serving) as client:
        ends, code, seconds = stop_amid(serving, lambda began, ends: follow(client, max_tokens, began, ends))
    figure(f"stopped amid {STREAMS} streams of {max_tokens} tokens after {seconds:.2f} s: {', '.join(sorted(ends))}")
    assert len(ends) == STREAMS
    assert all(end in ("length", "error stopping") for end in ends), ends
    assert code == 0 and seconds <= WITHIN


def test_streams_on_the_wire(node):
    body = {"model": "long", "prompt": nodes.PROMPT, "temperature": 0, "max_tokens": 8_000, "stream": True}

    def read(serving, began, ends):
        try:
            with httpx.stream("POST", f"{serving.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
                text = ""
                for piece in answer.iter_text():
                    text += piece
                    began.set()
        except httpx.HTTPError as error:
            text = repr(error)
        ends.append(text[-400:])
        began.set()
    with node.serve(*nodes.ROOMY) as serving:
        ends, code, seconds = stop_amid(serving, lambda began, ends: read(serving, began, ends))
    for end in ends:
        last = end.rstrip("\n").split("\n\n")[-1]
        assert last == "data: [DONE]" or (last.startswith("event: error\ndata: {") and '"stopping"' in last), end
    assert code == 0 and seconds <= WITHIN


def test_answers_that_are_not_streamed(node):
    body = {"model": "long", "prompt": nodes.PROMPT, "temperature": 0, "max_tokens": 8_000}
    answers = []

    def ask(serving):
        try:
            answers.append(serving.http.post("/v1/completions", json=body))
        except httpx.HTTPError as error:
            answers.append(error)
    with node.serve(*nodes.ROOMY) as serving:
        threads = [threading.Thread(target=ask, args=(serving,)) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        nodes.wait_for(lambda: serving.generation()["active"] == STREAMS, "not all requests begin", 60)
        began = time.monotonic()
        code = serving.stop(60)
        for thread in threads:
            thread.join(60)
        seconds = time.monotonic() - began
    for answer in answers:
        assert isinstance(answer, httpx.Response), f"no answer: {answer!r}"
        if answer.status_code != 200:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "stopping" and "retry-after" in answer.headers, answer.text
    assert code == 0 and seconds <= WITHIN


def test_an_idle_node_stops_at_once(node):
    with node.serve("--model", "long", *nodes.ROOMY) as serving:
        with httpx.stream("GET", f"{serving.url}/api/events", timeout=60, trust_env=False) as events:
            next(events.iter_raw())
            began = time.monotonic()
            assert serving.stop(60) == 0
        assert time.monotonic() - began <= WITHIN
