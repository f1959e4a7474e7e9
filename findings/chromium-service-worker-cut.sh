#!/usr/bin/env bash
# In Chromium 156 (Debian 12) an EventSource whose connection breaks comes again, but not when a service worker answers
# it with respondWith(fetch(event.request)): then it is closed for good, readyState 2, as if the server had refused it.
# An answer that the server ends in order is followed by another one even then, so it shows only when a server dies or a
# proxy cuts. Firefox 153 comes again in each case.
#
# Seen: a chunked answer that ends without its last chunk (cut) or with it (end), in 4 s, with retry: 300. Chromium:
# with a worker the cut one is closed, the other one is not, and the cut one without a worker is not, either.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys, urllib.parse
page = """<!doctype html><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const seen = [];
const follow = async (path) => {
  const source = new EventSource(path);
  await wait(4000);
  seen.push(source.readyState === 2 ? "closed" : "open");
  source.close();
};
(async () => {
  await follow("/stream/cut");
  await navigator.serviceWorker.register("/worker.js");
  while (!navigator.serviceWorker.controller) await wait(100);
  await follow("/stream/cut");
  await follow("/stream/end");
  fetch("/done?" + seen);
})();
</script>"""
worker = """addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => event.respondWith(fetch(event.request)));"""
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/done":
            print("plain cut: %s; worker, cut: %s; worker, end: %s" % tuple(url.query.split(",")), flush=True)
        kind, body = {"/": ("text/html", page), "/worker.js": ("text/javascript", worker)}.get(
            url.path, ("text/event-stream", "retry: 300\ndata: x\n\n"))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body.encode()))
        if url.path != "/stream/cut":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True
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
run chromium 18644 chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir="$dir/c"
run firefox 18645 firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
echo "$(chromium --version 2>/dev/null): $(cat chromium)"
echo "$(firefox-esr --version 2>/dev/null): $(cat firefox)"
[ "$(cat chromium)" = "plain cut: open; worker, cut: closed; worker, end: open" ] &&
  [ "$(cat firefox)" = "plain cut: open; worker, cut: open; worker, end: open" ]
