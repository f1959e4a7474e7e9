#!/usr/bin/env bash
# An exception in the message handler makes @microsoft/fetch-event-source 2.0.1, eventsource-client 1.2.0 and
# extended-eventsource 2.1.0 (with onmessage set) take it for a failed connection, without a word: they connect again,
# and leave the stream that they read, open and unread. abort() or close() ends the last one only. So a handler that
# throws at each event makes one more stream each time.
#
# Seen: after an exception at each of the first 3 events 4 streams were open, and 3 after close(). With eventsource
# 5.1.5, which reports the one exception as uncaught, 1 and 0.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent @microsoft/fetch-event-source@2.0.1 eventsource-client@1.2.0 \
  extended-eventsource@2.1.0 eventsource@5.1.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
globalThis.window = globalThis;
globalThis.document = new EventTarget();
const { fetchEventSource } = await import('@microsoft/fetch-event-source');
const { createEventSource } = await import('eventsource-client');
const { EventSource: Extended } = await import('extended-eventsource');
const { EventSource } = await import('eventsource');
const open = {};
const server = http.createServer((request, response) => {
  open[request.url] = (open[request.url] ?? 0) + 1;
  response.on('close', () => open[request.url]--);
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('retry: 300\ndata: 1\n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
let uncaught = 0;
process.on('uncaughtException', () => uncaught++);
const handler = () => {
  let events = 0;
  return () => { if (++events <= 3) throw new Error('in the handler'); };
};
const end = new AbortController();
fetchEventSource(`${url}/fetch-event-source`, { signal: end.signal, onmessage: handler() });
const client = createEventSource({ url: `${url}/eventsource-client`, onMessage: handler() });
const extended = new Extended(`${url}/extended-eventsource`, { disableLogger: true });
extended.onmessage = handler();
const standard = new EventSource(`${url}/eventsource`);
standard.onmessage = handler();
await sleep(6000);
const before = { ...open };
end.abort();
client.close();
extended.close();
standard.close();
await sleep(1500);
console.log('open streams', before, 'and after close()', open, `uncaught: ${uncaught}`);
const leaks = Object.keys(open).filter((path) => before[path] === 4 && open[path] === 3);
process.exit(leaks.length === 3 && before['/eventsource'] === 1 && open['/eventsource'] === 0 && uncaught === 1
  ? 0 : 1);
J
node run.mjs
