#!/usr/bin/env bash
# Chromium 156 (Debian 12) tells no service worker an EventSource's last event id. On a page whose worker answers with
# respondWith(fetch(event.request)), as many do for every GET, each connection after the first is made without the
# header Last-Event-ID, so the server cannot resume: events come again or are lost. The page itself sees nothing of it.
# A worker that does not call respondWith for the stream leaves the header as it is. Firefox 153 hands the header on.
#
# Seen: a server that ends each stream after an event with id 5: Last-Event-ID of the second request is 5 without a
# worker and past a worker that leaves it alone, and none through a worker. Firefox through a worker: 5.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys
page = """<!doctype html><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const follow = async (path) => {
  const source = new EventSource(path);
  await wait(1500);
  source.close();
};
(async () => {
  await follow("/stream/plain");
  await navigator.serviceWorker.register("/worker.js");
  while (!navigator.serviceWorker.controller) await wait(100);
  await follow("/stream/worker");
  await follow("/stream/around");
  fetch("/done");
})();
</script>"""
worker = """addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  if (!event.request.url.endsWith("/around")) event.respondWith(fetch(event.request));
});"""
seen = {}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        kind, body = {"/": ("text/html", page), "/worker.js": ("text/javascript", worker)}.get(
            self.path, ("text/event-stream", "retry: 300\nid: 5\ndata: x\n\n"))
        if self.path.startswith("/stream/"):
            seen.setdefault(self.path[8:], []).append(self.headers["Last-Event-ID"])
        if self.path == "/done":
            print(*("%s %s" % (name, ids[1]) for name, ids in seen.items()), sep=", ", flush=True)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
P
run() { # name port command...
  python3 server.py "$2" >"$1" &
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
run chromium 18621 chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir="$dir/c"
run firefox 18622 firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
echo "$(chromium --version 2>/dev/null): $(cat chromium)"
echo "$(firefox-esr --version 2>/dev/null): $(cat firefox)"
[ "$(cat chromium)" = "plain 5, worker None, around 5" ] && [ "$(cat firefox)" = "plain 5, worker 5, around 5" ]
