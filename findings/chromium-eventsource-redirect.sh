#!/usr/bin/env bash
# An EventSource of Chromium 156 (Debian 12) that was sent elsewhere by a temporary redirect (307) connects again there,
# and never again to the URL that the page asked for. A balancer that hands streams out by redirects is not asked when
# one of its servers goes: the page keeps on asking the dead one. Firefox 153 asks the original URL each time.
#
# Seen: /balancer redirects to /server, whose answer ends at once; of four requests for /server, Chromium made one for
# /balancer, Firefox one for each.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys
seen = {"/": 0, "/balancer": 0, "/server": 0}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path not in seen:
            return self.send_error(404)
        seen[self.path] += 1
        if self.path == "/balancer":
            self.send_response(307)
            self.send_header("Location", "/server")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind, body = ("text/html", b"<script>new EventSource('/balancer')</script>")
        if self.path == "/server":
            kind, body = ("text/event-stream", b"retry: 300\ndata: x\n\n")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)
        if seen["/server"] == 4:
            print(seen["/balancer"], flush=True)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
P
run() { # name port command...
  python3 server.py "$2" >"$1" 2>/dev/null &
  until (echo >/dev/tcp/127.0.0.1/"$2") 2>/dev/null; do sleep .1; done
  HOME="$dir" timeout 60 "${@:3}" "http://127.0.0.1:$2/" >/dev/null 2>&1 &
  local browser=$!
  for _ in $(seq 120); do
    [ ! -s "$1" ] || break
    sleep .5
  done
  kill $browser
  wait $browser || true
}
run chromium 18623 chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir="$dir/c"
run firefox 18624 firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
echo "$(chromium --version 2>/dev/null): $(head -1 chromium) of 4 requests went to the balancer"
echo "$(firefox-esr --version 2>/dev/null): $(head -1 firefox) of 4"
[ "$(head -1 chromium)" = 1 ] && [ "$(head -1 firefox)" = 4 ]
