#!/usr/bin/env bash
# eventsource-client 1.2.0 looks at no status but 204: whatever is answered counts as connected (onConnect is called),
# is read as a stream, and asked for again when it ends, for ever. An event in the body of a 500 is given out, too.
#
# Seen in 9 s: of a 410 with JSON 5 requests and onConnect 5 times; of a 500 with lines like an event's the same, and
# the message. eventsource 5.1.5 stopped at both after one request.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent eventsource-client@1.2.0 eventsource@5.1.5
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSource } from 'eventsource';
import { createEventSource } from 'eventsource-client';
const answers = {
  '/gone': [410, 'application/json', '{"error":"gone"}'],
  '/broken': [500, 'text/plain', '\ndata: stack trace\n\n'],
};
const requests = {};
const server = http.createServer((request, response) => {
  const [, client, path] = /^\/(\w+)(\/\w+)/.exec(request.url);
  requests[client + path] = (requests[client + path] ?? 0) + 1;
  const [status, type, body] = answers[path];
  response.writeHead(status, { 'Content-Type': type }).end(body);
}).listen(0, '127.0.0.1');
await sleep(200);
const url = `http://127.0.0.1:${server.address().port}`;
const got = {}, connected = {};
for (const path in answers) {
  createEventSource({ url: `${url}/client${path}`, onMessage: (e) => { got[path] = e.data; },
    onConnect: () => { connected[path] = (connected[path] ?? 0) + 1; } });
  new EventSource(`${url}/standard${path}`).onmessage = (e) => { got[`standard${path}`] = e.data; };
}
await sleep(9000);
console.log('eventsource-client 1.2.0 in 9 s:', { requests, connected, got });
const asks = (path) => requests[`client${path}`] > 2 && connected[path] > 2 && requests[`standard${path}`] === 1;
process.exit(Object.keys(answers).every(asks) && got['/broken'] === 'stack trace' && Object.keys(got).length === 1
  ? 0 : 1);
J
node run.mjs
