#!/usr/bin/env bash
# iter_lines() of python-requests 2.28.1 (Debian 12), with which scripts read Server-Sent Events, makes one line more
# when the CR and the LF of a line's end come in two pieces. An empty line is what ends an event, so an event of two
# lines falls apart, at places that depend on the network.
#
# Seen: "event: move CR LF data: 7 CR LF CR LF" in two pieces, the first of which ends in the first CR: the lines are
# "event: move", "", "data: 7", "". In one piece: "event: move", "data: 7", "".
# Fails if that changes. Needs bash, apt-get, dpkg, Debian's python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "python3-requests=2.28.1*" python3-urllib3 python3-chardet python3-idna python3-certifi python3-six 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
cat >server.py <<'P'
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        event = b"event: move\r\ndata: 7\r\n\r\n"
        for piece in [event[:12], event[12:]] if self.path == "/two" else [event]:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(.3)
        self.wfile.write(b"0\r\n\r\n")
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18630), Handler).serve_forever()
P
cat >client.py <<'P'
import requests
def lines(path):
    return [line.decode() for line in requests.get("http://127.0.0.1:18630" + path, stream=True).iter_lines()]
one, two = lines("/one"), lines("/two")
print(requests.__version__, "one piece:", one, "two pieces:", two)
if one != ["event: move", "data: 7", ""] or two != ["event: move", "", "data: 7", ""]:
    raise SystemExit(1)
P
/usr/bin/python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18630) 2>/dev/null; do sleep .1; done
PYTHONPATH="$dir/usr/lib/python3/dist-packages" timeout 20 /usr/bin/python3 client.py
