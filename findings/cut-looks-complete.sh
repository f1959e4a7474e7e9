#!/usr/bin/env bash
# Caddy 2.6.2, h2o 2.2.5 and, over HTTP/2 alone, HAProxy 2.6.12 (Debian 12) hide that a server broke off in the middle
# of an answer. Its end is missing and its connection is closed, so that HTTP says it is incomplete; but the proxies
# then write the last chunk themselves, over HTTP/2 the end of the stream, and the client takes the piece for the
# whole. Caddy does it although it logs "aborting with incomplete response". A script that follows events or loads a
# file through fetch() cannot tell a killed server from one that was done.
#
# Seen: curl straight from the server, and through HAProxy over HTTP/1.1, fails with 18, partial file; through Caddy
# and h2o, and HAProxy over HTTP/2, it succeeds.
# Fails if that changes. Needs bash, curl with HTTP/2, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "caddy=2.6.2*" "h2o=2.2.5*" "haproxy=2.6.12-1*" liblua5.3-0 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu"

cat >server.py <<'P'
import socket, threading, time
l = socket.create_server(("127.0.0.1", 18671))
def serve(c):
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")
    time.sleep(.3)
    c.close()
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >Caddyfile <<'C'
{
	admin off
	servers {
		protocols h1 h2c
	}
}
http://127.0.0.1:18672 {
	reverse_proxy 127.0.0.1:18671
}
C
cat >h2o.conf <<'C'
listen: {host: 127.0.0.1, port: 18673}
hosts:
  default:
    paths:
      /: {proxy.reverse.url: "http://127.0.0.1:18671/"}
C
cat >haproxy.cfg <<'C'
defaults
    mode http
    timeout connect 5s
    timeout client 9s
    timeout server 9s
frontend f
    bind 127.0.0.1:18674
    default_backend b
backend b
    server s 127.0.0.1:18671
C
python3 server.py &
usr/sbin/haproxy -db -f haproxy.cfg 2>/dev/null &
HOME="$dir" usr/bin/caddy run --adapter caddyfile --config Caddyfile 2>caddy.log &
usr/bin/h2o -c h2o.conf 2>/dev/null &
for port in 18671 18672 18673 18674; do
  for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null && break
    sleep .2
  done
done
got() { # what curl printed and its exit code
  body=$(curl -s -m 5 "$@") && rc=0 || rc=$?
  echo "$body, $rc"
}
direct=$(got http://127.0.0.1:18671/)
caddy1=$(got http://127.0.0.1:18672/)
caddy2=$(got --http2-prior-knowledge http://127.0.0.1:18672/)
h2o1=$(got http://127.0.0.1:18673/)
h2o2=$(got --http2-prior-knowledge http://127.0.0.1:18673/)
haproxy1=$(got http://127.0.0.1:18674/)
haproxy2=$(got --http2-prior-knowledge http://127.0.0.1:18674/)
usr/sbin/haproxy -v | sed -n 1p
echo "Caddy $(usr/bin/caddy version), $(usr/bin/h2o -v | sed -n 1p)"
echo "direct: $direct; Caddy: $caddy1, HTTP/2: $caddy2; h2o: $h2o1, HTTP/2: $h2o2; HAProxy: $haproxy1, HTTP/2: $haproxy2; Caddy logs: $(grep -o 'aborting with incomplete response' caddy.log | sed -n 1p)"
[ "$direct" = "data: 1, 18" ] && [ "$haproxy1" = "data: 1, 18" ] && grep -q "aborting with incomplete response" caddy.log
for seen in "$caddy1" "$caddy2" "$h2o1" "$h2o2" "$haproxy2"; do [ "$seen" = "data: 1, 0" ]; done
