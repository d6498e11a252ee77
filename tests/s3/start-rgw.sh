#!/usr/bin/env bash
# A real S3 server for tests: one Ceph monitor, one in-memory OSD and one RADOS gateway on loopback,
# all state under DIR. Prints "ready http://127.0.0.1:PORT" and runs until standard input closes.
#
#   apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
#   start-rgw.sh DIR ACCESS_KEY SECRET_KEY
#
# DIR must not exist or be empty; the caller removes it.
set -euo pipefail

[ $# -eq 3 ] || { echo "usage: start-rgw.sh DIR ACCESS_KEY SECRET_KEY" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
access_key=$2
secret_key=$3
mkdir "$dir"/{mon,osd,log,run}
# AWS settings of the caller are not for these daemons, and a slow locale costs the command line time.
export LC_ALL=C.UTF-8
# Debian's `ceph` command needs Debian's own Python, whichever python3 comes first on the PATH.
debian_python=/usr/bin/python3

pids=()
stop() {
    if [ ${#pids[@]} -gt 0 ]; then
        # Everything is in memory, so there is nothing to flush.
        kill -KILL "${pids[@]}" 2>/dev/null || true
        wait "${pids[@]}" 2>/dev/null || true
    fi
}
trap stop EXIT
trap 'exit 143' TERM INT HUP

fail() {
    echo "start-rgw.sh: $1" >&2
    tail -n 20 "$dir"/log/*.out >&2 || true
    exit 1
}

# Below Linux's range for outgoing connections (32768 and up), so that no client takes a port
# between this look and the daemon's bind.
free_port() {
    "$debian_python" - <<'PYTHON'
import random, socket
while True:
    port = random.randrange(20000, 30000)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break
PYTHON
}

daemon() {  # NAME COMMAND...: start in the background, output to log/NAME.out
    local name=$1
    shift
    "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
    pids+=($!)
}

wait_until() {  # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2 pid
    shift 2
    until "$@" >/dev/null 2>&1; do
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2>/dev/null || fail "a daemon died while waiting until $what"
        done
        [ "$SECONDS" -lt "$end" ] || fail "waited too long until $what"
        sleep 0.2
    done
}

fsid=$(cat /proc/sys/kernel/random/uuid)
monitor="v2:127.0.0.1:$(free_port)"
conf=$dir/ceph.conf
cat >"$conf" <<CONF
[global]
fsid = $fsid
mon host = [$monitor]
ms bind msgr1 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
# radosgw can not run without cephx: it hangs for 300 s.
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $dir/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail crit = 1
mon data avail warn = 1
mon data = $dir/mon
mon cluster log file = $dir/log/cluster.log
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 8589934592
osd class load list = *
osd class default list = *
osd data = $dir/osd
run dir = $dir/run
admin socket = $dir/run/\$name.asok
log file = $dir/log/\$name.log
rgw data = $dir/run
rgw dynamic resharding = false
CONF
export CEPH_CONF=$conf

ceph_command() { "$debian_python" /usr/bin/ceph -c "$conf" --connect-timeout 20 "$@"; }
osd_is_up() { ceph_command osd stat | grep -q "1 up"; }
gateway_listens() { (exec 3<>"/dev/tcp/127.0.0.1/$port"); }

ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' \
    >/dev/null
monmaptool --create --fsid "$fsid" --addv a "[$monitor]" "$dir/monmap" >/dev/null
ceph-mon --mkfs -i a -c "$conf" --monmap "$dir/monmap" --keyring "$dir/keyring"
daemon mon ceph-mon -f -i a -c "$conf"

osd_uuid=$(cat /proc/sys/kernel/random/uuid)
wait_until 60 "the monitor answers" ceph_command osd new "$osd_uuid"
ceph_command auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' -o "$dir/osd.key"
ceph-osd -i 0 -c "$conf" --keyring "$dir/osd.key" --mkfs --osd-uuid "$osd_uuid" \
    >"$dir/log/mkfs.out" 2>&1 || fail "the OSD could not be made"
daemon osd ceph-osd -f -i 0 -c "$conf" --keyring "$dir/osd.key"
wait_until 60 "the OSD is up" osd_is_up

port=$(free_port)
daemon rgw radosgw -f -n client.admin -c "$conf" --rgw_frontends="beast endpoint=127.0.0.1:$port"
wait_until 120 "the gateway listens" gateway_listens
radosgw-admin -n client.admin -c "$conf" user create --uid=tests --display-name=tests \
    --access-key="$access_key" --secret-key="$secret_key" --max-buckets=0 \
    >"$dir/log/user.out" 2>&1 || fail "the user could not be made"

echo "ready http://127.0.0.1:$port"
cat >/dev/null
