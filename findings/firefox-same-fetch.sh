#!/usr/bin/env bash
# In Firefox 153 (firefox-esr of Debian 12) a fetch() of a URL that another fetch() is still reading waits until that
# one's answer ends, which a stream of events does not. So a second reader of the same stream, such as a library that
# makes EventSource of fetch, gets nothing and no error, although the server says "Cache-Control: no-cache" or even
# "no-store". With {cache: "no-store"} in the request it is answered at once; so is a real EventSource. Chromium 156
# answers at once in each case.
#
# Seen: a first stream of 8 s. The second fetch has its first byte after more than 4 s in Firefox,
# for both headers, and sooner with {cache: "no-store"}, as EventSource, and in Chromium.
# Fails if that changes. Needs bash, python3, chromium, firefox-esr.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
cat >server.py <<'P'
import http.server, sys, time, urllib.parse
page = """<!doctype html><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const read = async (url, options) => {
  const begun = performance.now();
  await (await fetch(url, options)).body.getReader().read();
  return performance.now() - begun < 4000 ? "at once" : "late";
};
const listen = (url) => new Promise((done) => {
  const begun = performance.now(), source = new EventSource(url);
  source.onopen = () => {
    source.close();
    done(performance.now() - begun < 4000 ? "at once" : "late");
  };
});
(async () => {
  const seen = [];
  for (const [header, second] of [["no-cache", read], ["no-store", read],
    ["no-cache", (url) => read(url, { cache: "no-store" })], ["no-cache", listen]]) {
    const url = "/stream?" + seen.length + "&" + header;
    await read(url);
    seen.push(await second(url));
  }
  fetch("/done?" + seen);
})();
</script>"""
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/done":
            print(urllib.parse.unquote(url.query), flush=True)
        stream = url.path == "/stream"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if stream else "text/html")
        self.send_header("Cache-Control", url.query.split("&")[1] if stream else "no-store")
        self.end_headers()
        if not stream:
            self.wfile.write(page.encode())
            return
        for _ in range(80):
            self.wfile.write(b"data: x\n\n")
            time.sleep(.1)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
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
run firefox 18625 firefox-esr --headless --no-remote --profile "$(mktemp -d -p "$dir")"
run chromium 18626 chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir="$dir/c"
echo "$(firefox-esr --version 2>/dev/null): $(cat firefox)"
echo "$(chromium --version 2>/dev/null): $(cat chromium)"
[ "$(cat firefox)" = "late,late,at once,at once" ] && [ "$(cat chromium)" = "at once,at once,at once,at once" ]
