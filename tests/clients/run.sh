#!/usr/bin/env bash
# The HTTP API with the programs that people use: every file beside this one, against real nodes on loopback. Prints what each counts.
# Needs python3 and node; installs them with apt-get where they are missing and this is root. Packages come from PyPI and npm. The dashboard
# is looked at where there is a Chromium; PICTURES is where its pictures go.
# usage: run.sh [BINARY] [NAME…]   target/release/confrere and all of them by default; NAMEs are those of the files, without their ends
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
binary=${1:-$here/../../target/release/confrere}
CONFRERE=$(cd "$(dirname "$binary")" && pwd)/$(basename "$binary")
export CONFRERE PYTHONDONTWRITEBYTECODE=1 NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost
shift || true
[ -x "$CONFRERE" ] || { echo "there is no $CONFRERE" >&2; exit 2; }

packages=
python3 -c 'import ensurepip, venv' 2>/dev/null || packages="python3 python3-venv"
command -v npm >/dev/null || packages="$packages nodejs npm"
[ -n "${CHROMIUM:-}" ] || command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || packages="$packages chromium"
if [ -n "$packages" ]; then
    [ "$(id -u)" = 0 ] || { echo "please install: $packages" >&2; exit 2; }
    apt-get update -q && apt-get install -y -q --no-install-recommends $packages
fi
work=${TMPDIR:-/tmp}/confrere-clients
pictures=${PICTURES:-$work/pictures}
mkdir -p "$work/npm"
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install -q --disable-pip-version-check -r "$here/requirements.txt"
cp "$here"/package.json "$here"/*.mjs "$work/npm/"
(cd "$work/npm" && npm install --silent --no-audit --no-fund --no-package-lock)

chromium=${CHROMIUM:-$(command -v chromium || true)}
export CHROMIUM=$chromium
names=${*:-openai_sdk omni_sdk video llm_command npm_clients refusals hostile terminate slow_peer quick_start schema killed_peer throughput${chromium:+ dashboard atlas}}
lines=() failed=0
for name in $names; do
    case $name in
        openai_sdk|omni_sdk|video|llm_command|refusals|hostile|terminate|slow_peer) run=("$python" -m pytest -q -p no:cacheprovider "$here/$name.py") ;;
        npm_clients) run=("$python" "$here/nodes.py" node --test "$work/npm/$name.mjs") ;;
        dashboard|atlas) run=("$python" "$here/$name.py" "$work/npm/$name.mjs" "$pictures") ;;
        *) run=("$python" "$here/$name.py") ;;
    esac
    echo "== $name ($(date -u +%H:%M:%S))"
    began=$SECONDS status=0
    "${run[@]}" 2>&1 </dev/null | tee "$work/$name.log" || status=$?
    [ "$status" = 0 ] || failed=1
    counts=$(grep -aE '^([a-z_]+: )?[0-9]+ (passed|failed|error)|^(# |ℹ )(pass|fail) [0-9]+' "$work/$name.log" | tail -2 | tr '\n' ' ' || true)
    lines+=("$name: exit code $status, $((SECONDS - began)) s: ${counts:-it ended before it could count}")
done
echo
printf '%s\n' "${lines[@]}"
exit "$failed"
