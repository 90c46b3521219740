"""Checks what clients see of a node that gets its model over a slow line: it says that it loads, streams stay alive, and the text is the same."""
import threading

import httpx
import openai
import pytest

import nodes
from conftest import check_error, lenient, strict

SHORT = {"model": "tiny", "prompt": " the", "temperature": 0, "max_tokens": 1}  # needs few experts
BODY = {**SHORT, "prompt": nodes.PROMPT, "max_tokens": 8}


@pytest.fixture
def slow_b(request):
    """A node with nothing, or with the trunk, and a peer with all that sends so many bytes a second."""
    upload, trunk = request.param
    with nodes.node_with("tiny") as a, nodes.node_with() as b:
        with a.serve() as fast:
            b.command("join", fast.ticket)
            if trunk:
                b.command("pull", "tiny", "--trunk", "--peer", fast.address)
        with a.serve("--upload", upload) as peer, b.serve("--peer", peer.address) as serving:
            nodes.wait_for(lambda: serving.http.get("/api/peers").json(), "B does not find A", 20)
            yield serving, lambda body: a.run(body["prompt"], "--raw", "--max-tokens", str(body["max_tokens"]))["text"]


@pytest.mark.parametrize("slow_b", [("300KB", False)], indirect=True, ids=["trunk"])
def test_a_model_that_is_being_loaded(slow_b):
    serving, text_of = slow_b
    answers = []
    asked = threading.Thread(target=lambda: answers.append(httpx.post(f"{serving.url}/v1/completions", json=SHORT, timeout=60, trust_env=False)))
    asked.start()
    nodes.wait_for(lambda: serving.http.get("/health").status_code == 503, "/health does not say that a model is loaded", 10)
    health = serving.http.get("/health")
    assert health.json() == {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    assert serving.http.get("/api/node").json()["model"]["state"] == "loading"
    asked.join()
    check_error(answers[0], 503, "service_unavailable_error", {"loading"})
    assert int(answers[0].headers["retry-after"]) > 0
    with strict(serving, max_retries=20) as client:
        assert client.completions.create(**SHORT).choices[0].text == text_of(SHORT), "the SDK tries again until the model is there"
    assert serving.http.get("/health").json() == {"status": "ok"}
    assert serving.http.get("/api/node").json()["model"]["state"] == "ready"


@pytest.mark.parametrize("slow_b", [("500KB", True)], indirect=True, ids=["experts"])
def test_a_stream_that_waits_says_that_it_is_alive(slow_b):
    serving, text_of = slow_b
    with serving.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == ": ping", lines[:3]
    assert lines[-1] == "data: [DONE]"
    with strict(serving) as client:
        again = [chunk.choices[0].text for chunk in lenient(client).completions.create(**BODY, stream=True)]
    assert "".join(again) == text_of(BODY)


def test_nobody_has_the_experts():
    with nodes.node_with("tiny") as a, nodes.node_with() as b:
        with a.serve() as peer:
            b.command("join", peer.ticket)
            b.command("pull", "tiny", "--trunk", "--peer", peer.address)
        with b.serve("--timeout", "0.5") as serving, strict(serving) as client:
            check_error(serving.http.post("/v1/completions", json=BODY), 503, "service_unavailable_error", {"no_peers"})
            with pytest.raises(openai.APIError) as error:
                list(lenient(client).completions.create(**BODY, stream=True))
            assert error.value.code == "no_peers"
