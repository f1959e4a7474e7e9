#!/usr/bin/env bash
# A server may send "103 Early Hints" before its answer (RFC 8297); Node.js has response.writeEarlyHints for it.
# Behind two proxies of Debian 12 that breaks the answer:
# - nginx 1.22.1 takes the 103 for the whole head of the answer, and the real status line and headers for its body.
#   Over HTTP/1.1 a browser sees nothing of that, as the same bytes arrive in the same order, although nginx logs a
#   103 and its own headers are on the wrong part. Over HTTP/2 there is no answer: the real head comes as data, and
#   the request fails.
# - Varnish 7.1.1 answers 503 in place of an answer that was fine.
# HAProxy 2.6.12 passes both on.
#
# Seen: nginx over HTTP/1.1: 200 with the server's header, but without that of add_header; over HTTP/2: 103 and an
# error. Varnish: 503. HAProxy: 200, and its own header is on it.
# Fails if that changes. Needs bash, curl with HTTP/2, python3, gcc (for Varnish), apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
chmod 755 .
apt-get download -qq "nginx-light=1.22.1-9*" "haproxy=2.6.12-1*" liblua5.3-0 \
  "varnish=7.1.1-2+deb12u1" "libvarnishapi3=7.1.1-2+deb12u1" libedit2 libbsd0 libjemalloc2 2>/dev/null
apt-get download -qq nginx 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
lib="$dir/usr/lib/$(uname -m)-linux-gnu"
export LD_LIBRARY_PATH="$lib:$lib/varnish:$dir/usr/lib/varnish"

cat >server.py <<'P'
import socket, threading, time
l = socket.create_server(("127.0.0.1", 18661))
def serve(c):
    c.recv(65536)
    c.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
    time.sleep(.2)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\nX-Server: yes\r\n\r\ndata: 1\n\n")
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >nginx.conf <<C
daemon off; pid $dir/pid; error_log stderr crit;
events {}
http {
    access_log $dir/access;
    client_body_temp_path $dir/t1; proxy_temp_path $dir/t2; fastcgi_temp_path $dir/t3; uwsgi_temp_path $dir/t4; scgi_temp_path $dir/t5;
    proxy_http_version 1.1;
    add_header X-Proxy yes always;
    server { listen 127.0.0.1:18662; listen 127.0.0.1:18663 http2; location / { proxy_pass http://127.0.0.1:18661; } }
}
C
cat >haproxy.cfg <<'C'
defaults
    mode http
    timeout connect 5s
    timeout client 9s
    timeout server 9s
frontend f
    bind 127.0.0.1:18664
    http-response set-header X-Proxy yes
    default_backend b
backend b
    server s 127.0.0.1:18661
C
printf 'vcl 4.1;\nbackend b { .host = "127.0.0.1:18661"; }\nsub vcl_recv { return (pass); }\n' >site.vcl
python3 server.py &
usr/sbin/nginx -c "$dir/nginx.conf" 2>/dev/null &
usr/sbin/haproxy -db -f haproxy.cfg 2>/dev/null &
usr/sbin/varnishd -F -n "$dir/run" -a 127.0.0.1:18665 -f "$dir/site.vcl" >log 2>&1 &
for _ in $(seq 50); do
  sleep .2
  curl -s --fail-early -m 5 http://127.0.0.1:18661/ http://127.0.0.1:18665/ >/dev/null && break
done
# The last head that a client makes out: its status, and whether the server's and the proxy's headers are on it.
seen() {
  curl -si -m 5 "$@" | tr -d '\r' | awk 'tolower($1) ~ /^http/ { status = $2; s = p = "" }
    tolower($1) == "x-server:" { s = " server" } tolower($1) == "x-proxy:" { p = " proxy" } END { printf "%s", status s p }'
}
one=$(seen http://127.0.0.1:18662/)
two=$(seen --http2-prior-knowledge http://127.0.0.1:18663/ || true)
haproxy=$(seen http://127.0.0.1:18664/)
varnish=$(seen http://127.0.0.1:18665/)
usr/sbin/nginx -v 2>&1
usr/sbin/varnishd -V 2>&1 | sed -n 1p
usr/sbin/haproxy -v | sed -n 1p
echo "nginx over HTTP/1.1: $one, logged as $(awk 'NR == 1 { print $9 }' access); over HTTP/2: $two; Varnish: $varnish; HAProxy: $haproxy"
[ "$one" = "200 server" ] && [ "$two" = "103 proxy" ] && [ "$varnish" = 503 ] && [ "$haproxy" = "200 server proxy" ]
