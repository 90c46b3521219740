"""The dashboard in a browser, against real nodes: one that fetches the shipped model's experts from another, one with 6,144 experts, and one whose
model sees and hears.

usage: dashboard.py DASHBOARD_MJS OUTPUT_DIR   leaves screenshots in OUTPUT_DIR; SYNTHETIC names `synthetic_checkpoint`
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nodes

SYNTHETIC = os.environ.get("SYNTHETIC", str(Path(nodes.BINARY).with_name("synthetic_checkpoint")))


def look(script, url, out):
    """Runs the browser's checks; whether all hold."""
    print(f"-- {out.name}", flush=True)
    return subprocess.run(["node", script, url, out], env=nodes.clean_environment(MEDIA=str(nodes.MEDIA))).returncode == 0


def of_two_nodes(script, out):
    """A node with nothing but the trunk, whose peer has a profile and everything else."""
    with nodes.node_with("tiny") as owner, tempfile.TemporaryDirectory() as scratch:
        owner.command("--quiet", "profile", "build", "tiny", "--budget", "2s")
        with owner.serve() as peer:
            other = nodes.Node(Path(scratch) / "other")
            other.command("join", peer.ticket)
            other.command("pull", "tiny", "--trunk")
            with other.serve("--model", "tiny") as serving:
                return look(script, serving.url, out / "two-nodes")


def of_many_experts(script, out):
    """48 layers of 128 experts, small ones, with the shipped tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        size = ["--layers", "48", "--experts", "128", "--vocab", "8192", "--hidden", "64"]
        subprocess.run([SYNTHETIC, checkpoint, *size], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(nodes.CHECKPOINT / name, checkpoint)
        node = nodes.Node(Path(scratch) / "node")
        node.command("--quiet", "import", checkpoint, "--name", "many")
        with node.serve("--model", "many") as serving:
            return look(script, serving.url, out / "6144-experts")


def of_eyes_and_ears(script, out):
    """A tiny Qwen3-Omni, with a profile of its own."""
    with nodes.node_with("omni") as node, tempfile.TemporaryDirectory() as probes:
        for domain, words in {"numbers": "one two three four five", "colours": "red green blue white black"}.items():
            (Path(probes) / f"{domain}.txt").write_text("%%\n".join(f"{number} {words}\n" for number in range(40)))
        node.command("--quiet", "profile", "build", "omni", "--probes", probes, "--budget", "2s")
        with node.serve("--model", "omni") as serving:
            return look(script, serving.url, out / "omni")


def main():
    script, out = sys.argv[1], Path(sys.argv[2])
    held = [of_two_nodes(script, out), of_many_experts(script, out), of_eyes_and_ears(script, out)]
    print(f"dashboard: {sum(held)} passed, {len(held) - sum(held)} failed")
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
