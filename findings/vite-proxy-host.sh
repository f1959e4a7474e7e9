#!/usr/bin/env bash
# Two ways to write the same rule of Vite's server.proxy send different requests. With "/api": "http://server:1" the
# server gets its own name as Host, with "/api": { target: "http://server:1" } it gets the one that the browser asked
# for: the short form switches changeOrigin on, the long one leaves it off. So who makes the rule longer, to add any
# other option, changes cookies, redirects and virtual hosts; and with the short form a server that compares Origin
# with Host, against requests from other sites, refuses each POST of the page that Vite serves, but no GET.
#
# Seen in 7.3.8 and 8.3.8: Host 127.0.0.1:18691 (the server) with the short form, localhost:5191 and :5192 with the
# long one.
# Fails if that changes. Needs bash, node 20.19 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
echo '{"type":"module"}' >package.json
npm install --silent --no-audit --no-fund vite7@npm:vite@7.3.8 vite8@npm:vite@8.3.8 >/dev/null

cat >test.mjs <<'J'
import http from "node:http";
import * as vite7 from "vite7";
import * as vite8 from "vite8";

const target = "http://127.0.0.1:18691";
http.createServer((req, res) => res.end(req.headers.host)).listen(18691, "127.0.0.1");
let port = 5190;
let asSeen = true;
for (const vite of [vite7, vite8]) {
  const page = `localhost:${++port}`;
  const dev = await vite.createServer({ configFile: false, logLevel: "silent", server: {
    port, strictPort: true, proxy: { "/short": target, "/long": { target } } } });
  await dev.listen();
  const host = async (path) => (await fetch(`http://${page}${path}`)).text();
  const [short, long] = [await host("/short"), await host("/long")];
  console.log(`Vite ${vite.version}: short form ${short}, long form ${long}`);
  asSeen &&= short === "127.0.0.1:18691" && long === page;
}
process.exit(asSeen ? 0 : 1);
J
node test.mjs
