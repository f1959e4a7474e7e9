#!/usr/bin/env bash
# event-source-plus 0.1.15 hands the number of a retry line to onMessage, and does not wait for it: after a stream that
# ended, it asks again after 2 ms each time, for ever, as each good answer sets its back-off to nothing. A server that
# says retry: 10000 and ends its streams is asked several times a second by each client.
#
# Seen: on a busy machine 34 requests in 5 s, by EventSource (eventsource 5.1.5) 1.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent event-source-plus@0.1.15 eventsource@5.1.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSource } from 'eventsource';
import { EventSourcePlus } from 'event-source-plus';
const requests = { '/plus': 0, '/standard': 0 };
const server = http.createServer((request, response) => {
  requests[request.url]++;
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.end('retry: 10000\ndata: 1\n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
let retry;
new EventSourcePlus(`${url}/plus`).listen({ onMessage: (e) => { retry = e.retry; } });
new EventSource(`${url}/standard`);
await sleep(5000);
console.log(`event-source-plus 0.1.15, told retry: ${retry}, requests in 5 s:`, requests);
process.exit(retry === 10_000 && requests['/plus'] > 10 && requests['/standard'] === 1 ? 0 : 1);
J
node run.mjs
