"""Checks that a node whose only peer is killed while it answers ends each answer whole, or with an error: never with a text cut in silence.

usage: killed_peer.py [ROUNDS]   100 by default

In each round node B, which has a model's trunk and no expert, or many of them, answers while it fetches what it lacks from node A; A gets
SIGKILL after a random number of events, after which B may need more experts, or none.
"""
import collections
import random
import sys
import tempfile
import time
from pathlib import Path

import openai

import nodes
from conftest import lenient, strict

PATIENCE = "0.5"  # seconds that B waits for a peer
TOKENS = 24
PROMPTS = [nodes.PROMPT, "def main():", "The king said", "fn fmt(", "Sec. 12. (a)", "春"]
# These need most of the same experts.
OTHER_PROMPTS = ["Once there was a", "import os", "The queen said", "impl fmt", "Sec. 9.", "USER: Hello.\nASSISTANT:"]
UPLOAD = "8MB"  # a second: experts come slowly enough that A is often killed while it sends some


def options_of_b(node):
    """Whatever option makes the node give up soon on peers that are gone."""
    return ["--timeout", PATIENCE] if "--timeout" in node.command("serve", "--help") else []


def ask(client, prompt, after_event):
    """What comes of a request: its end, and the text until there."""
    text, reason = "", None
    try:
        stream = lenient(client).completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=TOKENS, stream=True)
        for chunk in stream:
            after_event()
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
    except openai.APIError as error:
        return f"{type(error).__name__}: {error.code}", text
    return reason or "silence", text


def nodes_b(a, scratch):
    """Two nodes that know A: one has the trunk, the other many experts, too."""
    cold = nodes.Node(scratch / "cold")
    with a.serve(listen=a.listen) as peer:
        cold.command("join", peer.ticket)
        cold.command("pull", "tiny", "--trunk", "--peer", peer.address)
        warm = cold.copy(scratch / "warm")
        for prompt in OTHER_PROMPTS:
            warm.command("run", "tiny", prompt, "--raw", "--temperature", "0", "--max-tokens", str(TOKENS), "--peer", peer.address)
    return [cold, warm]


def one_round(a, template, reference, options, kill_after):
    """The outcome of a round, and the seconds that the answer took."""
    prompt, whole = reference
    with tempfile.TemporaryDirectory(prefix="confrere-clients-") as scratch, a.serve("--upload", UPLOAD, listen=a.listen) as peer:
        b = template.copy(Path(scratch) / "b")
        with b.serve("--peer", peer.address, *options) as serving, strict(serving) as client:
            nodes.wait_for(lambda: serving.http.get("/api/peers").json(), "B does not find A", 20)
            left = iter(range(kill_after, -1, -1))

            def count():
                if next(left, None) == 0:
                    peer.kill()
            if kill_after < 0:
                peer.kill()
            began = time.monotonic()
            end, text = ask(client, prompt, count)
            took = time.monotonic() - began
            if end in ("stop", "length"):
                assert text == whole, f"a whole answer with another text: {text!r}, not {whole!r}"
                outcome = "whole"
            else:
                assert end != "silence", f"cut in silence after {text!r}"
                assert whole.startswith(text), f"an answer that ended with an error had another text: {text!r}, not {whole!r}"
                outcome = end
            serving.wait_until_idle(10)
            if peer.process.poll() is None:
                peer.kill()
            return outcome, took


def main(rounds):
    seed = random.randrange(2**32)
    choose = random.Random(seed)
    outcomes, failures, longest = collections.Counter(), [], 0
    with nodes.node_with("tiny") as a, tempfile.TemporaryDirectory(prefix="confrere-clients-") as scratch:
        a.listen = f"/ip4/127.0.0.1/tcp/{nodes.free_port()}"
        references = [(prompt, a.run(prompt, "--raw", "--max-tokens", str(TOKENS))["text"]) for prompt in PROMPTS]
        templates = nodes_b(a, Path(scratch))
        options = options_of_b(a)
        for at in range(rounds):
            kill_after = choose.randrange(-1, TOKENS)
            try:
                outcome, took = one_round(a, choose.choice(templates), choose.choice(references), options, kill_after)
                outcomes[outcome] += 1
                longest = max(longest, took)
            except AssertionError as error:
                failures.append(f"round {at}, killed after {kill_after} events: {error}")
                print(failures[-1], flush=True)
    print(f"seed {seed}; the longest answer took {longest:.1f} s; " + ", ".join(f"{count} × {name}" for name, count in outcomes.most_common()))
    if rounds >= 20 and (not outcomes["whole"] or len(outcomes) < 2):
        failures.append("rounds all ended alike: A was never killed in the midst")
        print(failures[-1])
    print(f"killed_peer: {rounds - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
