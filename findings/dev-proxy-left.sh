#!/usr/bin/env bash
# Browsersync 3.0.4 and webpack-dev-server 5.2.7 (http-proxy-middleware 2.0.12), on Node.js 20, never tell the server
# that the browser has left a stream: the connection to the server stays open, and takes what the server sends, for as
# long as that goes on. Each reload of a page with Server-Sent Events leaves one more behind, and a server that counts
# who is there counts them all. webpack-dev-server 6.1.0, with http-proxy-middleware 4.2.2, ends the connection.
#
# Seen: a server that sends an event each 0.2 s, and a client that leaves after the first: through the former two the
# server had sent over 20 more without an error 5 s later; through 6.1.0 its connection was closed after 0.0 s.
# Fails if that changes. Needs bash, node 20.19 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
echo '{"type":"module"}' >package.json
npm install --silent --no-audit --no-fund browser-sync@3.0.4 wds5@npm:webpack-dev-server@5.2.7 wds6@npm:webpack-dev-server@6.1.0 \
  webpack@5.113.0 >/dev/null
npm ls --all 2>/dev/null | grep -o 'http-proxy-middleware@[0-9.]*' | sort -u

cat >test.mjs <<'J'
import http from "node:http";
import fs from "node:fs";
import browserSync from "browser-sync";
import WDS5 from "wds5";
import WDS6 from "wds6";
import webpack from "webpack";

fs.writeFileSync("entry.js", "");
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const target = "http://127.0.0.1:18841";
const seen = {}; // by the name in the path
http.createServer((req, res) => {
  const it = (seen[req.url.slice(1)] = { sent: 0 });
  res.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-transform" });
  const timer = setInterval(() => { it.sent++; res.write("data: 1\n\n"); }, 200);
  res.on("close", () => { it.closed = Date.now(); clearInterval(timer); });
}).listen(18841, "127.0.0.1");

const bs = browserSync.create();
await new Promise((resolve) => bs.init({ proxy: target, host: "127.0.0.1", port: 18842, open: false, ui: false,
  online: false, logLevel: "silent" }, resolve));
for (const [WDS, port] of [[WDS5, 18843], [WDS6, 18844]]) {
  const server = new WDS({ host: "127.0.0.1", port, proxy: [{ context: ["/stream"], target, logLevel: "silent" }] },
    webpack({ mode: "development", entry: "./entry.js", infrastructureLogging: { level: "none" }, stats: "none" }));
  await server.start();
}
const through = [["Browsersync 3.0.4", 18842], ["webpack-dev-server 5.2.7", 18843], ["webpack-dev-server 6.1.0", 18844]];
for (const [, port] of through) {
  const response = await new Promise((resolve) => http.get({ host: "127.0.0.1", port, path: "/stream" + port }, resolve));
  await new Promise((resolve) => response.once("data", resolve));
  response.on("error", () => {});
  response.destroy();
  Object.assign(seen["stream" + port], { left: Date.now(), before: seen["stream" + port].sent });
}
await sleep(5000);
let ok = true;
for (const [name, port] of through) {
  const it = seen["stream" + port];
  console.log(`${name}: ${it.closed ? `closed after ${((it.closed - it.left) / 1000).toFixed(1)} s` : `open, and ${it.sent - it.before} events more`}`);
  ok &&= port === 18844 ? it.closed - it.left < 1000 : !it.closed && it.sent - it.before > 15;
}
process.exit(ok ? 0 : 1);
J
timeout 120 node test.mjs
