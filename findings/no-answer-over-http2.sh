#!/usr/bin/env bash
# What a client is told of a server that closes the connection without an answer depends on the client's version of
# HTTP, with two proxies of Debian 12 that say 502 over HTTP/1.1:
# - Apache 2.4.71 says 500 over HTTP/2, and not by the ErrorDocument 500 (or 502) of the request's Location, but by
#   that of the whole server, although both hold over HTTP/1.1.
# - HAProxy 2.6.12 says nothing over HTTP/2: it resets the request with REFUSED_STREAM, by which HTTP/2 means that a
#   request has not been processed and may be sent again. But the server did get it, whole. So Go's client sends a
#   POST again and again, until its context ends.
#
# Seen: Apache: 502 with the Location's page, then 500 with the server's page; HAProxy: 502, then REFUSED_STREAM (7),
# and in 5 s the server gets one POST 4 times.
# Fails if that changes. Needs bash, curl, node, python3, Go 1.24 or later, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
chmod 755 .
apt-get download -qq "apache2-bin=2.4.71-1~deb12u1" libapr1 libaprutil1 libnghttp2-14 "haproxy=2.6.12-1*" liblua5.3-0 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu"

cat >server.py <<'P'
import socket
l = socket.create_server(("127.0.0.1", 18761))
while True:
    c, _ = l.accept()
    got = c.recv(65536)
    if got.startswith(b"POST"):
        while not got.rstrip().endswith(b"order"):
            got += c.recv(65536)
        print("POST", flush=True)
    c.close()
P
cat >client.mjs <<'J'
import http2 from "node:http2";
const request = http2.connect("http://127.0.0.1:" + process.argv[2]).request({ ":path": "/" });
let status, body = "";
request.on("response", (headers) => { status = headers[":status"]; }).on("data", (data) => { body += data; });
request.on("error", () => {}).on("close", () => {
  console.log(status ?? "reset " + request.rstCode, body.trim());
  process.exit();
});
J
mkdir post
cat >post/main.go <<'G'
package main

import (
	"context"
	"net/http"
	"strings"
	"time"
)

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	req, _ := http.NewRequestWithContext(ctx, "POST", "http://127.0.0.1:18763/", strings.NewReader("order"))
	(&http.Transport{Protocols: protocols}).RoundTrip(req)
}
G
(cd post && printf 'module post\n\ngo 1.24\n' >go.mod && go build -o ../post-client .)
cat >apache.conf <<C
ServerRoot $dir/usr/lib/apache2
PidFile $dir/pid
ErrorLog $dir/log
Listen 127.0.0.1:18762
ServerName localhost
LoadModule mpm_event_module modules/mod_mpm_event.so
LoadModule authz_core_module modules/mod_authz_core.so
LoadModule proxy_module modules/mod_proxy.so
LoadModule proxy_http_module modules/mod_proxy_http.so
LoadModule http2_module modules/mod_http2.so
User www-data
Group www-data
Protocols h2c http/1.1
ProxyPass / http://127.0.0.1:18761/
ErrorDocument 500 "server"
ErrorDocument 502 "server"
<Location />
    ErrorDocument 500 "location"
    ErrorDocument 502 "location"
</Location>
C
cat >haproxy.cfg <<'C'
defaults
    mode http
    timeout connect 5s
    timeout client 9s
    timeout server 9s
frontend f
    bind 127.0.0.1:18763
    default_backend b
backend b
    server s 127.0.0.1:18761
C
python3 server.py >posts &
usr/sbin/apache2 -DFOREGROUND -f "$dir/apache.conf" &
usr/sbin/haproxy -db -f haproxy.cfg 2>/dev/null &
for port in 18761 18762 18763; do
  for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null && break
    sleep .2
  done
done
one() { curl -s -m 5 -w ' %{http_code}' "http://127.0.0.1:$1/" | tr '\n' ' '; }
apache1=$(one 18762) apache2=$(node client.mjs 18762)
haproxy1=$(one 18763) haproxy2=$(node client.mjs 18763)
./post-client
posts=$(wc -l <posts)
usr/sbin/apache2 -v | sed -n 1p
usr/sbin/haproxy -v | sed -n 1p
echo "Apache: $apache1, HTTP/2: $apache2; HAProxy: ${haproxy1##* }, HTTP/2: $haproxy2, one POST of Go: $posts"
[ "$apache1" = "location 502" ] && [ "$apache2" = "500 server" ]
[ "${haproxy1##* }" = 502 ] && [ "$haproxy2" = "reset 7 " ] && [ "$posts" -gt 2 ]
