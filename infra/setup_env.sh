#!/usr/bin/env bash
# Installs a lock into the environment $1 unless it is already there. Safe to call twice or from two clones at once.
#   setup_env.sh VENV LOCK          a new environment
#   setup_env.sh VENV LOCK BASE     one that also sees the packages of the environment BASE, so that they are not installed twice
# VENV/.ready, written last, holds the SHA-256 of the lock (with BASE: of both) that was installed. An empty one counts where the
# folder bears the digest of its lock in its name, as the default does.
set -euo pipefail
venv=$1
lock=$2
base=${3:-}
python=${PYTHON:-python3.11}

locks=("$lock")
[ -n "$base" ] && locks=("$(dirname "$0")/../requirements.lock" "$lock")
digest=$(cat "${locks[@]}" | sha256sum | cut -d' ' -f1)

named_after_lock() { [[ $(basename "$venv") = *-"${digest:0:12}" ]]; }
ready() {
    [ -e "$venv/.ready" ] || return 1
    if [ -s "$venv/.ready" ]; then [ "$(cat "$venv/.ready")" = "$digest" ]; else named_after_lock; fi
}
made_here() { [ -e "$venv/.wtflow" ] || [ -e "$venv/.ready" ]; }
replaceable() { [ ! -e "$venv" ] || made_here || { [ -d "$venv" ] && [ -z "$(ls -A "$venv")" ]; } || named_after_lock; }

ready && exit 0
[ -n "$base" ] && python=$base/bin/python
command -v "$python" >/dev/null || { echo "error: $python not found. Install Python 3.11, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
ready && exit 0
if ! replaceable; then
    echo "error: $venv is not empty and no Python environment that this command made: it would be replaced. Set WTFLOW_VENV (WTFLOW_PEERS_VENV for make peers) to a new folder, or remove this one." >&2
    exit 1
fi
if [ -n "$base" ]; then note="about 0.4 GB"; else note="about 7 GB, 4 to 8 minutes"; fi
echo "Installing $(basename "$lock") into $venv ($note; once for all clones) ..."
rm -rf "$venv"
mkdir "$venv" && touch "$venv/.wtflow"  # what may be replaced, from its first moment
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$lock"
if [ -n "$base" ]; then
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$base/bin/python" -c "$packages" > "$("$venv/bin/python" -c "$packages")/base.pth"
fi
if [ -z "$base" ]; then  # the command of an installed package, for the clone that one stands in
    printf '#!/bin/sh\nexec "%s" -m wtflow.cli "$@"\n' "$venv/bin/python" > "$venv/bin/wtflow"
    chmod +x "$venv/bin/wtflow"
fi
echo "$digest" > "$venv/.ready"
