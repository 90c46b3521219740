"""Sends some 2,000 requests that schemathesis makes up from /openapi.json, within its bounds and outside: no 5xx, nothing that contradicts it.

usage: schema.py [CASES_PER_OPERATION]   80 by default
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import nodes

HERE = Path(__file__).resolve().parent
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method",
]
TOKENS_MAX = 2


def main(cases):
    with nodes.serving_with("tiny", args=["--model", "tiny"]) as serving:
        command = [
            Path(sys.executable).with_name("schemathesis"), "run", f"{serving.url}/openapi.json", "--max-examples", str(cases), "--no-color",
            "--exclude-path", "/api/events", "--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--request-timeout", "30",
            "--header", f"Authorization: Bearer {serving.token()}", "--continue-on-failure", "--suppress-health-check", "all", "--generation-database", "none",
        ]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schema", "PYTHONPATH": str(HERE)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=serving.node.directory.parent, check=False)
        look_at_events(serving)
        assert serving.http.get("/health").status_code == 200
    said = ended.stdout
    counted = re.search(r"(\d+) generated", said)
    total = int(counted[1]) if counted else 0
    if ended.returncode or total < 10 * cases:
        print(said[-20_000:], ended.stderr[-5_000:], sep="\n")
        print(f"schema: exit code {ended.returncode} after {total} cases")
        print("schema: 0 passed, 1 failed")
        return 1
    print("\n".join(said.splitlines()[-12:]))
    print(f"schema: {total} passed, 0 failed")
    return 0


def look_at_events(serving):
    """The one answer without an end, which schemathesis would wait for."""
    with serving.http.stream("GET", "/api/events") as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert next(answer.iter_lines()).startswith("event: state")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 125))
else:
    import schemathesis

    KNOWN = {"model": "tiny", "id": "tiny", "layer": 0, "expert": 1, "domain": "code"}

    def named(values):
        """Names something that exists in half of the cases, so that not every answer is a 404; what is of another type stays."""
        if not isinstance(values, dict) or not sum(map(ord, str(values))) % 2:
            return values
        return {name: KNOWN[name] if name in KNOWN and type(value) is type(KNOWN[name]) else value for name, value in values.items()}

    @schemathesis.hook
    def map_path_parameters(context, parameters):
        return named(parameters)

    @schemathesis.hook
    def map_query(context, query):
        return named(query)

    @schemathesis.hook
    def map_body(context, body):
        """Keeps answers short, too; what is no such number stays."""
        if not isinstance(body, dict):
            return body
        body = named(body)
        limits = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
        for name in limits:
            if type(body[name]) is int and TOKENS_MAX < body[name] < 2**20:
                body[name] = TOKENS_MAX
        return body if limits else {**body, "max_tokens": TOKENS_MAX}
