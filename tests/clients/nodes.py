"""Starts real nodes for the tests beside it, each in a data directory of its own, and shows what a node said when a test fails.

usage: nodes.py COMMAND…   runs COMMAND while a node serves the models `tiny` and `long`; CONFRERE_API in its environment is HOST:PORT

CONFRERE names the binary; by default it is target/release/confrere. `tiny` is the checkpoint that ships, with a context of 512 tokens.
`long` is the same with a context of 8,192 and without an end token, so that an answer lasts as long as a test wants.
"""
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
BINARY = os.environ.get("CONFRERE", str(ROOT / "target/release/confrere"))
CHECKPOINT = ROOT / "models/confrere-18m"
OMNI = ROOT / "tests/vectors/checkpoints/tiny-qwen3-omni-full"
MEDIA = ROOT / "tests/vectors/omni/media"
LONG_CONTEXT = 8192
ROOMY = ["--kv-tokens", str(16 * LONG_CONTEXT)]  # for serve, so that 16 long answers fit at a time
NEVER = 8191  # a token that the model does not choose by itself
PROMPT = "Once upon a time"  # goes on for ever where the likeliest token is taken
ENDLESS = [{"role": "system", "content": f"{PROMPT}, the house was to be taken to the house. The house was to be"}]  # does so as a chat
MIB = 2**20

running = []  # every Serving whose process has been started and not yet been looked after


def clean_environment(**more):
    return {**{name: value for name, value in os.environ.items() if not name.startswith("CONFRERE")}, **more}


class Node:
    """A data directory, and what can be done with it."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def command(self, *args, code=0):
        """Runs the binary; its standard output."""
        ended = subprocess.run(
            [BINARY, "--data-dir", self.directory, *args], capture_output=True, text=True, timeout=300, env=clean_environment()
        )
        said = f"confrere {' '.join(map(str, args))}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}"
        assert ended.returncode == code, said
        return ended.stdout

    def add(self, name, precision="q8"):
        """Imports the shipped checkpoint as `tiny`, or as `long` (see above), or a tiny Qwen3-Omni as `omni`."""
        with tempfile.TemporaryDirectory() as scratch:
            path = long_checkpoint(Path(scratch)) if name == "long" else OMNI if name == "omni" else CHECKPOINT
            return self.command("--quiet", "import", path, "--name", name, "--precision", precision).strip()

    def run(self, prompt, *args, model="tiny"):
        """What `confrere run` makes of a prompt by the likeliest tokens, in a copy of the directory: a node that serves holds its own."""
        with tempfile.TemporaryDirectory() as scratch:
            copy = self.copy(Path(scratch) / "copy")
            return json.loads(copy.command("--quiet", "--json", "--offline", "run", model, prompt, "--temperature", "0", *args))

    def copy(self, path):
        """Another node with the same key, models and peers, without what a node that serves writes now and then."""
        Path(path).mkdir()
        for name in ("key", "models.json", "publishers", "peers", "manifests", "store"):
            kept = self.directory / name
            if kept.is_dir():
                shutil.copytree(kept, Path(path) / name)
            elif kept.exists():
                shutil.copy(kept, path)
        return Node(path)

    @contextlib.contextmanager
    def serve(self, *args, listen="/ip4/127.0.0.1/tcp/0", api="127.0.0.1:0", code=0):
        """Serves until the block ends, then wants `code` as the exit code, unless the block has stopped it itself."""
        serving = Serving(self, ["serve", "--listen", listen, "--api", api, "--json", *args])
        running.append(serving)
        try:
            serving.wait_until_ready()
            yield serving
            if not serving.was_stopped:
                ended = serving.stop()
                assert ended == code, f"serve ended with exit code {ended}\n{serving.said()}"
        except BaseException:
            print(f"--- what the node in {self.directory} said\n{serving.said()}", file=sys.stderr)
            raise
        finally:
            serving.kill()
            running.remove(serving)


def long_checkpoint(directory):
    """The shipped checkpoint with a longer context, and an end token that does not come."""
    for file in CHECKPOINT.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            config = {**json.loads(file.read_text()), "eos_token_id": NEVER}
            if file.name == "config.json":
                config["max_position_embeddings"] = LONG_CONTEXT
            (directory / file.name).write_text(json.dumps(config))
        else:
            (directory / file.name).symlink_to(file)
    return directory


@contextlib.contextmanager
def node_with(*models):
    with tempfile.TemporaryDirectory(prefix="confrere-clients-") as scratch:
        node = Node(Path(scratch) / "node")
        for model in models:
            node.add(model)
        yield node


@contextlib.contextmanager
def serving_with(*models, args=()):
    with node_with(*models) as node, node.serve(*args) as serving:
        yield serving


class Serving:
    """A node's process that serves, and its API as seen from outside."""

    def __init__(self, node, args):
        self.node, self.was_stopped = node, False
        self.log = tempfile.TemporaryFile("a+b")  # appended to, wherever it is read
        self.process = subprocess.Popen(
            [BINARY, "--data-dir", node.directory, *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, env=clean_environment(),
        )
        self.pid = self.process.pid

    def wait_until_ready(self):
        said = json.loads(first_line(self.process.stdout, 60))
        self.address, self.ticket = said["address"], said["ticket"]
        self.port = int(said["api"].rsplit(":", 1)[1])
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        wait_for(lambda: self.http.get("/health").status_code == 200, "/health does not become 200", 60)

    def token(self):
        """What whoever owns the data directory can read."""
        return json.loads((self.node.directory / "api.json").read_text())["token"]

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-6000:]

    def generation(self):
        return self.http.get("/api/node").raise_for_status().json()["generation"]

    def is_idle(self):
        now = self.generation()
        return now["active"] == now["waiting"] == 0

    def wait_until_idle(self, seconds=120):
        wait_for(self.is_idle, "requests stay under way though nobody waits for them", seconds)

    def memory(self, what="VmRSS"):
        """Bytes of memory that the process has; with VmHWM, the most that it had since `forget_peak`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(what + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {what} of the node: has it ended?\n{self.said()}")

    def forget_peak(self):
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def connections(self):
        """How many clients' connections the process holds open."""
        held = (line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:])
        return sum(fields[1].endswith(f":{self.port:04X}") and fields[3] == "01" for fields in held)

    def signal(self, number):
        self.was_stopped = True
        self.process.send_signal(number)

    def stop(self, seconds=60):
        """Ends the process as a service manager does; its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self):
        self.was_stopped = True
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_line(stream, seconds):
    """The first line of a stream that may stay silent."""
    lines = queue.Queue()
    threading.Thread(target=lambda: lines.put(stream.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=seconds)
    except queue.Empty:
        raise AssertionError(f"serve prints nothing within {seconds} s") from None
    assert line, "serve ended before it printed anything"
    return line


def wait_for(condition, message, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{message}, for {seconds} s"
        time.sleep(0.02)


def main():
    with serving_with("tiny", "long", args=ROOMY) as serving:
        ended = subprocess.run(sys.argv[1:], env=clean_environment(CONFRERE_API=serving.host), check=False)
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
