#!/usr/bin/env bash
# sse.js 2.8.0 dispatches what came of an event that was never finished, when the response ends in order: half its data,
# with its id counted, so that the rest is not asked for either. WHATWG throws an event without its blank line away.
# With a response that breaks off, sse.js does so, too.
#
# Seen: of "id: 2", "data: {"a":1,"b" it gave the event 2 with {"a":1,"b and came back with Last-Event-ID 2;
# eventsource 5.1.5 gave none and came back with 1. (XMLHttpRequest is happy-dom's 21.0.4.)
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent sse.js@2.8.0 happy-dom@21.0.4 eventsource@5.1.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSource } from 'eventsource';
import { Window } from 'happy-dom';
import { SSE } from 'sse.js';
const asked = {}, got = { '/sse.js': [], '/eventsource': [] };
const server = http.createServer(async (request, response) => {
  const first = !(request.url in asked);
  asked[request.url] = request.headers['last-event-id'] ?? '';
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write(first ? 'retry: 300\nid: 1\ndata: {}\n\n' : ':\n');
  await sleep(200);
  if (first) response.end('id: 2\ndata: {"a":1,"b');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
globalThis.XMLHttpRequest = new Window({ url }).XMLHttpRequest;
new SSE(`${url}/sse.js`, { autoReconnect: true }).onmessage = (e) => got['/sse.js'].push(e.data);
new EventSource(`${url}/eventsource`).onmessage = (e) => got['/eventsource'].push(e.data);
await sleep(4000);
console.log(got, asked);
process.exit(`${got['/sse.js']}` === '{},{"a":1,"b' && asked['/sse.js'] === '2'
  && `${got['/eventsource']}` === '{}' && asked['/eventsource'] === '1' ? 0 : 1);
J
node run.mjs
