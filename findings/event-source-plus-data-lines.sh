#!/usr/bin/env bash
# event-source-plus 0.1.15 keeps only the last of an event's data lines, which belong together, joined with line ends
# (any text with a line end in it is sent so). It takes white space off both ends of what it keeps, too.
#
# Seen: of the lines "data: one" and "data:   two " the message has "two"; with eventsource 5.1.5, "one\n  two ".
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
const server = http.createServer((request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  response.write('data: one\ndata:   two \n\n');
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
const got = {};
new EventSourcePlus(url).listen({ onMessage: (e) => { got['event-source-plus 0.1.15'] = e.data; } });
new EventSource(url).onmessage = (e) => { got['eventsource 5.1.5'] = e.data; };
await sleep(3000);
console.log(got);
process.exit(got['event-source-plus 0.1.15'] === 'two' && got['eventsource 5.1.5'] === 'one\n  two ' ? 0 : 1);
J
node run.mjs
