#!/usr/bin/env bash
# @fastify/http-proxy 11.6.3 (with @fastify/reply-from 12.6.5 and undici in it, fastify 5.12.8) answers 500, "expect header
# not supported", to a request with "Expect: 100-continue", and does not ask the server. Node.js has answered that
# header with a 100 by then, so it has done its work, but it is passed on to undici, which refuses it. curl adds it on
# its own to bodies above 1 MB and to those from a pipe: an upload works in a test with a small file, and fails with a
# large one.
#
# Seen: curl -T of 10 bytes: 200; of 2 MB: 500; of 2 MB with -H Expect: (none): 200; of 10 bytes from a pipe: 500.
# Straight to the server all four are 200.
# Fails if that changes. Needs bash, curl 7.84 or later, node 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
echo '{"type":"module"}' >package.json
npm install --silent --no-audit --no-fund fastify@5.12.8 @fastify/http-proxy@11.6.3 @fastify/reply-from@12.6.5 >/dev/null

cat >test.mjs <<'J'
import http from "node:http";
import Fastify from "fastify";
import proxy from "@fastify/http-proxy";

http.createServer((req, res) => req.resume().on("end", () => res.end("ok"))).listen(18851, "127.0.0.1");
const app = Fastify();
app.register(proxy, { upstream: "http://127.0.0.1:18851" });
await app.listen({ port: 18852, host: "127.0.0.1" });
J
node test.mjs &
for port in 18851 18852; do
  for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null && break
    sleep .2
  done
done
head -c 10 /dev/zero >small
head -c 2000000 /dev/zero >large
ask() { curl -s -m 9 --http1.1 -o answer -w '%{http_code}' "$@" || true; }
all() { echo "$(ask --data-binary @small "$1") $(ask --data-binary @large "$1") $(ask -H Expect: --data-binary @large "$1") $(ask -T - "$1" <small)"; }
direct=$(all http://127.0.0.1:18851/x)
through=$(all http://127.0.0.1:18852/x)
echo "direct: $direct; through the proxy: $through; $(grep -o '"message":"[^"]*"' answer)"
[ "$direct" = "200 200 200 200" ] && [ "$through" = "200 500 200 500" ] && grep -q 'expect header not supported' answer
