#!/usr/bin/env bash
# Firefox 153.8.0esr (Debian 12) makes ten requests of one when a server or a proxy accepts an EventSource's
# connection and closes it without an answer, as a proxy does whose server is away: all ten within a fraction of a
# second, each on a new connection, and only then the page gets its one error event and the reconnection time counts.
# So pages come back ten times as often as they should, while the service is in trouble. And it then depends on whose
# stream it is: one of the page's own site is tried again, one of another site is given up for good (readyState 2),
# although the network failed and nothing was refused.
#
# Seen: the stream ended once, then 40 connections were closed: own site an error after each 10 of them, and the stream
# came back with the 42nd request; another site an error with readyState 2 after the first 10, and no more requests.
# Fails if that changes. Needs bash, python3, apt-get, dpkg, and the libraries that firefox-esr depends on.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "firefox-esr=153.8.0esr*" 2>/dev/null
dpkg -x firefox-esr_*.deb .

cat >server.py <<'P'
import http.server, socket, sys, threading, time
streams = ("127.0.0.1", 18711)
page = ("127.0.0.1", 18711 if sys.argv[1] == "own" else 18712)
requests, seen = 0, []
def serve(c):
    global requests
    head = c.recv(65536)
    path = head.split()[1].decode() if head else ""
    if path == "/stream":
        requests += 1
        if 2 <= requests <= 41:
            return c.close()
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nAccess-Control-Allow-Origin: *\r\n"
                  b"Connection: close\r\n\r\nretry: 500\ndata: %d\n\n" % requests)
        time.sleep(1 if requests == 1 else 60)
    elif path.startswith("/saw/"):
        seen.append("%s after %d" % (path[5:], requests))
        c.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
    else:
        body = b"""<script>
            const source = new EventSource("http://127.0.0.1:18711/stream"), saw = (what) => fetch("/saw/" + what);
            source.onmessage = (e) => saw("data" + e.data);
            source.onerror = () => saw("error" + source.readyState);
            </script>"""
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    c.close()
def listen(address):
    l = socket.create_server(address)
    while True:
        threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
for address in {streams, page}:
    threading.Thread(target=listen, args=(address,), daemon=True).start()
deadline = time.time() + 60
while time.time() < deadline and not any(s.startswith(("data42", "error2")) for s in seen):
    time.sleep(.1)
time.sleep(5)
print(", ".join(seen))
P
mkdir profile
visit() { # own|other port
  python3 server.py "$1" >"$1" &
  local server=$!
  sleep 1
  HOME="$dir" usr/lib/firefox-esr/firefox-esr --headless --no-remote --profile "$dir/profile" "http://127.0.0.1:$2/" >/dev/null 2>&1 &
  local firefox=$!
  wait $server
  kill $firefox; wait $firefox || true
}
HOME="$dir" usr/lib/firefox-esr/firefox-esr --version
visit own 18711
visit other 18712
echo "own site: $(cat own)"
echo "another site: $(cat other)"
[ "$(cat own)" = "data1 after 1, error0 after 1, error0 after 11, error0 after 21, error0 after 31, error0 after 41, data42 after 42" ]
[ "$(cat other)" = "data1 after 1, error0 after 1, error2 after 11" ]
