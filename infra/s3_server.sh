#!/usr/bin/env bash
# A real S3 server for tests: Ceph's object gateway, one node, in memory, on 127.0.0.1. Ctrl-C or SIGTERM stops it and forgets everything.
#   s3_server.sh [PORT]        the monitor listens on PORT + 1, the store where Ceph likes
# It needs radosgw, ceph-mon and ceph-osd. There is no check of who talks to the store itself: loopback, tests, nothing else.
set -euo pipefail
port=${1:-9470}
monitor=$((port + 1))
memory_gib=4

missing=()
for program in radosgw radosgw-admin ceph ceph-mon ceph-osd monmaptool; do command -v "$program" >/dev/null || missing+=("$program"); done
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: no ${missing[*]} on this machine. On Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common" >&2
    exit 1
fi
for used in "$port" "$monitor"; do
    if (: <"/dev/tcp/127.0.0.1/$used") 2>/dev/null; then echo "error: port $used is in use. Name another: make s3 PORT=9570" >&2; exit 1; fi
done

place=$(mktemp -d "${TMPDIR:-/tmp}/wtflow-s3-XXXXXX")
started=()
stop() {
    trap - EXIT INT TERM
    for ((at = ${#started[@]} - 1; at >= 0; at--)); do kill -TERM "${started[at]}" 2>/dev/null || true; done
    for _ in $(seq 30); do kill -0 "${started[@]}" 2>/dev/null || break; sleep 0.1; done
    for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$place"
}
fail() { echo "error: $1. The logs:" >&2; tail -n 5 "$place"/*.out >&2 || true; exit 1; }
trap stop EXIT
trap 'exit 0' INT TERM

cat >"$place/ceph.conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon_initial_members = a
mon_host = v2:127.0.0.1:$monitor
public_network = 127.0.0.0/8
# nobody proves who they are: without keys, the default "secure" messages would never be answered
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
ms_bind_msgr1 = false
ms_bind_ipv6 = false
# one copy, on one disk that is memory
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
osd_objectstore = memstore
memstore_device_bytes = $((memory_gib << 30))
mon_data = $place/mon
osd_data = $place/osd
rgw_data = $place/rgw
keyring = $place/keyring
run_dir = $place
admin_socket = $place/\$name.asok
log_file = $place/\$name.log
crash_dir = $place
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw_thread_pool_size = 32
CONF
mkdir "$place"/{mon,osd,rgw}
touch "$place/keyring"
export CEPH_CONF=$place/ceph.conf

start() { # NAME PROGRAM ARGUMENTS...
    "${@:2}" -f >"$place/$1.out" 2>&1 &
    started+=($!)
}
monmaptool --create --fsid "$(sed -n 's/^fsid = //p' "$CEPH_CONF")" --addv a "[v2:127.0.0.1:$monitor]" "$place/monmap" >"$place/setup.out" 2>&1 || fail "no map of monitors"
ceph-mon --mkfs -i a --monmap "$place/monmap" >>"$place/setup.out" 2>&1 || fail "no monitor"
start mon ceph-mon -i a
disk=$(cat /proc/sys/kernel/random/uuid)
timeout 60 ceph osd new "$disk" 0 >>"$place/setup.out" 2>&1 || fail "the monitor does not answer"
ceph-osd -i 0 --mkfs --osd-uuid "$disk" >>"$place/setup.out" 2>&1 || fail "no store"
start osd ceph-osd -i 0
start rgw radosgw -n client.rgw
for _ in $(seq 600); do
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
    kill -0 "${started[@]}" 2>/dev/null || fail "a part of the server ended"
    sleep 0.1
done
timeout 60 radosgw-admin user create --uid=test --display-name=test --access-key=test --secret-key=test >>"$place/setup.out" 2>&1 || fail "the gateway does not answer"

cat <<TEXT
An S3 server in memory listens on http://127.0.0.1:$port (Ctrl-C stops it). In another shell:
export WTFLOW_TEST_S3=http://127.0.0.1:$port
TEXT
wait -n "${started[@]}" || true
fail "a part of the server ended"
