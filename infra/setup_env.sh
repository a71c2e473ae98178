#!/usr/bin/env bash
# Installs the locked environment into $1 unless it is already there. Safe to call twice or from two clones at once.
set -euo pipefail
venv=$1
lock=$(cd "$(dirname "$0")/.." && pwd)/requirements.lock
python=${PYTHON:-python3.11}

[ -e "$venv/.ready" ] && exit 0
command -v "$python" >/dev/null || { echo "error: $python not found. Install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
[ -e "$venv/.ready" ] && exit 0
echo "Installing the environment into $venv (about 7 GB, 4 to 8 minutes; once for all clones) ..."
rm -rf "$venv"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$lock"
touch "$venv/.ready"
