#!/usr/bin/env bash
# Boots Debian 12 with its systemd in a container of systemd-nspawn(1), and runs both units there as their file says.
# The backend is started until it has its secrets. A task outlives its death by SIGKILL and a reboot.
#
# Needs root, apt-get, curl, Go, and for a few minutes the package archive. Not part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
root=$dir/root

CGO_ENABLED=0 go build -o "$dir/sidecast" .
(cd "$dir" && apt-get download -qq debootstrap systemd-container 2>/dev/null && for deb in *.deb; do dpkg -x "$deb" .; done)
DEBOOTSTRAP_DIR=$dir/usr/share/debootstrap "$dir/usr/sbin/debootstrap" --variant=minbase \
  --include=systemd-sysv,dbus,curl bookworm "$root" >"$dir/log" || { tail "$dir/log"; exit 1; }
install "$dir/sidecast" "$root/usr/local/bin/"
cp -r deploy/sidecast@* "$root/etc/systemd/system/"
for role in gateway backend; do # as the unit's header has it, with secrets
  mkdir -p "$root/etc/sidecast"
  sed -n "/^#   .*$role.env/,/^#   \/\|^$/s/^#     //p" 'deploy/sidecast@.service' |
    sed 's/…/0123456789abcdef0123456789abcdef/' >"$root/etc/sidecast/$role.env"
  chmod 600 "$root/etc/sidecast/$role.env"
done

cat >"$root/usr/local/bin/check" <<'C'
#!/bin/bash
# The first boot and the second one.
exec >>/result 2>&1
set -eu
units='sidecast@gateway sidecast@backend'
api() { curl -s --fail-with-body --retry 20 --retry-connrefused --retry-delay 1 -m 5 -H 'Content-Type: application/json' \
  -H 'Authorization: Bearer 0123456789abcdef0123456789abcdef' "http://127.0.0.1:8080/api/tasks$1" "${@:2}"; }
running() { api /t/status | grep '"status":"running"'; }
if [ ! -e /rebooted ]; then
  mv /etc/sidecast/backend.env /
  echo APP_ENV=production >/etc/sidecast/backend.env # it ends at once: there are no secrets yet
  systemctl enable --now $units
  sleep 12
  mv /backend.env /etc/sidecast/
  api '' -d '{"type":"external","params":{"task_id":"t"}}'
  systemctl kill -s KILL sidecast@backend
  running
  stat -c '%a %n' /var/lib/private/sidecast | grep '^700'
  touch /rebooted
  systemctl reboot
  exit
fi
journalctl --no-pager -b -1 -o cat -u 'sidecast@*' | grep -A 9 '^Stopping' | tee /stops
[ "$(grep -n 'Stopped.*backend' /stops | cut -d: -f1)" -lt "$(grep -n 'Stopping.*gateway' /stops | cut -d: -f1)" ]
grep -c 'Deactivated successfully' /stops | grep 2
running
api /t/complete -d '{"result":null}'
api /t/status | grep '"status":"completed"'
for role in gateway:3001 backend:8080; do # what /proc is needed for
  curl -sS "http://127.0.0.1:${role#*:}/metrics" | grep -c -E '^process_(open_fds|max_fds|resident_memory_bytes) ' | grep 3
  grep -E '^(NoNewPrivs:.1|Seccomp:.2|CapBnd:.0000000000000000)$' "/proc/$(systemctl show -P MainPID "sidecast@${role%:*}")/status" |
    grep -c . | grep 3
done
systemd-analyze security --no-pager sidecast@backend | tail -1
echo all is well
systemctl poweroff
C
chmod +x "$root/usr/local/bin/check"
cat >"$root/etc/systemd/system/check.service" <<'U'
[Unit]
OnFailure=poweroff.target
[Service]
ExecStart=/usr/local/bin/check
[Install]
WantedBy=multi-user.target
U
systemctl --root="$root" enable -q check.service
for _ in 1 2; do
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout 120 "$dir/usr/bin/systemd-nspawn" -q -D "$root" --register=no --keep-unit \
    --private-network --console=pipe -b </dev/null >"$dir/console" 2>&1 || true # it says 133 of a reboot
done
cat "$root/result"
grep -q '^all is well$' "$root/result"
