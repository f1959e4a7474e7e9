#!/usr/bin/env bash
# extended-eventsource 2.1.0 tears an event with CRLF line ends apart if a piece of the stream ends between CR and LF:
# it takes the LF that follows for one more, empty line, which ends the event. What comes of it depends on the network.
#
# Seen: "event: progress", "data: 50" in one piece is the event "progress" with 50. With the pieces ending after the
# first CR, it is "progress" without data, and then "message" with 50.
# Fails if that changes. Needs bash, Node.js 20 or later, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --no-audit --no-fund --silent extended-eventsource@2.1.0
cat >run.mjs <<'J'
import http from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { EventSource } from 'extended-eventsource';
const pieces = {
  '/whole': ['event: progress\r\ndata: 50\r\n\r\n'],
  '/split': ['event: progress\r', '\ndata: 50\r\n\r\n'],
};
const server = http.createServer(async (request, response) => {
  response.writeHead(200, { 'Content-Type': 'text/event-stream' });
  for (const piece of pieces[request.url]) {
    response.write(piece);
    await sleep(300);
  }
}).listen(0, '127.0.0.1');
await sleep(200);
const got = { '/whole': [], '/split': [] };
for (const path in got) {
  const source = new EventSource(`http://127.0.0.1:${server.address().port}${path}`, { disableLogger: true });
  for (const name of ['progress', 'message']) {
    source.addEventListener(name, (e) => got[path].push(`${name}: ${e.data}`));
  }
}
await sleep(3000);
console.log('extended-eventsource 2.1.0:', got);
process.exit(`${got['/whole']}` === 'progress: 50' && `${got['/split']}` === 'progress: ,message: 50' ? 0 : 1);
J
node run.mjs
