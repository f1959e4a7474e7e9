#!/usr/bin/env bash
# Caddy 2.6.2 (Debian 12) with "flush_interval -1", which is often advised for Server-Sent Events, does not end the
# request to the server when the browser has left a stream that is silent: the server learns of it at its next event at
# the earliest. Without the option the server's connection ends at once, and events still go out as they come, as the
# content type is text/event-stream.
#
# Seen: with the option nothing within 6 s of the leaving, without it the end within 0.1 s; the first event came within
# 0.1 s either way.
# Fails if that changes. Needs bash, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "caddy=2.6.2*" 2>/dev/null
dpkg -x caddy_*.deb .

cat >server.py <<'P'
import socket, threading, time
l = socket.create_server(("127.0.0.1", 18611))
def serve(c):
    c.recv(65536)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    c.sendall(b"9\r\ndata: 1\n\n\r\n")
    began = time.time()
    c.settimeout(6)
    try:
        c.recv(1)
    except OSError:
        pass
    open("noticed", "a").write("%.1f\n" % (time.time() - began))
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >client.py <<'P'
import socket, sys, time
c = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
began = time.time()
c.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
got = b""
while b"data: 1" not in got:
    got += c.recv(65536)
print("%.1f" % (time.time() - began))
P
printf '{\n admin off\n auto_https off\n}\nhttp://:18612 {\n reverse_proxy 127.0.0.1:18611 {\n  flush_interval -1\n }\n}\nhttp://:18613 {\n reverse_proxy 127.0.0.1:18611\n}\n' >Caddyfile
python3 server.py &
HOME="$dir" usr/bin/caddy run --config Caddyfile 2>/dev/null &
sleep 2
for port in 18612 18613; do
  rm -f noticed
  first=$(python3 client.py $port)
  for _ in $(seq 80); do [ -s noticed ] && break; sleep .1; done
  echo "$(usr/bin/caddy version) $port: first event after $first s, noticed after $(cat noticed) s"
  cat noticed >>all
done
python3 -c 'a, b = [float(x) for x in open("all")]; raise SystemExit(not (a > 5 and b < 2))'
