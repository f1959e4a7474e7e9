#!/usr/bin/env bash
# HAProxy 2.6.12 (Debian 12) knows the request in some of its own error answers and not in others, and says nothing of
# it. With "http-error status N ... hdr X-From %[req.hdr(Origin)]" a 503 for a server that cannot be reached has the
# header, a 502 for one that closed the connection and a 504 for one that was slow have none: by then the request is
# gone, and an empty value means no header. The configuration is valid and checked without a warning, and who tries it
# by stopping the server sees it work. With "http-request set-var(txn.origin) req.hdr(Origin)" and %[var(txn.origin)]
# all three have it.
#
# Seen: 503 has both headers, 502 and 504 the one from the variable alone.
# Fails if that changes. Needs bash, curl, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "haproxy=2.6.12-1*" liblua5.3-0 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu"

cat >server.py <<'P'
import socket, threading, time
l = socket.create_server(("127.0.0.1", 18721))
def serve(c):
    if c.recv(65536).startswith(b"GET /slow"):
        time.sleep(3)
    c.close()
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >site.cfg <<'C'
defaults
    mode http
    timeout connect 1s
    timeout client 9s
    timeout server 1s
    http-error status 502 content-type text/plain lf-string "e" hdr X-From %[req.hdr(Origin)] hdr X-Var %[var(txn.origin)]
    http-error status 503 content-type text/plain lf-string "e" hdr X-From %[req.hdr(Origin)] hdr X-Var %[var(txn.origin)]
    http-error status 504 content-type text/plain lf-string "e" hdr X-From %[req.hdr(Origin)] hdr X-Var %[var(txn.origin)]
frontend f
    bind 127.0.0.1:18722
    http-request set-var(txn.origin) req.hdr(Origin)
    use_backend away if { path /away }
    default_backend there
backend there
    server s 127.0.0.1:18721
backend away
    server s 127.0.0.1:18723
C
check=$(usr/sbin/haproxy -c -f site.cfg 2>&1)
python3 server.py &
usr/sbin/haproxy -db -f site.cfg 2>/dev/null &
sleep 2
seen() {
  curl -si -m 8 -H "Origin: https://site.example" "http://127.0.0.1:18722/$1" | tr -d '\r' |
    awk '/^HTTP/ { status = $2 } /^x-/ { headers = headers " " $1 } END { print status headers }'
}
away=$(seen away) closes=$(seen closes) slow=$(seen slow)
usr/sbin/haproxy -v | sed -n 1p
echo "check: $check"
echo "seen: $away; $closes; $slow"
[ "$check" = "Configuration file is valid" ]
[ "$away" = "503 x-from: x-var:" ] && [ "$closes" = "502 x-var:" ] && [ "$slow" = "504 x-var:" ]
