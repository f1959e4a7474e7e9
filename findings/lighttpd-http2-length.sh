#!/usr/bin/env bash
# lighttpd 1.4.69 (Debian 12) answers 411, Length Required, to a POST over HTTP/2 whose body has no Content-Length. HTTP/2
# needs none, as its frames say where a body ends. The same POST over HTTP/1.1, where it is chunked, and the same body
# as a PUT over HTTP/2, go through to the server, with mod_proxy and whatever server.stream-request-body says. So a
# client that posts what it makes as it goes stops working on the day on which TLS, and with it HTTP/2, is switched on.
#
# Seen: a body from a pipe, "curl -T -", POST over HTTP/1.1: 200; over HTTP/2: 411, and the server was not asked; PUT
# over HTTP/2: 200. The same with server.stream-request-body 0, 1 and 2. Some of the 411 curl does not see, but only the
# reset of the stream behind it, as it is still sending; so this asks up to ten times.
# Fails if that changes. Needs bash, curl with HTTP/2, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "lighttpd=1.4.69-1*" 2>/dev/null
dpkg -x lighttpd_*.deb .

cat >server.py <<'P'
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_PUT(self):
        if self.headers["Content-Length"]:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else: # chunked
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_PUT
    def log_message(self, *_): open("asked", "a").write("x")
http.server.ThreadingHTTPServer(("127.0.0.1", 18801), Handler).serve_forever()
P
python3 server.py &
for n in 0 1 2; do
  cat >$n.conf <<C
server.document-root = "/var/empty"
server.bind = "127.0.0.1"
server.port = 1881$n
server.modules = ( "mod_proxy" )
server.feature-flags = ( "server.h2c" => "enable" )
server.stream-request-body = $n
proxy.server = ( "" => (( "host" => "127.0.0.1", "port" => 18801 )) )
C
  usr/sbin/lighttpd -D -m usr/lib/lighttpd -f $n.conf 2>/dev/null &
done
for port in 18801 18810 18811 18812; do
  for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null && break
    sleep .2
  done
done

ask() { # curl's arguments: the status, and whether the server was asked
  rm -f asked
  status=$(echo hello | curl -s -m 9 -T - -o answer -w '%{http_code}' "$@" || true)
  echo "$status $(cat asked 2>/dev/null || echo -)"
}
usr/sbin/lighttpd -v
ok=1
for n in 0 1 2; do
  site=http://127.0.0.1:1881$n/
  one=$(ask -X POST --http1.1 "$site")
  for _ in $(seq 10); do
    two=$(ask -X POST --http2-prior-knowledge "$site")
    [ "$two" = "000 -" ] || break
  done
  put=$(ask --http2-prior-knowledge "$site")
  echo "stream-request-body $n: POST over HTTP/1.1: $one; over HTTP/2: $two; PUT over HTTP/2: $put"
  [ "$one, $two, $put" = "200 x, 411 -, 200 x" ] || ok=0
done
[ $ok = 1 ]
