#!/usr/bin/env bash
# eventsource 4.1.1 and eventsource-client 1.2.0 hold an event with CR line ends back until the next byte comes, which
# may be never: they wait to see whether an LF follows the last CR, although the blank line is complete without it. So
# each event of such a stream arrives when the next one does. eventsource 5.1.5 dispatches it at once.
#
# Seen: of an event with CR line ends at the start and one after 1 s, 2 s later eventsource 4.1.1 and eventsource-client
# had the first alone, eventsource 5.1.5 and undici 7.30.2 both.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent es4@npm:eventsource@4.1.1 es5@npm:eventsource@5.1.5 undici@7.30.2 \
  eventsource-client@1.2.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSource as EventSource4 } from 'es4';
import { EventSource as EventSource5 } from 'es5';
import { createEventSource } from 'eventsource-client';
import { EventSource as Undici } from 'undici';
const server = http.createServer(async (request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('data: 1\r\r');
  await sleep(1000);
  response.write('data: 2\r\r');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
const got = {};
const on = (name) => { got[name] = []; return (e) => got[name].push(e.data); };
new EventSource4(url).onmessage = on('eventsource 4.1.1');
new EventSource5(url).onmessage = on('eventsource 5.1.5');
new Undici(url).onmessage = on('undici 7.30.2');
createEventSource({ url, onMessage: on('eventsource-client 1.2.0') });
await sleep(4000);
console.log(got);
process.exit(`${got['eventsource 4.1.1']}` === '1' && `${got['eventsource-client 1.2.0']}` === '1'
  && `${got['eventsource 5.1.5']}` === '1,2' && `${got['undici 7.30.2']}` === '1,2' ? 0 : 1);
J
node --no-warnings run.mjs
