#!/usr/bin/env bash
# A block with an id and no data moves the last event ID on without an event (WHATWG HTML 9.2.6), so that a server can
# tell a client how far it is. eventsource-client 1.2.0, event-source-plus 0.1.15, event-source-polyfill 1.0.31 and
# launchdarkly-eventsource 2.2.0 do not count it, and ask again from the last event that had data.
#
# Seen: after an event 1 and "id: 2" alone these four came back with 1, the other five with 2.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es2@npm:eventsource@2.0.2 es5@npm:eventsource@5.1.5 undici@7.30.2 \
  eventsource-client@1.2.0 @microsoft/fetch-event-source@2.0.1 event-source-polyfill@1.0.31 event-source-plus@0.1.15 \
  launchdarkly-eventsource@2.2.0 extended-eventsource@2.1.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
const { EventSourcePolyfill } = (await import('event-source-polyfill')).default;
globalThis.window = globalThis;
globalThis.document = new EventTarget();
const asked = {};
const server = http.createServer(async (request, response) => {
  const { pathname, searchParams } = new URL(request.url, 'http://localhost');
  const client = pathname.slice(1), first = !(client in asked);
  asked[client] = request.headers['last-event-id'] ?? searchParams.get('lastEventId') ?? '';
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write(first ? 'retry: 300\nid: 1\ndata: event 1\n\nid: 2\n\n' : ':\n');
  if (!first) return;
  await sleep(200);
  response.destroy();
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
console.error = () => {}; // event-source-polyfill's
new (await import('es2')).default(`${url}/eventsource-2`);
new (await import('es5')).EventSource(`${url}/eventsource-5`);
new (await import('undici')).EventSource(`${url}/undici`);
new EventSourcePolyfill(`${url}/event-source-polyfill`);
const { EventSource: LaunchDarkly } = (await import('launchdarkly-eventsource')).default;
new LaunchDarkly(`${url}/launchdarkly-eventsource`).onerror = () => {};
new (await import('extended-eventsource')).EventSource(`${url}/extended-eventsource`, { disableLogger: true });
(await import('eventsource-client')).createEventSource({ url: `${url}/eventsource-client` });
(await import('@microsoft/fetch-event-source')).fetchEventSource(`${url}/fetch-event-source`, {});
new (await import('event-source-plus')).EventSourcePlus(`${url}/event-source-plus`).listen({ onMessage() {} });
await sleep(6000);
console.log(asked);
const [one, two] = ['1', '2'].map((id) => Object.keys(asked).filter((client) => asked[client] === id).sort().join(' '));
process.exit(one === 'event-source-plus event-source-polyfill eventsource-client launchdarkly-eventsource'
  && two === 'eventsource-2 eventsource-5 extended-eventsource fetch-event-source undici' ? 0 : 1);
J
node --no-warnings run.mjs
