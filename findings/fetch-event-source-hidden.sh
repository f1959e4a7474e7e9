#!/usr/bin/env bash
# @microsoft/fetch-event-source 2.0.1 has two streams, and each event twice, in a tab that was hidden and shown while it
# waited to try again: showing it connects at once, and the timer, which hiding it did not stop, connects once more.
# The signal ends only the later one. (openWhenHidden: true avoids it.)
#
# Seen: a server ends the first stream with retry: 3000, the tab is hidden and shown meanwhile; then 2 streams are open,
# and 1 after abort(). With openWhenHidden 1 and 0. Of a browser it has document and window, here as objects of ours.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent @microsoft/fetch-event-source@2.0.1
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { fetchEventSource } from '@microsoft/fetch-event-source';
globalThis.window = globalThis;
globalThis.document = Object.assign(new EventTarget(), { hidden: false });
const requests = {}, open = { '/default': 0, '/openWhenHidden': 0 };
const server = http.createServer((request, response) => {
  requests[request.url] = (requests[request.url] ?? 0) + 1;
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('retry: 3000\ndata: 1\n\n');
  if (requests[request.url] === 1) return setTimeout(() => response.destroy(), 300);
  open[request.url]++;
  response.on('close', () => open[request.url]--);
}).listen(0, '127.0.0.1');
await sleep(200);
const end = new AbortController();
for (const path in open) {
  fetchEventSource(`http://127.0.0.1:${server.address().port}${path}`,
    { signal: end.signal, openWhenHidden: path === '/openWhenHidden', onmessage() {} });
}
await sleep(1500);
for (const hidden of [true, false]) {
  document.hidden = hidden;
  document.dispatchEvent(new Event('visibilitychange'));
  await sleep(300);
}
await sleep(4000);
const before = { ...open };
end.abort();
await sleep(1500);
console.log('@microsoft/fetch-event-source 2.0.1, open streams', before, 'and after abort()', open);
process.exit(before['/default'] === 2 && open['/default'] === 1
  && before['/openWhenHidden'] === 1 && open['/openWhenHidden'] === 0 ? 0 : 1);
J
node run.mjs
