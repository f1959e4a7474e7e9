#!/usr/bin/env bash
# With event-source-plus 0.1.15, abort() between two tries does not end the stream: the next try gets a new
# AbortController and goes on. Every later abort() does nothing at all, as one has been. onAbort is called all the same.
#
# Seen: of a server that answers 503, aborted after 10 requests and a second time 2.5 s later: 12 requests by then, 17
# after 5 s more. A stream that is open when abort() is called ends.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent event-source-plus@0.1.15
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSourcePlus } from 'event-source-plus';
const requests = { '/down': 0, '/open': 0 };
const server = http.createServer((request, response) => {
  requests[request.url]++;
  response.writeHead(request.url === '/down' ? 503 : 200, { 'Content-Type': 'text/event-stream' });
  if (request.url === '/down') response.end(); else response.write('data: 1\n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
const listen = (path) => new EventSourcePlus(url + path, { maxRetryInterval: 1000 }).listen({ onMessage() {} });
const [down, open] = [listen('/down'), listen('/open')];
let aborts = 0;
down.onAbort(() => aborts++);
while (requests['/down'] < 10) await sleep(10); // by then it waits a second between two tries
await sleep(300);
down.abort();
open.abort();
await sleep(2500);
down.abort();
const before = { ...requests };
await sleep(5000);
console.log('event-source-plus 0.1.15, requests until the second abort()', before, 'and 5 s later', requests);
process.exit(before['/down'] > 10 && requests['/down'] > before['/down'] && requests['/open'] === 1 && aborts === 1
  ? 0 : 1);
J
node run.mjs
