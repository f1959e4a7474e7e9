#!/usr/bin/env bash
# systemd 252 (Debian 12): "systemctl stop a b" stops a first or both at once, although b says After=a, by which b has
# to stop first. systemctl asks for one job after the other, and a has stopped, or has begun to, before there is a job
# of b that it would have to wait for. "systemctl stop b a", and the end of the whole manager, keep the order.
#
# Seen: of 10 times "stop a b" 9 were in the wrong order, of 10 times "stop b a" none; at another time 10 and none.
# Fails if that changes. Needs root, bash, unshare, cgroup2, apt-get, dpkg.
set -euo pipefail
version="252.*"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "systemd=$version" "libsystemd-shared=$version" 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export dir LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu/systemd" PATH="$dir/bin:$PATH"
systemctl --version | head -1

cat >inside.sh <<'I' # a user's systemd in namespaces of its own, so that it is in nobody's way
set -euo pipefail
mount -t tmpfs none /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mkdir -p /run/systemd/system run units
export XDG_RUNTIME_DIR=$dir/run SYSTEMD_UNIT_PATH=$dir/units
unset DBUS_SESSION_BUS_ADDRESS
printf '[Unit]\nDefaultDependencies=no\n' | tee units/basic.target units/exit.target units/shutdown.target >units/default.target
printf '[Unit]\n[Service]\nExecStart=sleep 1000\nExecStop=sh -c "echo a stops >>log"\n' >units/a.service
printf '[Unit]\nAfter=a.service\n[Service]\nExecStart=sleep 1000\nExecStop=sh -c "sleep .1; echo b stops >>log"\n' >units/b.service
sed -i "s|>>log|>>$dir/log|" units/*.service
"$dir/lib/systemd/systemd" --user >out 2>&1 &
for _ in {1..50}; do [ -e run/systemd/private ] && break; sleep .1; done
wrong() { # times that a stopped before b
  rm -f log
  for _ in {1..10}; do
    systemctl --user start a b
    systemctl --user stop "$@"
  done
  paste - - <log | grep -c '^a' || true
}
echo "$(wrong a b) $(wrong b a)" >result
I
unshare --pid --fork --mount --cgroup --mount-proc --kill-child bash inside.sh
read -r ab ba <result
echo "stop a b: $ab of 10 in the wrong order; stop b a: $ba"
[ "$ab" -gt 0 ] && [ "$ba" = 0 ]
