#!/usr/bin/env bash
# eventsource 2.0.2, launchdarkly-eventsource 2.2.0 and sse.js 2.8.0 do not look at the media type of a 200: the login
# page that a proxy answers when a session is over is an open stream to them ("open" is dispatched), which ends at once
# and is asked for again for ever. The handler that would send the user to the login is never called with anything that
# says so. eventsource 5.1.5, undici 7.30.2, extended-eventsource 2.1.0 and event-source-polyfill 1.0.31 stop.
#
# Seen: of a server that answers 200 text/html, in 8 s several requests and as many "open" from the former three, one
# request and no "open" from the latter four.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es2@npm:eventsource@2.0.2 es5@npm:eventsource@5.1.5 undici@7.30.2 \
  event-source-polyfill@1.0.31 sse.js@2.8.0 happy-dom@21.0.4 launchdarkly-eventsource@2.2.0 extended-eventsource@2.1.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { Window } from 'happy-dom';
const requests = {}, opened = {};
const server = http.createServer((request, response) => {
  requests[request.url] = (requests[request.url] ?? 0) + 1;
  response.writeHead(200, { 'Content-Type': 'text/html' }).end('<title>Log in</title>');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
globalThis.XMLHttpRequest = new Window({ url }).XMLHttpRequest;
console.error = () => {}; // event-source-polyfill's
const start = (EventSource, path, options) => {
  const source = new EventSource(url + path, options);
  source.onopen = () => { opened[path] = (opened[path] ?? 0) + 1; };
  source.onerror = () => {};
};
start((await import('es2')).default, '/eventsource-2');
start((await import('launchdarkly-eventsource')).default.EventSource, '/launchdarkly-eventsource');
start((await import('sse.js')).SSE, '/sse.js', { autoReconnect: true });
start((await import('es5')).EventSource, '/eventsource-5');
start((await import('undici')).EventSource, '/undici');
start((await import('extended-eventsource')).EventSource, '/extended-eventsource', { disableLogger: true });
start((await import('event-source-polyfill')).default.EventSourcePolyfill, '/event-source-polyfill');
await sleep(8000);
console.log({ requests, opened });
const paths = Object.keys(requests);
const asks = paths.filter((path) => requests[path] > 1 && opened[path] > 1).sort();
process.exit(`${asks}` === '/eventsource-2,/launchdarkly-eventsource,/sse.js'
  && paths.filter((path) => requests[path] === 1 && !opened[path]).length === 4 ? 0 : 1);
J
node --no-warnings run.mjs
