"""The page of an atlas in a browser: of a model of text, and of one that sees and hears.

usage: atlas.py ATLAS_MJS OUTPUT_DIR   leaves screenshots in OUTPUT_DIR
"""
import subprocess
import sys
from pathlib import Path

import nodes


def main():
    script, out = sys.argv[1], Path(sys.argv[2])
    held = []
    for model in ("tiny", "omni"):
        with nodes.node_with(model) as node:
            written = Path(node.directory) / "atlas"
            node.command("--quiet", "atlas", model, "--out", written, "--items", "4", "--tried", "1", "--untrained", model)
            print(f"-- {model}", flush=True)
            ended = subprocess.run(["node", script, written / "atlas.html", out / f"atlas-{model}"], env=nodes.clean_environment())
            held.append(ended.returncode == 0)
    print(f"atlas: {sum(held)} passed, {len(held) - sum(held)} failed")
    sys.exit(0 if all(held) else 1)


main()
