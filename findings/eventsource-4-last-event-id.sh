#!/usr/bin/env bash
# With eventsource 4.1.1 the lastEventId of an event that has no id of its own is empty, although an id came before and
# the client does send it when it connects again. By WHATWG HTML 9.2.6 it is the last id that came. A page that keeps
# lastEventId to go on later, in a new EventSource, forgets where it was.
#
# Seen: of "id: 7" and a second event without id, lastEventId was 7 and then empty; with the five others below 7 twice.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es2@npm:eventsource@2.0.2 es4@npm:eventsource@4.1.1 \
  es5@npm:eventsource@5.1.5 undici@7.30.2 event-source-polyfill@1.0.31 launchdarkly-eventsource@2.2.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
const asked = [];
const server = http.createServer(async (request, response) => {
  if (request.headers['last-event-id']) asked.push(request.url);
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  if (request.headers['last-event-id']) return response.write(':\n');
  response.write('retry: 300\nid: 7\ndata: 1\n\ndata: 2\n\n');
  await sleep(500);
  if (request.url === '/es4') response.destroy();
}).listen(0, '127.0.0.1');
await sleep(200);
const got = {};
const start = (name, EventSource) => {
  got[name] = [];
  const source = new EventSource(`http://127.0.0.1:${server.address().port}/${name}`);
  source.onmessage = (e) => got[name].push(e.lastEventId);
  source.onerror = () => {};
};
start('es2', (await import('es2')).default);
start('es4', (await import('es4')).EventSource);
start('es5', (await import('es5')).EventSource);
start('undici', (await import('undici')).EventSource);
start('event-source-polyfill', (await import('event-source-polyfill')).default.EventSourcePolyfill);
start('launchdarkly-eventsource', (await import('launchdarkly-eventsource')).default.EventSource);
await sleep(4000);
console.log(got, 'asked again with an id:', asked);
process.exit(Object.entries(got).every(([name, ids]) => `${ids}` === (name === 'es4' ? '7,' : '7,7'))
  && `${asked}` === '/es4' ? 0 : 1);
J
node --no-warnings run.mjs
