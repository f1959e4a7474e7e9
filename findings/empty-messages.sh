#!/usr/bin/env bash
# @microsoft/fetch-event-source 2.0.1 and extended-eventsource 2.1.0 give out a message without data for each comment
# with a blank line behind it, the usual heartbeat (extended-eventsource: from the first event on), and for a block
# that has only a retry or an id. EventSource gives none: no data, no event. JSON.parse in the handler then throws. A
# server that writes a comment as one line, without a blank one, is safe.
#
# Seen: of one event and two ": beat" with a blank line the two clients gave three messages, eventsource 5.1.5 one; of
# one event and two ": beat" without, all gave one.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent @microsoft/fetch-event-source@2.0.1 extended-eventsource@2.1.0 \
  eventsource@5.1.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
globalThis.window = globalThis;
globalThis.document = new EventTarget();
const { fetchEventSource } = await import('@microsoft/fetch-event-source');
const { EventSource: Extended } = await import('extended-eventsource');
const { EventSource } = await import('eventsource');
const server = http.createServer((request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('data: 1\n\n' + (request.url === '/blank' ? ': beat\n\n' : ': beat\n').repeat(2));
}).listen(0, '127.0.0.1');
await sleep(200);
const got = {};
for (const path of ['/blank', '/line']) {
  const url = `http://127.0.0.1:${server.address().port}${path}`;
  const count = (name) => {
    got[name + path] = [];
    return (e) => got[name + path].push(e.data);
  };
  fetchEventSource(url, { onmessage: count('fetch-event-source') });
  new Extended(url, { disableLogger: true }).onmessage = count('extended-eventsource');
  new EventSource(url).onmessage = count('eventsource');
}
await sleep(3000);
console.log(got);
const want = { 'fetch-event-source/blank': 3, 'extended-eventsource/blank': 3 };
process.exit(Object.keys(got).every((name) => got[name].length === (want[name] ?? 1)) ? 0 : 1);
J
node run.mjs
