#!/usr/bin/env bash
# wget -qO- (GNU Wget 1.21.3, Debian 12) follows a stream of Server-Sent Events, and connects again when it breaks. But
# it takes the new stream for the rest of a file: it asks for "Range: bytes=N-", and when the server answers 200, as one
# that knows no ranges does, it drops the first N bytes of what comes. Events are missing, or begin in the middle,
# without a word and with exit status 0. With --tries=1 it ends at the cut, with status 4.
#
# Seen: 3 events, a cut, 6 more events, the orderly end: wget prints the events 1, 2, 3, 7, 8 and 9, status 0.
# Fails if that changes. Needs bash, apt-get, dpkg, python3.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "wget=1.21.3-1*" 2>/dev/null
dpkg -x wget_*.deb .
cat >server.py <<'P'
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sent = 0
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        first = Handler.sent == 0
        for _ in range(3 if first else 6):
            Handler.sent += 1
            event = b"data: the event number %d\n\n" % Handler.sent
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        if not first:
            self.wfile.write(b"0\r\n\r\n")
            Handler.sent = 0
        self.close_connection = True
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18620), Handler).serve_forever()
P
python3 server.py &
until (echo >/dev/tcp/127.0.0.1/18620) 2>/dev/null; do sleep .1; done
timeout 20 usr/bin/wget -qO- http://127.0.0.1:18620/ >out && status=0 || status=$?
usr/bin/wget --version | head -1
cat out
echo "status $status"
events=$(grep -o 'number [0-9]' out | grep -o '[0-9]' | tr -d '\n')
echo "events: $events"
usr/bin/wget --tries=1 -qO- http://127.0.0.1:18620/ >/dev/null && once=0 || once=$?
echo "with --tries=1: status $once"
[ $status = 0 ] && [ $once = 4 ] && [ "$events" = 123789 ]
