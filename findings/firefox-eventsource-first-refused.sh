#!/usr/bin/env bash
# An EventSource of Firefox 153 (firefox-esr of Debian 12) gives up for good when its very first connection is refused:
# readyState is 2 at once. When a connection was there before, the same refusal is one of many, and it comes again for
# as long as it takes. So a page that is loaded while the server of its events restarts gets none, and one that was
# there before does. Chromium 156 comes again in both cases.
#
# Seen: a server that begins 4 s after the page was loaded, and goes away for 4 s later: Firefox is closed, and with a
# connection before it is open again. Chromium is open both times.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys, threading, time, urllib.parse
port = int(sys.argv[1])
page = """<!doctype html><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  const first = new EventSource("http://127.0.0.1:%d/");
  await wait(1000);
  await fetch("/begin");
  await wait(8000);
  const second = new EventSource("http://127.0.0.1:%d/");
  await wait(2000);
  await fetch("/away");
  await wait(15000);
  fetch("/done?" + ["connecting", "open", "closed"][first.readyState] + "," +
    ["connecting", "open", "closed"][second.readyState]);
})();
</script>""" % (port + 10, port + 10)
class Events(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(b"retry: 1000\ndata: x\n\n")
        while self.server.up:
            self.wfile.write(b":\n")
            time.sleep(.1)
    def log_message(self, *args):
        pass
def begin():
    global events
    events = http.server.ThreadingHTTPServer(("127.0.0.1", port + 10), Events)
    events.up = True
    threading.Thread(target=events.serve_forever, daemon=True).start()
def away():
    events.up = False
    events.shutdown()
    events.server_close()
    time.sleep(4)
    begin()
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/begin":
            begin()
        if url.path == "/away":
            threading.Thread(target=away).start()
        if url.path == "/done":
            print(url.query, flush=True)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page.encode() if url.path == "/" else b"")
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Page).serve_forever()
P
run() { # name port command...
  python3 server.py "$2" >"$1" 2>/dev/null &
  until (echo >/dev/tcp/127.0.0.1/"$2") 2>/dev/null; do sleep .1; done
  HOME="$dir" timeout 90 "${@:3}" "http://127.0.0.1:$2/" >/dev/null 2>&1 &
  local browser=$!
  for _ in $(seq 180); do
    [ ! -s "$1" ] || break
    sleep .5
  done
  kill $browser
  wait $browser || true
}
run firefox 18627 firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
run chromium 18628 chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir="$dir/c"
echo "$(firefox-esr --version 2>/dev/null): first refused: $(sed 's/,/; later refused: /' firefox)"
echo "$(chromium --version 2>/dev/null): first refused: $(sed 's/,/; later refused: /' chromium)"
[ "$(cat firefox)" = closed,open ] && [ "$(cat chromium)" = open,open ]
