#!/usr/bin/env bash
# launchdarkly-eventsource 2.2.0 on Node.js 20 ends a stream that says nothing for 5 s and opens another, for ever, with
# no timeout asked for. The 5 s are those of Node's default agent, which ends no request by them: it emits "timeout" and
# leaves it at that. The client listens for that event and takes it for its own. With readTimeoutMillis set, however
# long, or an agent of one's own, it stays.
#
# Seen: in 18 s 3 requests (an error "Read timeout, received no data in undefinedms"), with readTimeoutMillis 1.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent launchdarkly-eventsource@2.2.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import client from 'launchdarkly-eventsource';
const requests = { '/plain': 0, '/option': 0 };
const server = http.createServer((request, response) => {
  requests[request.url]++;
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('data: 1\n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
new client.EventSource(`${url}/plain`).onerror = (e) => console.log(e.message);
new client.EventSource(`${url}/option`, { readTimeoutMillis: 60_000 });
await sleep(18_000);
console.log(`launchdarkly-eventsource 2.2.0, Node.js ${process.version}, requests in 18 s:`, requests);
process.exit(requests['/plain'] >= 3 && requests['/option'] === 1 ? 0 : 1);
J
node run.mjs
