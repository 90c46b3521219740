"""Runs the SDK's example of docs/api.md against nodes that have nothing but a ticket, and fetch experts from another one while they answer."""
import json

from openai import OpenAI

import nodes


def example(url):
    """As a user would write it; the last chunk, which has the usage."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    print('>>> for chunk in client.chat.completions.create(model="tiny", messages=[…"Tell me a story."…], stream=True):')
    text = ""
    for chunk in client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Tell me a story."}], stream=True,
        stream_options={"include_usage": True}, seed=1,
    ):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\nusage.x_experts: {chunk.usage.x_experts}")
    return text, chunk.usage.x_experts


def join_by_the_api(serving, ticket):
    """What `join` and `pull --trunk` do, asked of a node that serves."""
    assert serving.http.post("/api/join", json={"ticket": ticket}).status_code == 401, "what changes the node needs the owner's token"
    serving.http.headers["Authorization"] = f"Bearer {serving.token()}"
    joined = serving.http.post("/api/join", json={"ticket": ticket}).raise_for_status().json()
    assert [model["name"] for model in joined["models"]] == ["tiny"] and joined["silent"] is None, joined
    with serving.http.stream("POST", "/api/pull", json={"model": "tiny", "trunk": True}) as pulled:
        lines = [line for line in pulled.iter_lines() if line.startswith("data: ")]
    came, done = json.loads(lines[-2].removeprefix("data: ")), lines[-1]
    print(f"joined {joined['node']} and pulled: {came}")
    assert done == "data: [DONE]" and came["id"] == joined["models"][0]["id"], lines
    [peer] = serving.http.get("/api/peers").json()
    assert (peer["node"], peer["connected"]) == (joined["node"], True)


def main():
    with nodes.node_with("tiny") as a, nodes.node_with() as b, a.serve() as first:
        with a.copy(b.directory.parent / "alone").serve() as alone:
            print("a node that has the whole model:")
            reference, _ = example(alone.url)
        print("a node that has nothing:")
        b.command("join", first.ticket)
        with b.serve() as second:
            text, experts = example(second.url)
            again, kept = example(second.url)
        print("a node that has nothing, and is told of the ticket while it serves:")
        with nodes.node_with() as c, c.serve() as third:
            join_by_the_api(third, first.ticket)
            told, fetched = example(third.url)
    peer = first.address.rsplit("/p2p/", 1)[1]
    assert text == again == told == reference, f"{text!r}, {again!r}, {told!r} and {reference!r}"
    assert fetched["fetched"] == experts["fetched"], f"{fetched} and {experts}"
    assert experts["fetched"] > 0 and experts["bytes_fetched"] > 0 and experts["peers"] == [peer], experts
    assert experts["needed"] == experts["fetched"] + experts["ram"] + experts["disk"], experts
    assert kept["fetched"] == kept["bytes_fetched"] == 0 and kept["needed"] == experts["needed"] and kept["peers"] == [], kept
    print("quick_start: 2 passed, 0 failed")


if __name__ == "__main__":
    main()
