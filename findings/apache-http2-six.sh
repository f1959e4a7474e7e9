#!/usr/bin/env bash
# Apache 2.4.71 (Debian 12, mod_http2) announces that an HTTP/2 connection may carry 100 requests at once, and accepts
# them, but works on 6 of them alone until some are finished. So on a fresh connection the seventh Server-Sent Events
# stream, and any other request after it, gets no answer while the six go on. The number grows with the requests that
# the connection has finished before: a page that has loaded many small files first may have more streams than one that
# has not. No directive sets it; H2MaxSessionStreams is what is announced.
#
# Seen: 40 streams on a connection that had served 0, 1 and 100 short requests: 6, 6 and 37 were answered, and of short
# requests that came after them none.
# Fails if that changes. Needs bash, node, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
chmod 755 .
apt-get download -qq "apache2-bin=2.4.71-1~deb12u1" libapr1 libaprutil1 libnghttp2-14 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu"

cat >server.py <<'P'
import socket, threading, time
l = socket.create_server(("127.0.0.1", 18641), backlog=200)
def serve(c):
    if c.recv(65536).startswith(b"GET /short"):
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        return
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        c.sendall(b"9\r\ndata: 1\n\n\r\n")
        time.sleep(.5)
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >client.mjs <<'J'
import http2 from "node:http2";
const connection = http2.connect("http://127.0.0.1:18642");
await new Promise((resolve) => connection.on("remoteSettings", resolve));
let answered = { "/short": 0, "/stream": 0 };
const get = (path) => new Promise((resolve) => {
  const request = connection.request({ ":path": path });
  request.on("response", (headers) => { if (headers[":status"] === 200) answered[path]++; });
  request.on("data", () => {}).on("end", resolve).on("error", resolve);
});
for (let i = 0; i < process.argv[2]; i++) await get("/short");
answered["/short"] = 0;
for (let i = 0; i < 40; i++) get("/stream");
setTimeout(() => get("/short"), 1000);
setTimeout(() => {
  console.log(connection.remoteSettings.maxConcurrentStreams, answered["/stream"], answered["/short"]);
  process.exit();
}, 5000);
J
cat >apache.conf <<C
ServerRoot $dir/usr/lib/apache2
PidFile $dir/pid
ErrorLog $dir/log
Listen 127.0.0.1:18642
ServerName localhost
LoadModule mpm_event_module modules/mod_mpm_event.so
LoadModule authz_core_module modules/mod_authz_core.so
LoadModule proxy_module modules/mod_proxy.so
LoadModule proxy_http_module modules/mod_proxy_http.so
LoadModule http2_module modules/mod_http2.so
User www-data
Group www-data
Protocols h2c http/1.1
ProxyPass / http://127.0.0.1:18641/
C
python3 server.py 2>/dev/null &
usr/sbin/apache2 -DFOREGROUND -f "$dir/apache.conf" &
sleep 2
fresh=$(node client.mjs 0)
one=$(node client.mjs 1)
used=$(node client.mjs 100)
echo "$(usr/sbin/apache2 -v | sed -n 1p)"
echo "announced, streams of 40, short requests after them: fresh $fresh, after 1 request $one, after 100 $used"
[ "$fresh" = "100 6 0" ] && [ "$one" = "100 6 0" ] && [ "${used% *}" != "100 6" ] && [ "${used##* }" = 0 ]
