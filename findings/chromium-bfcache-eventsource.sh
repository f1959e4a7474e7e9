#!/usr/bin/env bash
# Chromium 156 (Debian 12) keeps an open EventSource of a page that the user has left, for a minute: the page waits in
# the back/forward cache, its connection stays and takes events, and the server learns nothing. It counts among the six
# connections that there are to a host over HTTP/1.1, so a user who follows links through six pages with one EventSource
# each waits for the seventh until the first page's minute is over. Firefox 153 ends the connection with the page. In
# Chromium the page has to: addEventListener("pagehide", () => source.close()), and open it again on a "pageshow" whose
# persisted is true.
#
# Seen: pages that follow each other after 0.3 s; between the requests for the sixth and the seventh 58 s went by in
# Chromium, and with the line for "pagehide", or in Firefox, less than 5 s.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys, time
port, close = int(sys.argv[1]), len(sys.argv) > 2
page = """<!doctype html><script>
const source = new EventSource("/events");
source.onopen = () => setTimeout(() => { location = "/%d"; }, 300);
</script>"""
if close:
    page += """<script>addEventListener("pagehide", () => source.close());</script>"""
came = {}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.close_connection = True
        if not self.path[1:].isdigit() and self.path != "/events":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if self.path == "/events" else "text/html")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.path != "/events":
            n = int(self.path[1:])
            came.setdefault(n, time.time())
            if n == 7:
                print(round(came[7] - came[6]), flush=True)
            self.wfile.write((page % (n + 1)).encode() if n < 7 else b"the end")
            return
        while True:
            self.wfile.write(b"data: x\n\n")
            time.sleep(.2)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
P
run() { # name port "" or "close" command...
  python3 server.py "$2" $3 >"$1" 2>/dev/null &
  until (echo >/dev/tcp/127.0.0.1/"$2") 2>/dev/null; do sleep .1; done
  HOME="$dir" timeout 120 "${@:4}" "http://127.0.0.1:$2/1" >/dev/null 2>&1 &
  local browser=$!
  for _ in $(seq 240); do
    [ ! -s "$1" ] || break
    sleep .5
  done
  kill $browser
  wait $browser || true
}
chromium=(chromium --headless=new --no-sandbox --disable-gpu --no-first-run)
run plain 18641 "" "${chromium[@]}" --user-data-dir="$dir/c1"
run closes 18642 close "${chromium[@]}" --user-data-dir="$dir/c2"
run firefox 18643 "" firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
echo "$(chromium --version 2>/dev/null): $(cat plain) s, with pagehide $(cat closes) s"
echo "$(firefox-esr --version 2>/dev/null): $(cat firefox) s"
[ "$(cat plain)" -gt 30 ] && [ "$(cat closes)" -lt 5 ] && [ "$(cat firefox)" -lt 5 ]
