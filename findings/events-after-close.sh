#!/usr/bin/env bash
# Called from the handler of an event, close() (or abort()) stops neither of the two events that came in the same piece
# of the stream, with ten of these twelve clients: they go on to dispatch what they have read. A handler that closes at
# an event "end" and takes nothing for possible after it is called again. WHATWG's steps dispatch nothing once
# readyState is CLOSED.
#
# Seen: of three events in one piece, closed at the first, only eventsource 5.1.5 and event-source-polyfill 1.0.31 gave
# one; all others gave three.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es2@npm:eventsource@2.0.2 es4@npm:eventsource@4.1.1 \
  es5@npm:eventsource@5.1.5 undici@7.30.2 eventsource-client@1.2.0 @microsoft/fetch-event-source@2.0.1 \
  event-source-polyfill@1.0.31 event-source-plus@0.1.15 sse.js@2.8.0 happy-dom@21.0.4 \
  launchdarkly-eventsource@2.2.0 extended-eventsource@2.1.0 reconnecting-eventsource@1.6.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
const server = http.createServer((request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('data: 1\n\ndata: 2\n\ndata: 3\n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}/`;
const { Window } = await import('happy-dom');
globalThis.XMLHttpRequest = new Window({ url }).XMLHttpRequest;
const { EventSourcePolyfill } = (await import('event-source-polyfill')).default;
globalThis.window = globalThis;
globalThis.document = new EventTarget();
globalThis.EventSource = (await import('es4')).EventSource;
const { fetchEventSource } = await import('@microsoft/fetch-event-source');
const { createEventSource } = await import('eventsource-client');
const { EventSourcePlus } = await import('event-source-plus');
const reconnecting = (await import('reconnecting-eventsource')).default;
const got = {};
const standard = (name, EventSource, options) => {
  const source = new EventSource(url, options);
  source.onmessage = () => { got[name] = (got[name] ?? 0) + 1; source.close(); };
};
standard('eventsource 2.0.2', (await import('es2')).default);
standard('eventsource 4.1.1', (await import('es4')).EventSource);
standard('eventsource 5.1.5', (await import('es5')).EventSource);
standard('undici 7.30.2', (await import('undici')).EventSource);
standard('event-source-polyfill 1.0.31', EventSourcePolyfill);
standard('sse.js 2.8.0', (await import('sse.js')).SSE);
standard('launchdarkly-eventsource 2.2.0', (await import('launchdarkly-eventsource')).default.EventSource);
standard('extended-eventsource 2.1.0', (await import('extended-eventsource')).EventSource, { disableLogger: true });
standard('reconnecting-eventsource 1.6.5', reconnecting.default ?? reconnecting);
const once = (name, start) => {
  let close;
  close = start(() => { got[name] = (got[name] ?? 0) + 1; close(); });
};
once('eventsource-client 1.2.0', (onMessage) => {
  const source = createEventSource({ url, onMessage });
  return () => source.close();
});
once('@microsoft/fetch-event-source 2.0.1', (onmessage) => {
  const end = new AbortController();
  fetchEventSource(url, { signal: end.signal, onmessage });
  return () => end.abort();
});
once('event-source-plus 0.1.15', (onMessage) => {
  const controller = new EventSourcePlus(url).listen({ onMessage });
  return () => controller.abort();
});
await sleep(5000);
console.log(got);
const right = Object.keys(got).filter((name) => got[name] === 1).sort();
process.exit(`${right}` === 'event-source-polyfill 1.0.31,eventsource 5.1.5'
  && Object.values(got).filter((n) => n === 3).length === 10 ? 0 : 1);
J
node --no-warnings run.mjs
